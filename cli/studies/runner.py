"""Does what is missing of a study: claims runs, hands them to an engine, writes down what comes back.

Several runners may work on one study. A run is begun when what it needs is finished and nobody has it; a runner ends
when nothing is left that it or another one could do.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from .claims import Claims, wait_a_moment
from .runs import Run
from .store import Study

Outcome = dict[str, Any]


class Engine(Protocol):
    """Where runs are done."""

    def slots(self) -> int:
        """How many runs it takes at a time."""

    def submit(self, run: Run, directory: Path, needed: Path | None) -> None:
        """Begin a run."""

    def wait(self) -> list[tuple[Run, Outcome]]:
        """Until at least one has ended; its outcome is what `execute` returns."""


class Watcher(Protocol):
    """Told of what happens."""

    def began(self, run: Run) -> None: ...

    def ended(self, run: Run, outcome: Outcome) -> None: ...

    def look(self, states: dict[str, str]) -> None:
        """Run id to state, now and then."""


@dataclass(frozen=True)
class Tally:
    """How a study stands: runs by state."""

    finished: int
    failed: int
    blocked: int


def states(study: Study, held: Callable[[Run], bool] = lambda run: False) -> dict[str, str]:
    """Run id to finished, failed, blocked (what it needs failed), running (somebody holds it), or missing."""
    found: dict[str, str] = {}
    for run in study.runs:
        if study.is_finished(run):
            found[run.id] = "finished"
        elif study.error(run) is not None:
            found[run.id] = "failed"
        elif run.needs is not None and found[run.needs.id] in ("failed", "blocked"):
            found[run.id] = "blocked"
        else:
            found[run.id] = "running" if held(run) else "missing"
    return found


def retry_failed(study: Study, claims: Claims) -> int:
    """Forget the errors of failed runs, so that they are missing again; how many there were."""
    count = 0
    for run in study.runs:
        with claims.locked():
            if study.error(run) is not None and not study.is_finished(run) and claims.held_by(run.id) is None:
                (study.directory(run) / "error.json").unlink(missing_ok=True)
                count += 1
    return count


def run_study(study: Study, engine: Engine, watcher: Watcher, claims: Claims) -> Tally:
    """Do all that is missing.

    Args:
        claims: entered; given back to others when this ends, however it does.

    Raises:
        KeyboardInterrupt: a signal; what was being done is left for the next runner, finished runs are written.
    """
    waiting: set[str] = set()  # submitted here, and not back yet
    while True:
        now = states(study, lambda run: claims.held_by(run.id) is not None)
        watcher.look(now)
        for run in study.runs:
            if len(waiting) >= engine.slots():
                break
            if now[run.id] != "missing" or not _ready(study, run):
                continue
            if claims.take(run.id, functools.partial(_wanted, study, run)):
                watcher.began(run)
                waiting.add(run.id)
                engine.submit(run, study.directory(run), study.directory(run.needs) if run.needs else None)
        if waiting:
            for run, outcome in engine.wait():
                _write(study, claims, run, outcome)
                claims.release(run.id)
                waiting.discard(run.id)
                watcher.ended(run, outcome)
        elif any(state in ("missing", "running") for state in now.values()):
            if not any(now[run.id] == "missing" and _ready(study, run) for run in study.runs):
                wait_a_moment()  # others have what is left, or what it needs
        else:
            break
    final = list(states(study).values())
    return Tally(final.count("finished"), final.count("failed"), final.count("blocked"))


def _wanted(study: Study, run: Run) -> bool:
    return not study.is_finished(run) and study.error(run) is None


def _ready(study: Study, run: Run) -> bool:
    return run.needs is None or study.is_finished(run.needs)


def _write(study: Study, claims: Claims, run: Run, outcome: Outcome) -> None:
    if not claims.holds(run.id) or study.is_finished(run):
        return  # we were thought dead, and another one does it, or has done it
    if "failure" in outcome:
        study.write_error(run, outcome["failure"])
    else:
        study.write_result(run, outcome["result"], outcome["record"])


class LocalEngine:
    """In this process, one run at a time."""

    def __init__(self, device: str | None) -> None:
        self._device = device
        self._next: list[tuple[Run, Path, Path | None]] = []

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def slots(self) -> int:
        return 1

    def submit(self, run: Run, directory: Path, needed: Path | None) -> None:
        self._next.append((run, directory, needed))

    def wait(self) -> list[tuple[Run, Outcome]]:
        from .execute import execute

        run, directory, needed = self._next.pop()
        return [(run, execute(run, directory, needed, self._device))]


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Within it, a scheduler's SIGTERM is what Ctrl-C is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
