"""One run of a study: what it does, what it depends on, and its identity, a hash of everything that decides its result.

What only decides how a run is shown (family, size) or kept (how often a checkpoint is written) is not in the hash, so
that a finished run stays valid when it changes. The version of the package is not either: it is recorded with every
result, and the report says where versions differ.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

FORMAT = 1  # of what a result holds; a change makes all earlier results unusable, and their runs missing
ACTIONS = ("finetune", "score", "stability")


@dataclass(frozen=True)
class Run:
    """One piece of work with one result.

    Attributes:
        action: "finetune" (mamba-ft), "score" (lm-eval) or "stability".
        settings: JSON values that decide the result, pins of the model and the data among them.
        free: JSON values that do not: how often to save, how to call things.
        labels: what the report groups by, in words.
        needs: the run whose model this one works on.
        isolated: it measures its process' memory, and so has one of its own.
        parameters: of the model, where known; for the estimate of what the run costs.
    """

    action: str
    settings: dict[str, Any]
    labels: dict[str, Any]
    free: dict[str, Any] = field(default_factory=dict)
    needs: Run | None = None
    isolated: bool = False
    parameters: int | None = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the result, as JSON values."""
        return {
            "format": FORMAT,
            "action": self.action,
            "settings": self.settings,
            "needs": self.needs.id if self.needs else None,
        }

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the identity."""
        return digest(self.identity)

    @property
    def name(self) -> str:
        """A line for people: action and labels."""
        shown = (
            f"{value}" if name in _SPEAKING else f"{name} {value}" for name, value in self.labels.items() if value != ""
        )
        return f"{self.action}: {', '.join(shown)}"


# Labels whose value says what it is.
_SPEAKING = ("family", "size", "dataset", "preset", "precision", "tuned")


def digest(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of a JSON value, the same for the same value on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def unique(runs: list[Run]) -> list[Run]:
    """The runs and those that they need, each once, what is needed first."""
    found: dict[str, Run] = {}

    def add(run: Run) -> None:
        if run.needs is not None:
            add(run.needs)
        found.setdefault(run.id, run)

    for run in runs:
        add(run)
    return list(found.values())
