"""What a divergence task asks of a backend: one request, scored in several precisions by one loaded model.

The task builds requests of the type `REQUEST`, whose third argument says in which precisions; the backend's method of
that name answers each with a dictionary, precision -> (log-probability, greedy).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from peft_mamba.precision import Precision

# lm-eval calls the backend's method of this name with all requests of this type.
REQUEST = "loglikelihood_by_precision"

DEFAULT_PRECISIONS = ("fp32", "fp16", "bf16")
DEFAULT_REFERENCE = "fp32"

# Backends of this process that answer such requests. lm-eval loads its model before it builds a task's requests but
# does not show it to the task; a task that finds none here can say so before the contexts of all documents are built.
scorers: WeakSet[Any] = WeakSet()


@dataclass(frozen=True)
class Precisions:
    """What is compared with what.

    Attributes:
        reference: the precision that the others are compared with.
        compared: the others; the reference itself where nothing else was chosen, which differs from itself by 0.
    """

    reference: str
    compared: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All precisions that are scored, the reference first."""
        return tuple(dict.fromkeys((self.reference, *self.compared)))

    @classmethod
    def parse(cls, precisions: str | Sequence[str] | None = None, reference: str | None = None) -> Precisions:
        """
        Args:
            precisions: names in any spelling of `Precision.parse`, as a sequence or as a string such as `fp32+bf16`
                (lm-eval splits `--model_args` at commas). Default fp32, fp16 and bf16.
            reference: default fp32; scored also if it is not among `precisions`.

        Raises:
            PrecisionError: an unknown precision, by its name.
        """
        if isinstance(precisions, str):
            precisions = [name for name in re.split(r"[+,\s]+", precisions.strip("[]() ")) if name]
        names = [Precision.parse(name).name for name in precisions or DEFAULT_PRECISIONS]
        base = Precision.parse(reference or DEFAULT_REFERENCE).name
        return cls(base, tuple(dict.fromkeys(name for name in names if name != base)) or (base,))

    def __str__(self) -> str:
        return f"{', '.join(self.names)} (reference {self.reference})"
