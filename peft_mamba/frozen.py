"""What follows from weights alone, computed once for as long as they stay as they are.

    with torch.no_grad(), frozen_weights():
        for batch in batches:
            model(**batch)

Inside, layers keep the half-precision copies of their weights, A = -exp(A_log), and the like, from one forward to the
next. Everywhere else, and wherever a gradient is wanted, each forward computes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor


class _Kept:
    """Values by what they are and whose they are. An entry holds its weights, so that no other gets their ids."""

    def __init__(self, most_bytes: int | None) -> None:
        self.room = float("inf") if most_bytes is None else most_bytes
        self.entries: dict[Hashable, tuple[tuple[Any, ...], tuple[Tensor, ...], Tensor]] = {}
        self.own: set[int] = set()  # ids of values, which nothing writes to, and further values may follow from

    def get(self, name: Hashable, compute: Callable[..., Tensor], weights: tuple[Tensor, ...]) -> Tensor:
        key = (name, *map(id, weights))
        stamps = tuple(map(self._stamp, weights))
        known = self.entries.get(key)
        if known is not None and known[0] == stamps:
            return known[2]
        value = compute(*weights)
        if known is not None:
            self._drop(key)
        if None not in stamps and value.nbytes <= self.room:
            self.room -= value.nbytes
            self.own.add(id(value))
            self.entries[key] = stamps, weights, value
        return value

    def _stamp(self, weight: Tensor) -> Any:
        """Changes when the weight does; None where nothing would tell, or where it may be gone after this forward."""
        if id(weight) in self.own:
            return True
        if not isinstance(weight, nn.Parameter) or weight.is_inference():
            return None
        return weight._version, weight.data_ptr()

    def _drop(self, key: Hashable) -> None:
        *_, value = self.entries.pop(key)
        self.room += value.nbytes
        self.own.discard(id(value))
        # What followed from it is never asked for again.
        for other in [other for other, (_, weights, _) in self.entries.items() if any(w is value for w in weights)]:
            self._drop(other)


_kept: ContextVar[_Kept | None] = ContextVar("kept", default=None)


@contextlib.contextmanager
def frozen_weights(most_bytes: int | None = None) -> Iterator[None]:
    """Keep what follows from weights alone until the context ends; then all of it is let go.

    A weight that is written to, or gets other data, is seen by its version counter or its address, and what follows
    from it computed anew. Writes past autograd (`weight.data.add_(…)`) are not seen: none belongs in here.

    Args:
        most_bytes: that all of it may take; what goes beyond is computed each time. None: no limit.
    """
    token = _kept.set(_Kept(most_bytes))
    try:
        yield
    finally:
        _kept.reset(token)


def from_weights(name: Hashable, compute: Callable[..., Tensor], *weights: Tensor) -> Tensor:
    """`compute(*weights)`, kept from one call to the next inside `frozen_weights` while no gradient is wanted.

    Args:
        name: says, with the weights, which value it is.
        weights: parameters, or values of this function; of others nothing is kept.
    """
    if torch.compiler.is_compiling() or (kept := _kept.get()) is None or torch.is_grad_enabled():
        return compute(*weights)
    return kept.get(name, compute, weights)
