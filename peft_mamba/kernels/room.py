"""Room behind the rows of a layer's input, so that what an adapter adds is part of the layer's own product.

    y = [x | t] [W | s B]ᵀ,  t = x Aᵀ      in place of      y = x Wᵀ + t (s B)ᵀ

The sum on the right reads and writes all of y once more; the product on the left has a few percent more terms, and
rounds once. Whatever makes x leaves columns free behind each of its rows, which t is then written to: no copy of x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensor = torch.Tensor

# An attribute of a tensor that has room: columns behind each row. No other tensor on the same memory has it.
_ROOM = "_columns_behind"
HALF = (torch.float16, torch.bfloat16)
# Tensor cores take rows that begin at multiples of 16 bytes, and Triton whole vectors where that is 16 numbers.
ALIGNMENT = 16


def useful(rank: int, features: int, device: torch.device, dtype: torch.dtype | None) -> bool:
    """Whether an adapter of this rank on inputs with so many features gains by room behind them."""
    return device.type == "cuda" and dtype in HALF and not rank % ALIGNMENT and not features % ALIGNMENT


def with_room(shape: Sequence[int], columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor of this shape; with `columns` > 0, each row is followed by so many that are free."""
    if not columns:
        return torch.empty(shape, dtype=dtype, device=device)
    *outer, features = shape
    whole = torch.empty(*outer, features + columns, dtype=dtype, device=device)
    x = shares(whole, shape, whole.stride(), 0)
    setattr(x, _ROOM, columns)
    return x


def with_columns(x: Tensor, columns: int) -> tuple[Tensor, Tensor] | None:
    """(rows, features + columns), x and the room behind it, and (rows, columns), that room; None: there is none."""
    if not columns or getattr(x, _ROOM, 0) != columns or not x.numel():
        return None
    rows = x.numel() // x.shape[-1]
    whole = shares(x, (rows, x.shape[-1] + columns), (x.shape[-1] + columns, 1), 0)
    return whole, shares(x, (rows, columns), whole.stride(), x.shape[-1])


def widened(weight: Tensor, columns: int) -> Tensor:
    """(out, in + columns): a weight and the room behind its rows, which `with_room` has left."""
    return shares(weight, (len(weight), weight.shape[1] + columns), weight.stride(), 0)


def shares(x: Tensor, shape: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """Part of the same memory; writing to it is no change of x to autograd, for which it is a tensor of its own."""
    with torch.no_grad():
        return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset() + offset, shape, stride)
