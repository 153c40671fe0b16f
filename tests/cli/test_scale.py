"""`accelerate launch` on two CPU processes: DDP and FSDP2 train what one process trains with the doubled batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from lm_eval_mamba.cli import distributed
from peft import get_peft_model
from safetensors.torch import load_file

import peft_mamba
from peft_mamba.checkpoints import AutoMambaForCausalLM

RUN = ("--device", "cpu", "--max-steps", "4", "--logging-steps", "1", "--save-steps", "2")
DDP = ("--multi_gpu",)
FSDP = ("--use_fsdp", "--fsdp_version", "2")


def launch(kind: tuple[str, ...], *arguments: object, succeeds: bool = True) -> str:
    """mamba-ft on two processes, exactly as on two GPUs; ACCELERATE_USE_CPU keeps it on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    command += ["--dynamo_backend", "no", "--mixed_precision", "no", "--main_process_port", "0", *kind]
    done = subprocess.run(
        [*command, "-m", "lm_eval_mamba.cli.ft", *map(str, arguments)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert (done.returncode == 0) == succeeds, done.stdout
    return done.stdout


def weights(run: Path) -> dict[str, torch.Tensor]:
    adapter = run / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else run / "model.safetensors")


def losses(run: Path) -> list[float]:
    history = json.loads((run / "run.json").read_text())["loss_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize(
    ("kind", "model", "preset", "level"),
    [
        (DDP, "mini", "sll", "block"),
        (DDP, "mini-2", "full", "mixer"),
        (FSDP, "mini-2", "sll", "mixer"),
        (FSDP, "mini", "full", "block"),
    ],
    ids=["ddp-adapter", "ddp-full", "fsdp-adapter", "fsdp-full"],
)
def test_two_processes_train_what_one_does(ft, tmp_path, kind, model, preset, level):
    run = (*RUN, "--model", model, "--preset", preset, "--recompute", level)
    status, said, _ = ft(*run, "--batch-size", "4", output=tmp_path / "one", quick=False)
    assert status == 0, said
    launch(kind, *run, "--batch-size", "2", "-o", tmp_path / "two")

    figures = json.loads((tmp_path / "two" / "run.json").read_text())
    assert figures["processes"] == 2
    assert figures["distributed"] == ("DistributedType.FSDP" if kind is FSDP else "DistributedType.MULTI_CPU")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-5, atol=1e-5, msg=name)


def test_a_sharded_fp16_run_resumes_bit_equal(tmp_path):
    run = (*RUN, "--model", "mini-2", "--preset", "sll", "--precision", "fp16", "--batch-size", "2")
    launch(FSDP, *run, "-o", tmp_path / "run")
    straight = weights(tmp_path / "run")
    for later in ("checkpoint-4", "adapter_model.safetensors", "run.json"):  # as if it had been killed after step 3
        path = tmp_path / "run" / later
        path.rename(tmp_path / later)
    said = launch(FSDP, "-o", tmp_path / "run", "--resume")
    assert "checkpoint-2" in said
    resumed = weights(tmp_path / "run")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.parametrize(
    ("kind", "precision", "environment", "said"),
    [
        (DistributedType.MULTI_GPU, "bf16", {}, "--precision bf16"),
        (DistributedType.DEEPSPEED, "no", {}, "DEEPSPEED is not tested"),
        (DistributedType.NO, "no", {"ACCELERATE_USE_FSDP": "true"}, "--num_processes 2"),
    ],
)
def test_launches_that_would_train_something_else_are_refused(monkeypatch, kind, precision, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    accelerator = SimpleNamespace(distributed_type=kind, mixed_precision=precision, parallelism_config=None)
    with pytest.raises(distributed.ScaleError, match=said):
        distributed.prepare(accelerator, torch.nn.Linear(1, 1))


@pytest.fixture(scope="module")
def model():
    base = AutoMambaForCausalLM.from_pretrained("mini")
    return get_peft_model(base, peft_mamba.MambaLoraConfig(preset="sll", r=4))


@pytest.fixture
def plugin(monkeypatch):
    def make(**environment: str) -> FullyShardedDataParallelPlugin:
        for name, value in ({"FSDP_VERSION": "2"} | environment).items():
            monkeypatch.setenv(name, value)
        return FullyShardedDataParallelPlugin()

    return make


@pytest.mark.parametrize(
    ("environment", "wrapped"),
    [
        ({}, ["MambaBlock"]),
        ({"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}, ["MambaBlock"]),
        (
            {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "MambaMixer"},
            ["MambaMixer"],
        ),
    ],
)
def test_the_block_is_the_unit_of_fsdp(model, plugin, environment, wrapped):
    made = plugin(**environment)
    distributed._check_plugin(made)
    distributed._wrap_blocks(made, model)
    assert made.transformer_cls_names_to_wrap == wrapped


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "100"}, "by size.*MambaBlock"),
        (
            {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Conv1d"},
            "by Conv1d.*MambaBlock",
        ),
        ({"FSDP_VERSION": "1"}, "--fsdp_version 2"),
    ],
)
def test_what_would_split_a_mixer_or_flatten_adapters_is_refused(model, plugin, environment, said):
    made = plugin(**environment)
    with pytest.raises(distributed.ScaleError, match=said):
        distributed._check_plugin(made)
        distributed._wrap_blocks(made, model)


def test_a_policy_that_casts_weights_is_refused(plugin):
    made = plugin()
    made.set_mixed_precision("bf16")
    with pytest.raises(distributed.ScaleError, match="--precision"):
        distributed._check_plugin(made)
