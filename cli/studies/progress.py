"""What `mamba-study run` shows: one bar over all runs with the time that is left; lines where there is no terminal."""

from __future__ import annotations

import io
import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from .cost import calibrated
from .runs import Run
from .store import Study

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def duration(seconds: float) -> str:
    """As a person says it: 3 h 20 min."""
    if seconds != seconds:
        return "unknown"
    if seconds < 60:
        return f"{max(seconds, 1):.0f} s"
    for (size, unit), (below, small) in zip(_UNITS, _UNITS[1:], strict=False):
        if seconds >= size:
            rest = round(seconds % size / below)
            return f"{seconds // size:.0f} {unit}" + (f" {rest} {small}" if rest else "")
    raise AssertionError


def own_console() -> Console:
    """Where standard output goes now, also while a run's output goes into its log."""
    try:
        descriptor = os.dup(sys.stdout.fileno())
    except (AttributeError, io.UnsupportedOperation):
        return Console(file=sys.stdout)
    return Console(file=os.fdopen(descriptor, "w", buffering=1, encoding="utf-8"))


class ShowRuns:
    """Tells what begins and ends, and how long the rest will take.

    The rest is the estimate of what is missing, corrected by what finished runs took, over as many as run at a time.
    """

    def __init__(self, study: Study, console: Console, device: str) -> None:
        self._study, self._console, self._device = study, console, device
        self._began: dict[str, float] = {}
        self._states: dict[str, str] = {}
        self._names = {run.id: f"{i}/{len(study.runs)} {run.name}" for i, run in enumerate(study.runs, 1)}
        self._bar: Progress | None = None
        self._task: Any = None
        if console.is_terminal:
            columns = (TextColumn("runs"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[left]}"))
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=len(study.runs), left="")
            self._bar.start()

    def look(self, states: dict[str, str]) -> None:
        self._states = states
        if self._bar is not None:
            done = sum(state in ("finished", "failed", "blocked") for state in states.values())
            left = self._left(states)
            self._bar.update(self._task, completed=done, left=f"{duration(left)} left" if left else "")

    def began(self, run: Run) -> None:
        self._began[run.id] = time.monotonic()
        left = "" if self._bar is not None else f" (about {duration(self._left(self._states))} left in all)"
        self._say(f"begun    {self._names[run.id]}{left}")

    def ended(self, run: Run, outcome: dict[str, Any]) -> None:
        took = duration(time.monotonic() - self._began.pop(run.id))
        if "failure" in outcome:
            reason = outcome["failure"]["error"].splitlines()[0]
            log = self._study.directory(run) / "log.txt"
            self._say(f"failed   {self._names[run.id]} after {took}: {reason}\n         see {log}")
        else:
            self._say(f"finished {self._names[run.id]} in {took}")

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()

    def _left(self, states: dict[str, str]) -> float:
        missing = [run for run in self._study.runs if states[run.id] in ("missing", "running")]
        seconds = calibrated(missing, self._study.finished(), self._device)
        return sum(seconds.values()) / max(len(self._began), 1)

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
