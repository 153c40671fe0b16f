"""Studies that are really done: failed, killed, interrupted, and by two at a time; the report is the same."""

import os
import random
import signal
import time

from lm_eval_mamba.cli.studies.results import LM_EVAL

from .conftest import TINY, figures, results


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_killed_at_random_points_it_loses_nothing_and_repeats_nothing(child, study, tmp_path, undisturbed):
    (tmp_path / "tiny.yaml").write_text(TINY)
    directory, kept, kills = tmp_path / "study", {}, 0
    rng = random.Random()
    while len(kept) < 4:
        process = child("run", tmp_path / "tiny.yaml", "-o", directory)
        # Not before it has done anything, or this would take forever: a checkpoint, a result.
        before = len(list(directory.glob("runs/*/*")))
        wait_for(lambda b=before, p=process: len(list(directory.glob("runs/*/*"))) > b + 1 or not p.is_alive())
        process.join(timeout=rng.uniform(0, 2.5))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        now = results(directory)
        assert {path: now.get(path) for path in kept} == kept  # no result was written twice
        kept = now
    status, output = study("run", directory)
    assert status == 0 and "4 of 4 runs finished" in output and "begun" not in output
    assert results(directory) == kept
    assert study("report", directory)[0] == 0
    assert figures(directory / "report") == figures(undisturbed / "report")
    assert not list(directory.glob("runs/*/claim")) and not list(directory.glob("runs/*/model/checkpoint-*"))


def test_two_runners_share_a_study(child, study, tmp_path, undisturbed):
    (tmp_path / "tiny.yaml").write_text(TINY)
    both = [child("run", tmp_path / "tiny.yaml", "-o", tmp_path / "study") for _ in range(2)]
    for process in both:
        process.join(timeout=240)
        assert process.exitcode == 0, process.log.read_text()
    logs = [process.log.read_text() for process in both]
    assert sum(log.count("\nfinished ") for log in logs) == 4
    assert all("4 of 4 runs finished" in log for log in logs)
    assert study("report", tmp_path / "study")[0] == 0
    assert figures(tmp_path / "study" / "report") == figures(undisturbed / "report")


def test_an_interrupted_finetuning_goes_on(child, study, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY.replace("max_steps: 4", "max_steps: 60").replace("[full, sll]", "full"))
    directory = tmp_path / "study"
    process = child("run", tmp_path / "tiny.yaml", "-o", directory)
    wait_for(lambda: list(directory.glob("runs/*/model/checkpoint-*")))
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=60)
    log = process.log.read_text()
    assert process.exitcode == 130 and "Stopped with 0 of 2 runs finished. Go on:" in log, log
    assert not list(directory.glob("runs/*/claim"))
    assert "missing" in study("status", directory)[1]
    assert study("run", directory)[0] == 0
    (trained,) = directory.glob("runs/*/model")
    assert "Going on from" in (trained.parent / "log.txt").read_text()


def test_a_failing_run_is_recorded_and_retried_on_request(study, tmp_path):
    text = TINY.replace("[full, sll]", "sll\n  learning_rate: [1e-3, 1e30]").replace(
        "tasks:", "reference: {learning_rate: 0.001}\ntasks:"
    )
    (tmp_path / "tiny.yaml").write_text(text)
    directory = tmp_path / "study"
    status, output = study("run", tmp_path / "tiny.yaml", "-o", directory)
    assert status == 1 and "2 of 4 runs finished, 1 failed, 1 wait for them" in output, output
    shown = study("status", directory)[1]
    assert "attempt 1" in shown and "blocked" in shown and "the loss is nan" in shown, shown
    assert study("report", directory)[0] == 0
    assert "Failed; what they would have shown is missing" in (directory / "report" / "report.md").read_text()
    status, output = study("run", directory)
    assert status == 1 and "begun" not in output
    status, output = study("run", directory, "--retry-failed")
    assert status == 1 and output.count("begun") == 1
    status, output = study("run", directory, "--engine", "local", "--address", "auto")
    assert status == 2 and "go with --engine ray" in output


def test_results_are_lm_evals_files_without_prompts(study, undisturbed):
    folders = sorted(undisturbed.glob(f"runs/*/{LM_EVAL}"))
    status, output = study("compare", *folders)
    assert status == 0 and "divergence_mini: 15 documents at 0, 1, 3, 5 shots" in output
    text = "".join(path.read_text() for path in folders[0].glob("samples_*"))
    assert "Question" not in text and "doc_hash" in text
