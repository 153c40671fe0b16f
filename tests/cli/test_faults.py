"""What survives what: kills, Ctrl-C, divergence, a full disk, another run's directory."""

import errno
import json
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from lm_eval_mamba.cli import errors
from lm_eval_mamba.cli.outputs import RunDirectory, SaveError, write_atomically
from safetensors.torch import load_file

RUN = ("--preset", "all", "--precision", "fp16", "--dropout", "0.1", "--batch-size", "4", "--device", "cpu")
RUN += ("--split", "train[:64]", "--eval-split", "heldout[:16]")
LONG = (*RUN, "--max-steps", "9", "--save-steps", "3", "--warmup-steps", "2")


def wait_for(path: Path, child, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert child.alive(), child.log.read_text()
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.001)


def equal(one: Path, other: Path) -> bool:
    a, b = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_killed_again_and_again_ends_bit_equal_to_one_that_was_not(child, tmp_path):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    calm = child(*LONG, "-o", undisturbed)
    assert calm.wait()[0] == 0, calm.log.read_text()

    # Where it is, what it gets, what the next one says it goes on from.
    history = [
        ("recipe.yaml", signal.SIGKILL, "the start: no checkpoint had been written"),
        ("checkpoint-3", signal.SIGINT, r"{out}/checkpoint-[345]\."),
        (".incomplete/checkpoint-6", signal.SIGKILL, r"{out}/checkpoint-[345]\."),
        ("checkpoint-9", signal.SIGKILL, r"{out}/checkpoint-9\."),
    ]
    arguments = (*LONG, "-o", out)
    for moment, number, _ in history:
        disturbed = child(*arguments)
        wait_for(out / moment, disturbed)
        disturbed.send(number)
        status, said = disturbed.wait()
        if number == signal.SIGINT:
            assert status == 130 and re.search(rf"Stopped after step \d of 9.*mamba-ft -o {out} --resume", said), said
        else:
            assert status == -number and not (out / "run.json").exists()
        assert all((path / "trainer_state.json").is_file() for path in out.glob("checkpoint-*"))
        arguments = ("-o", out, "--resume")
    last = child(*arguments)
    status, said = last.wait()
    assert status == 0, said
    logs = [each.read_text().replace("\n", "") for each in sorted(tmp_path.glob("log-*"))[2:]]
    for (_, _, expected), log in zip(history, logs, strict=True):
        assert re.search("Going on from " + expected.format(out=out), log), log

    assert equal(undisturbed, out)
    assert not (out / ".incomplete").exists()
    figures, expected = (json.loads((path / "run.json").read_text()) for path in (out, undisturbed))
    for name in ("held_out_loss", "steps", "tokens", "padding_tokens", "skipped_steps"):
        assert figures[name] == expected[name], name


def test_a_schedulers_sigterm_saves_as_ctrl_c_does(child, tmp_path):
    out = tmp_path / "out"
    stopped = child(*RUN, "--max-steps", "500", "--save-steps", "3", "-o", out)
    wait_for(out / "checkpoint-3", stopped)
    stopped.send(signal.SIGTERM)
    status, said = stopped.wait()
    step = re.search(r"Stopped after step (\d+) of 500", said)
    assert status == 130 and (out / f"checkpoint-{step[1]}" / "trainer_state.json").is_file(), said


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(ft, tmp_path):
    status, said, figures = ft("--learning-rate", "1e30", "--max-grad-norm", "0", "--save-steps", "1")
    assert status == 1 and figures is None
    assert re.search(r"step \d: the (loss|norm of the gradient) is (nan|inf)", said), said
    assert "--learning-rate" in said and "Traceback" not in said
    kept = RunDirectory(str(tmp_path / "out")).last_checkpoint
    for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
        weights = load_file(checkpoint / "adapter_model.safetensors")
        assert all(torch.isfinite(weight).all() for weight in weights.values()), checkpoint
    assert (kept is None) == ("No checkpoint had been written" in said)


def test_gradients_that_overflow_at_every_loss_scale_stop_an_fp16_run(ft, monkeypatch):
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 0.5)
    unscale = torch.amp.GradScaler.unscale_

    def overflow(self, optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.fill_(float("inf"))
        unscale(self, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", overflow)
    status, said, _ = ft("--precision", "fp16")
    assert status == 1 and "overflow in fp16 at every loss scale" in said and "--precision bf16" in said


def test_a_full_disk_loses_nothing_that_was_saved(child, tmp_path):
    out = tmp_path / "out"
    full = child(*RUN, "--max-steps", "200", "--save-steps", "2", "-o", out)
    wait_for(out / "checkpoint-2", full)
    # From now on no file may grow beyond 32 KiB: what a quota, or a full disk, does.
    resource.prlimit(full.pid, resource.RLIMIT_FSIZE, (32768, 32768))
    status, said = full.wait()
    assert status == 1 and "could not be saved" in said and "Traceback" not in said, said
    assert not (out / ".incomplete").exists()
    last = RunDirectory(str(out)).last_checkpoint
    assert last.name in said
    assert load_file(last / "adapter_model.safetensors") and torch.load(last / "optimizer.pt", weights_only=True)


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_atomically(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lm_eval_mamba.cli.outputs.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_save_that_fails_cleans_up_and_says_what_is_still_there(tmp_path):
    directory = RunDirectory(str(tmp_path))
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(SaveError, match=r"No space left.*checkpoint-4 is complete.*--resume"):
        with directory.saving("checkpoint-8", owner=True):
            (directory.staging / "checkpoint-8").mkdir(parents=True)
            raise OSError(errno.ENOSPC, "No space left on device")
    assert not directory.staging.exists()


def test_another_runs_directory_is_not_overwritten(ft, tmp_path):
    assert ft()[0] == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    status, said, _ = ft()
    assert status == 1 and "holds a finished run" in said and "--resume" in said
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    status, said, _ = ft(output=other)
    assert status == 1 and "is not empty and no run of mamba-ft" in said


def test_a_finished_run_is_not_run_again(ft, tmp_path):
    ft()
    adapter = (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns
    status, said, _ = ft("--resume", quick=False)
    assert status == 0 and "is finished" in said and "lm_eval --model mamba_amp" in said
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns == adapter


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--learning-rate", "0.5", "learning_rate was 0.003 and is 0.5"), ("--seed", "7", "seed was 0 and is 7")],
)
def test_a_run_is_not_resumed_as_another_one(ft, tmp_path, option, value, said):
    ft()
    (tmp_path / "out" / "run.json").unlink()
    status, output, _ = ft("--resume", option, value, quick=False)
    assert status == 1 and said in output


def test_a_run_is_not_resumed_on_other_data(ft, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"text": f"the mill is number {i}"} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ("--dataset", data, "--device", "cpu", "--max-steps", "2")
    ft(*own, quick=False)
    (tmp_path / "out" / "run.json").unlink()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    status, output, _ = ft("--resume", quick=False)
    assert status == 1 and "data was" in output


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ..."), "needed 2.50 GiB"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 "
                         "bytes. Error code 12"),
            "needed 4.00 GiB",
        ),
    ],
)  # fmt: skip
def test_out_of_memory_says_by_how_much_and_what_to_change(error, said):
    assert errors.out_of_memory(error)
    message = errors.memory_message(error, {"batch_size": 8, "preset": "full", "precision": "fp32"})
    assert said in message
    for remedy in ("--batch-size 4 --gradient-accumulation 2", "--gradient-checkpointing", "--preset sll", "bf16"):
        assert remedy in message
    assert not errors.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
