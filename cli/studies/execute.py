"""Does one run: fine-tune, score, or measure stability; in this process, whatever the engine that asked for it."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from ..outputs import sync
from .results import LM_EVAL
from .runs import Run
from .store import LOG, failure, record

MODEL = "model"  # mamba-ft's directory within that of the run


class Interrupted(KeyboardInterrupt):
    """A signal stopped a fine-tuning after it had saved a checkpoint."""


def execute(run: Run, directory: Path, needed: Path | None, device: str | None) -> dict[str, Any]:
    """Do a run; what it prints goes into its log.

    Args:
        directory: of the run. needed: of the run that it needs.
        device: cpu, cuda, …; None for CUDA where there is one.

    Returns:
        `{"result", "record"}`, or `{"failure"}` with what it raised. A signal goes through as KeyboardInterrupt.
    """
    started = time.time()
    directory.mkdir(parents=True, exist_ok=True)
    do = _in_a_process if run.isolated else _do
    try:
        with logged(directory / LOG):
            try:
                result, used = do(run, directory, needed, device)
            except Exception:
                traceback.print_exc()
                raise
    except Exception as error:
        return {"failure": failure(error)}
    finally:
        _free_memory()
    return {"result": result, "record": record(started, used)}


def _do(run: Run, directory: Path, needed: Path | None, device: str | None) -> tuple[dict[str, Any], str]:
    if run.action == "finetune":
        return _finetune(run, directory / MODEL, device)
    if run.action == "score":
        return _score(run, directory, needed, device)
    from .measure import measure_stability

    return measure_stability(run, device)


def _finetune(run: Run, output: Path, device: str | None) -> tuple[dict[str, Any], str]:
    from ..errors import explained
    from ..finetune import INTERRUPTED, finetune
    from ..outputs import RECIPE, RUN

    resume = (output / RECIPE).is_file()
    if not resume:
        shutil.rmtree(output, ignore_errors=True)  # what a process that died at its very beginning left
    decides = {name: value for name, value in run.settings.items() if not name.endswith("_pin")}
    options = decides | run.free | {"output": str(output), "device": (device or "auto").partition(":")[0]}
    with explained(options):
        status = finetune(options, dict.fromkeys(options, "the recipe"), resume=resume, dry_run=False, evaluate=None)
    if status == INTERRUPTED:
        raise Interrupted
    figures = json.loads((output / RUN).read_text(encoding="utf-8"))
    kept = {name: value for name, value in figures.items() if name not in ("sources", "versions", "git", "device")}
    return kept, figures["device"]


def _score(run: Run, directory: Path, needed: Path | None, device: str | None) -> tuple[dict[str, Any], str]:
    import torch

    from .scoring import evaluate, model_arguments, save

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    results = evaluate(run.settings, model_arguments(run, needed and needed / MODEL), device)
    staging = directory / f".{LM_EVAL}"
    shutil.rmtree(staging, ignore_errors=True)
    save(results, staging, run.id)
    sync(staging)
    shutil.rmtree(directory / LM_EVAL, ignore_errors=True)
    os.rename(staging, directory / LM_EVAL)
    config = results["config"]
    kept = ("precision", "kernel_path", "checkpoint", "adapter", "batch_sizes", "limit")
    found = {"groups": results.get("groups", {}), **{name: config.get(name) for name in kept}}
    return found, device_name(device)


def device_name(device: Any) -> str:
    """A device as results record it."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _in_a_process(run: Run, directory: Path, needed: Path | None, device: str | None) -> tuple[dict[str, Any], str]:
    """In a process of its own, whose memory nobody else has touched."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lm_eval_mamba.cli.finetune"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, run, directory, needed, device))
    child.start()
    theirs.close()
    try:
        kind, value = ours.recv()
    except EOFError:
        child.join()
        raise RuntimeError(
            f"the process of this run ended with status {child.exitcode} and said nothing; -9 is the system's answer "
            "to too much memory."
        ) from None
    except KeyboardInterrupt:
        child.join(timeout=300)  # it has had the signal too, and saves
        child.kill()
        raise
    child.join()
    if kind == "interrupted":
        raise Interrupted
    if kind == "error":
        raise RuntimeError(value)
    return value


def _child(pipe: Any, run: Run, directory: Path, needed: Path | None, device: str | None) -> None:
    with logged(directory / LOG):
        try:
            pipe.send(("result", _do(run, directory, needed, device)))
        except KeyboardInterrupt:
            pipe.send(("interrupted", None))
        except Exception as error:
            traceback.print_exc()
            pipe.send(("error", f"{type(error).__name__}: {error}"))


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Within it, whatever this process prints goes to the end of a file: through Python or past it."""
    with open(path, "a", encoding="utf-8", buffering=1) as stream, ExitStack() as stack:
        for number in (1, 2):
            try:
                kept = os.dup(number)
            except OSError:  # a process without
                continue
            os.dup2(stream.fileno(), number)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, number)
        stack.enter_context(redirect_stdout(stream))
        stack.enter_context(redirect_stderr(stream))
        yield
