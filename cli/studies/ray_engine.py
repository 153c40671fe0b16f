"""Runs on the workers of a Ray cluster: one GPU, or one CPU where there are none, a run.

Ray does again what a lost worker or node was doing; a fine-tuning then goes on from its last checkpoint where the
study's directory is shared, and begins anew where results are uploaded. Claims and results are written by the process
that asked, so nothing is left claimed by a node that is gone.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

from .execute import MODEL, execute
from .results import LM_EVAL
from .runner import Outcome
from .runs import Run
from .store import LOG, STUDY, Study, StudyError

RETRIES = 5  # of a run whose worker or node is lost


class RayEngine:
    """Submits runs to Ray.

    Args:
        address: of a cluster; None for one on this machine, which ends with the study.
        storage: fsspec URL that workers and this process reach, where they do not share the study's directory.

    Raises:
        StudyError: Ray is not installed, or not at that address.
    """

    def __init__(self, study: Study, device: str | None, address: str | None, storage: str | None) -> None:
        try:
            import ray
        except ImportError as error:
            raise StudyError('--engine ray needs Ray: pip install "lm-eval-mamba[ray]"') from error
        self._ray, self._study, self._device = ray, study, device
        self._address, self._storage = address, storage and f"{storage.rstrip('/')}/{study.path.name}"
        self._running: dict[Any, Run] = {}

    def __enter__(self) -> RayEngine:
        options: dict[str, Any] = {"include_dashboard": False} if not self._address else {}
        try:
            _reach(self._address)
            self._ray.init(address=self._address, log_to_driver=False, logging_level=logging.WARNING, **options)
        except (OSError, ValueError) as error:
            raise StudyError(f"--address {self._address}: no Ray cluster is there ({error}).") from error
        self._resource = "CPU" if self._device == "cpu" or not self._total("GPU") else "GPU"
        return self

    def __exit__(self, *error: object) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._ray.shutdown()

    def _total(self, resource: str) -> int:
        return int(self._ray.cluster_resources().get(resource, 0))

    def slots(self) -> int:
        """A few more than there are: a cluster that grows on demand grows by what waits."""
        return self._total(self._resource) + 2

    def submit(self, run: Run, directory: Path, needed: Path | None) -> None:
        options: dict[str, Any] = {"num_cpus": 1, "max_retries": RETRIES}
        if self._resource == "GPU":
            options["num_gpus"] = 1
        device = "cpu" if self._resource == "CPU" else self._device
        threads = os.environ.get("OMP_NUM_THREADS", "1")
        remote: Any = self._ray.remote(**options)(_work)
        reference = remote.remote(run, str(directory), str(needed) if needed else None, device, self._storage, threads)
        self._running[reference] = run

    def wait(self) -> list[tuple[Run, Outcome]]:
        done, _ = self._ray.wait(list(self._running), num_returns=1)
        return [(self._running.pop(reference), self._outcome(reference)) for reference in done]

    def _outcome(self, reference: Any) -> Outcome:
        from .store import failure

        try:
            outcome = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:  # lost more often than RETRIES, or killed for memory
            return {"failure": failure(error)}
        if "unshared" in outcome:
            raise StudyError(
                f"{outcome['unshared']}, a worker, does not see {self._study.path}. Put the study on a file system "
                "that all nodes share, or give --storage with a URL that all reach."
            )
        if self._storage:
            _download(self._storage, outcome["run"], self._study.path / "runs" / outcome["run"])
        return outcome


def _reach(address: str | None) -> None:
    """Raises OSError if nothing listens at HOST:PORT, where Ray itself would wait for long."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdigit() and "//" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _work(
    run: Run, directory: str, needed: str | None, device: str | None, storage: str | None, threads: str
) -> Outcome:
    """On a worker."""
    import torch

    torch.set_num_threads(int(threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    here = Path(directory)
    if not storage:
        if not (here.parents[1] / STUDY).is_file():
            return {"unshared": socket.gethostname()}
        return execute(run, here, Path(needed) if needed else None, device)
    with tempfile.TemporaryDirectory(prefix="mamba-study-") as scratch:
        here = Path(scratch) / run.id
        model = None
        if run.needs is not None:
            model = Path(scratch) / run.needs.id
            _fetch(storage, run.needs.id, MODEL, model)
        outcome = execute(run, here, model, device)
        _upload(storage, run.id, here)
    return outcome | {"run": run.id}


def _filesystem(storage: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    return url_to_fs(storage)


def _upload(storage: str, run: str, here: Path) -> None:
    """What a run left, without checkpoints: nothing goes on from them elsewhere."""
    for checkpoint in here.glob(f"{MODEL}/checkpoint-*"):
        shutil.rmtree(checkpoint)
    files, root = _filesystem(storage)
    for file in sorted(each for each in here.rglob("*") if each.is_file()):
        target = f"{root}/{run}/{file.relative_to(here).as_posix()}"
        files.makedirs(target.rpartition("/")[0], exist_ok=True)
        files.put_file(str(file), target)


def _fetch(storage: str, run: str, part: str, here: Path) -> None:
    """One folder of what a run left."""
    files, root = _filesystem(storage)
    prefix = files._strip_protocol(f"{root}/{run}/{part}")
    for name in files.find(prefix):
        target = here / part / name[len(prefix) :].lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        files.get_file(name, str(target))


def _download(storage: str, run: str, here: Path) -> None:
    """What a report reads: models stay where they are."""
    files, root = _filesystem(storage)
    here.mkdir(parents=True, exist_ok=True)
    if files.exists(f"{root}/{run}/{LOG}"):
        files.get_file(f"{root}/{run}/{LOG}", str(here / LOG))
    staging = here / f".{LM_EVAL}"
    shutil.rmtree(staging, ignore_errors=True)
    _fetch(storage, run, LM_EVAL, staging)
    if (staging / LM_EVAL).is_dir():
        shutil.rmtree(here / LM_EVAL, ignore_errors=True)
        os.rename(staging / LM_EVAL, here / LM_EVAL)
    shutil.rmtree(staging, ignore_errors=True)
