"""What runs left behind, as a report reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval_mamba.results import Study, read

from .runs import Run

LM_EVAL = "lm_eval"  # the folder of a run with lm-eval's result file and samples


@dataclass(frozen=True)
class Finished:
    """A run with its result.

    Attributes:
        directory: of the run.
        result: figures of the run, JSON values.
        record: how it came about: versions, device, seconds.
    """

    run: Run
    directory: Path
    result: dict[str, Any]
    record: dict[str, Any]

    @property
    def labels(self) -> dict[str, Any]:
        return self.run.labels

    def label(self, *names: str) -> str:
        """Labels as a table shows them."""
        return " ".join(str(self.labels[name]) for name in names if self.labels.get(name) not in ("", None))

    @cached_property
    def precisions(self) -> list[str]:
        """In which its tasks were scored, the reference first."""
        return self.run.settings["precisions"] or [self.run.settings["dtype"]]

    @cached_property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """lm-eval's own figures, by task."""
        (file,) = (self.directory / LM_EVAL).glob("results_*.json")
        return json.loads(file.read_text(encoding="utf-8"))["results"]

    def studies(self, precision: str | None = None) -> dict[str, Study]:
        """What lm-eval scored, by group or task."""
        several = self.run.settings["precisions"] is not None
        return read(self.directory / LM_EVAL, (precision or self.run.settings["dtype"]) if several else None)


def of_action(finished: Iterable[Finished], action: str) -> list[Finished]:
    """Those that did this."""
    return [each for each in finished if each.run.action == action]


def grouped(finished: Iterable[Finished], key: Callable[[Finished], Any]) -> dict[Any, list[Finished]]:
    """In order of first appearance."""
    found: dict[Any, list[Finished]] = {}
    for each in finished:
        found.setdefault(key(each), []).append(each)
    return found


def by_labels(finished: Iterable[Finished], *names: str) -> dict[tuple[Any, ...], list[Finished]]:
    """By the values of these labels."""
    return grouped(finished, lambda each: tuple(each.labels.get(name, "") for name in names))


def ordered(values: Iterable[Any], by: Sequence[Any]) -> list[Any]:
    """Each once: those in `by` first, in its order."""
    there = list(dict.fromkeys(values))
    return [value for value in by if value in there] + [value for value in there if value not in by]
