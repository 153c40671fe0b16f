"""Room behind the rows of a layer's input, so that what an adapter adds is part of the layer's own product.

    y  = [x | t] [W | s B]ᵀ,  t = x Aᵀ                in place of      y  = x Wᵀ + t (s B)ᵀ
    dx = [dy_1 | … | q] [W_1; …; A],  q = Σ dy s B     in place of      dx = q A + Σ dy_i W_i

The sums on the right read and write all of y or dx once more each; the products on the left have a few percent more
terms, and round once. Whatever makes x, or the gradients dy of a layer's outputs, leaves columns free behind each row,
which t and q are then written to, and puts the gradients of several outputs side by side: nothing is copied.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

Tensor = torch.Tensor

# An attribute of a tensor that has room: columns behind each row. No other tensor on the same memory has it.
_ROOM = "_columns_behind"
# An attribute of a tensor: the `Place` of its gradient.
_PLACE = "_gradient_place"
HALF = (torch.float16, torch.bfloat16)
# Tensor cores take rows that begin at multiples of 16 bytes, and Triton whole vectors where that is 16 numbers.
ALIGNMENT = 16


def useful(rank: int, features: int, device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether an adapter of this rank on inputs with so many features gains by room behind them."""
    return device.type == "cuda" and dtype in HALF and not rank % ALIGNMENT and not features % ALIGNMENT


def with_room(shape: Sequence[int], columns: int, dtype: torch.dtype, device: torch.device, rows: int = 0) -> Tensor:
    """An uninitialised tensor of this shape; with `columns` > 0, each row is followed by so many that are free.

    Args:
        rows: that are free behind the last one, of a matrix.
    """
    if not columns and not rows:
        return torch.empty(shape, dtype=dtype, device=device)
    *outer, features = shape
    outer[0] += rows
    whole = torch.empty(*outer, features + columns, dtype=dtype, device=device)
    x = shares(whole, shape, whole.stride(), 0)
    setattr(x, _ROOM, columns)
    return x


def seen_as(x: Tensor, shape: Sequence[int]) -> Tensor:
    """`x.view(shape)`, with the room that x has."""
    viewed = x.view(shape)
    if columns := getattr(x, _ROOM, 0):
        setattr(viewed, _ROOM, columns)
    return viewed


def with_columns(x: Tensor, columns: int) -> tuple[Tensor, Tensor] | None:
    """(rows, features + columns), x and the room behind it, and (rows, columns), that room; None: there is none."""
    if not columns or getattr(x, _ROOM, 0) != columns or not x.numel():
        return None
    rows = x.numel() // x.shape[-1]
    whole = shares(x, (rows, x.shape[-1] + columns), (x.shape[-1] + columns, 1), 0)
    return whole, shares(x, (rows, columns), whole.stride(), x.shape[-1])


def with_rows(weight: Tensor, rows: int) -> Tensor:
    """(out + rows, in): a weight and the rows behind it, which `with_room` has left."""
    return shares(weight, (len(weight) + rows, weight.shape[1]), weight.stride(), 0)


def widened(weight: Tensor, columns: int) -> Tensor:
    """(out, in + columns): a weight and the room behind its rows, which `with_room` has left."""
    return shares(weight, (len(weight), weight.shape[1] + columns), weight.stride(), 0)


def shares(x: Tensor, shape: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """Part of the same memory; writing to it is no change of x to autograd, for which it is a tensor of its own."""
    with torch.no_grad():
        return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset() + offset, shape, stride)


class GradientPlace:
    """Where the gradients of a layer's outputs come to lie side by side, with columns behind them that are free.

    Taken anew in each backward, with the first gradient that is written to it; the layer's own backward collects it.
    """

    # Of all columns, so many at most are copied there if whoever made them knew nothing of the place.
    COPIED = 1 / 8

    def __init__(self, sizes: Sequence[int], columns: int) -> None:
        self._bounds = [0]
        for size in sizes:
            self._bounds.append(self._bounds[-1] + size)
        self.columns = columns
        self._whole: Tensor | None = None
        self._taken: set[int] = set()

    def take(
        self, part: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device, lent: bool = False
    ) -> Tensor:
        """Uninitialised memory of this shape for the gradient of one of the outputs.

        Args:
            lent: for something else, of no more use once that gradient is made.
        """
        rows, whole = math.prod(shape[:-1]), self._whole
        if whole is None or part in self._taken or (len(whole), whole.dtype, whole.device) != (rows, dtype, device):
            whole = torch.empty(rows, self._bounds[-1] + self.columns, dtype=dtype, device=device)
            self._whole, self._taken = whole, set()
        if not lent:
            self._taken.add(part)
        begin, end = self._bounds[part : part + 2]
        return shares(whole, (rows, end - begin), whole.stride(), begin).view(shape)

    def holds(self, tensor: Tensor) -> bool:
        """Whether it lies in memory that has been taken."""
        whole = self._whole
        return whole is not None and whole.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()

    def collect(self, gradients: Sequence[Tensor]) -> Tensor | None:
        """(rows, Σ sizes + columns) with all gradients in it, None if most are elsewhere; the memory is let go of.

        Args:
            gradients: (rows, size) of every output.
        """
        whole, self._whole = self._whole, None
        if whole is None:
            return None
        places = [whole[:, begin:end] for begin, end in itertools.pairwise(self._bounds)]
        others = [
            (place, gradient)
            for place, gradient in zip(places, gradients, strict=True)
            if gradient.data_ptr() != place.data_ptr() or gradient.stride() != place.stride()
        ]
        if sum(place.shape[1] for place, _ in others) > self.COPIED * whole.shape[1]:
            return None
        for place, gradient in others:
            place.copy_(gradient)
        return whole


class Place(NamedTuple):
    """Of the gradient of one tensor: which memory, which of the layer's outputs, and whether it is only lent."""

    memory: GradientPlace
    part: int
    lent: bool = False


def set_gradient_place(y: Tensor, place: Place | None) -> Tensor:
    """`y`, whose gradient is to be written to that place by whatever computes it: `new_gradient`."""
    if place is not None:
        setattr(y, _PLACE, place)
    return y


def gradient_place(y: Tensor | None) -> Place | None:
    """For `new_gradient`, in the backward of what reads `y`; None: it has none."""
    return getattr(y, _PLACE, None)


def new_gradient(
    place: Place | None, like: Tensor, dtype: torch.dtype | None = None, reads: Tensor | None = None
) -> Tensor:
    """Uninitialised memory for a gradient of `like`'s shape, contiguous or, in a place, in rows that lie apart.

    Args:
        reads: what the gradient is computed from; where that lies in the place itself, the gradient must not.
    """
    dtype = dtype or like.dtype
    if place is None or (reads is not None and place.memory.holds(reads)):
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    return place.memory.take(place.part, like.shape, dtype, like.device, place.lent)


def as_gradient_of(y: Tensor, dy: Tensor) -> Tensor:
    """dy in y's dtype, and in the place of its gradient if it has one."""
    place = gradient_place(y)
    return dy.to(y.dtype) if place is None else new_gradient(place, y).copy_(dy)
