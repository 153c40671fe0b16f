"""A linear layer and the adapters on it as one function for autograd, see `projection`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..kernels.products import add_products, cast_adapter, from_both_sides, mm_in_float32
from ..kernels.room import HALF, shares, widened, with_columns, with_rows
from .recomputation import remakes_some, runs_again

Tensor = torch.Tensor

# Up to so many outputs, a product takes as long as it takes to read its input, which the adapter's A reads as well.
FEW_OUTPUTS = 256


class Room(NamedTuple):
    """What lies free behind a weight that is held in the dtype of the computation; rows only where there are columns.

    Attributes:
        columns: behind each of its rows.
        rows: behind the last one.
    """

    columns: int = 0
    rows: int = 0


def is_narrow(weight: Tensor, A: Tensor | None) -> bool:
    """Whether an adapted layer has so few outputs that x Wᵀ and x Aᵀ in one product take half as long as apart."""
    return A is not None and len(weight) + len(A) <= FEW_OUTPUTS


def _reads_once(x: Tensor, weight: Tensor, bias: Tensor | None, A: Any, dropout: float, parts: list[int]) -> bool:
    """Whether x Wᵀ and x Aᵀ are made in one product."""
    plain = bias is None and not dropout and len(parts) == 1
    return plain and x.is_cuda and x.dtype in HALF and is_narrow(weight, A)


def sum_of_products(rows: Tensor, weight: Tensor, bias: Tensor | None, t: Tensor, up: Tensor) -> Tensor:
    """rows Wᵀ + bias + t upᵀ, the small product first: to read it as well costs the large one no time."""
    return F.linear(t, up, bias).addmm_(rows, weight.t())


def _with_down(
    rows: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """The output, W, A, scaling · B and t = x Aᵀ from one product x [W; A]ᵀ, of which the output takes the memory."""
    size = len(weight)
    both = torch.empty(size + len(A), weight.shape[1], dtype=rows.dtype, device=rows.device)
    both[:size] = weight
    down, up = cast_adapter(A, B, scaling, rows.dtype, down=both[size:])
    made = F.linear(rows, both)
    y, t = (shares(made, (len(rows), n), made.stride(), at) for n, at in ((size, 0), (len(A), size)))
    return [y.addmm_(t, up.t())], weight if weight.dtype == rows.dtype else both[:size], down, up, t


def _above(weight: Tensor, down: Tensor, free: Room) -> Tensor:
    """(out + r, in): [W; A] in A's dtype; in the weight's own memory, if so many rows are free."""
    out, rank = len(weight), len(down)
    if free.rows == rank and _lies_as_placed(weight, free):
        both = with_rows(weight, rank)
    else:
        both = torch.empty(out + rank, weight.shape[1], dtype=down.dtype, device=down.device)
        both[:out] = weight
    both[out:] = down
    return both


def _lies_as_placed(weight: Tensor, free: Room) -> bool:
    """Whether it has not been moved since, to where there may be anything behind it."""
    return weight.stride() == (weight.shape[1] + free.columns, 1)


def _with_columns(weight: Tensor, columns: int, dtype: torch.dtype, free: Room) -> Tensor:
    """(out, in + columns): the weight in `dtype`, and columns to write to; its own memory, if so many are free."""
    if free.columns == columns and _lies_as_placed(weight, free):
        return widened(weight, columns)
    wide = torch.empty(len(weight), weight.shape[1] + columns, dtype=dtype, device=weight.device)
    wide[:, : weight.shape[1]] = weight
    return wide


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """scaling · a b in `dtype`: summed in float32 and rounded once."""
    product = mm_in_float32(a, b) if dtype == torch.float32 else a @ b
    product = product.to(dtype)
    return product if scaling == 1.0 else product.mul_(scaling)


class Product(torch.autograd.Function):
    """x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ in parts of `sizes`, and x itself to hand it through.

    x is in the dtype of the computation, the weights in their own. `free` lies behind `weight`, if it is in that dtype.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scaling, dropout, sizes, product, through, free, place):
        dtype = x.dtype
        t: Any = None
        mask = None
        parts = [len(weight)] if sizes is None else list(sizes)
        with _no_autocast(x.device.type):
            rows = x.reshape(-1, x.shape[-1])
            up: Any = None
            down: Any = None
            if product and _reads_once(x, weight, bias, A, dropout, parts):
                outputs, W, down, up, t = _with_down(rows, weight, A, B, scaling)
            else:
                room = with_columns(x, 0 if A is None else len(A)) if product else None
                W = weight.to(dtype) if room is None else _with_columns(weight, len(A), dtype, free)
                if A is not None:
                    down, up = cast_adapter(A, B, scaling, dtype, behind=None if room is None else W[:, x.shape[-1] :])
                    kept = rows
                    if dropout:
                        kept, mask = torch.native_dropout(rows, dropout, True)
                    t = torch.mm(kept, down.t(), out=None if room is None else room[1])
                offsets = [None] * len(parts) if bias is None or not product else bias.to(dtype).split(parts)
                if not product:
                    outputs = [x.new_empty(1).expand(len(rows), size) for size in parts]
                elif room is not None:
                    outputs = [F.linear(room[0], w, b) for w, b in zip(W.split(parts), offsets, strict=True)]
                    W = weight if weight.dtype == dtype else W[:, : x.shape[-1]]
                    t = t.clone() if remakes_some() else t  # which may let go of x, and of all that shares its memory
                elif up is None:
                    outputs = [F.linear(rows, w, b) for w, b in zip(W.split(parts), offsets, strict=True)]
                else:
                    of_parts = zip(W.split(parts), offsets, up.split(parts), strict=True)
                    outputs = [sum_of_products(rows, w, b, t, rise) for w, b, rise in of_parts]
        # The copy of a weight lives on where its backward comes next, and is made again where that is far.
        ctx.save_for_backward(x, W if runs_again() else weight, down, up, t, mask)
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.keep, ctx.parts = scaling, 1 - dropout, parts
        ctx.place, ctx.free = place, free
        ctx.dtypes = [None if each is None else each.dtype for each in (weight, bias, A, B)]
        return *(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs), x if through else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):  # type: ignore[override]  # mypy sees the decorator, not the method
        *of_parts, d_through = gradients
        if all(dy is None for dy in of_parts):
            return d_through, *[None] * 11
        x, weight, down, up, t, mask = ctx.saved_tensors
        for_x, for_weight, for_bias, for_A, for_B = ctx.needs_input_grad[:5]
        weight_dtype, bias_dtype, A_dtype, B_dtype = ctx.dtypes
        dtype = x.dtype
        d_rows: Any = None
        q: Any = None
        dW = db = dA = dB = None
        with _no_autocast(x.device.type):
            rows = x.reshape(-1, x.shape[-1])
            present = [(part, dy.to(dtype).reshape(-1, dy.shape[-1])) for part, dy in _parts(ctx.parts, of_parts)]
            wants_q = for_A or (for_x and down is not None)
            whole = None
            if ctx.place is not None and for_x and len(present) == len(ctx.parts):
                whole = ctx.place.collect([dy for _, dy in present])
            behind = None
            if whole is not None:
                # Where the gradients have room behind them, q is a part of their product with the weight.
                together, behind = whole.split([len(weight), len(down)], dim=1)
                present = [(slice(None), together)]
            if wants_q and for_B and sum(dy.shape[1] for _, dy in present) == len(weight):
                once = from_both_sides([(dy, up[part]) for part, dy in present], t, ctx.scaling, B_dtype, behind)
                q, dB = (None, None) if once is None else once
            if wants_q and q is None:
                for part, dy in present:
                    q = torch.mm(dy, up[part], out=behind) if q is None else q.addmm_(dy, up[part])
            if q is not None and for_A:
                kept = rows if mask is None else rows * mask * (1 / ctx.keep)
                dA = _mm(q.t(), kept, A_dtype)
            if whole is not None:
                d_rows = whole @ _above(weight, down, ctx.free)
            elif for_x:
                factors: Iterator = ((dy, weight[part].to(dtype)) for part, dy in present)
                if q is not None and mask is not None:
                    d_rows = (q @ down).mul_(mask).mul_(1 / ctx.keep)
                    d_rows = d_rows if d_through is None else d_rows.add_(d_through.reshape(rows.shape))
                elif q is not None:
                    factors = itertools.chain([(q, down)], factors)
                if d_through is not None and d_rows is None:  # which is autograd's own: nothing is added in place to it
                    d_rows = add_products(d_through.reshape(rows.shape), *itertools.islice(factors, 2))
                for d_part, W in factors:
                    d_rows = d_part @ W if d_rows is None else d_rows.addmm_(d_part, W)
            if for_B and dB is None:
                dB = _joined([_mm(dy.t(), t, B_dtype, ctx.scaling) for _, dy in present], len(weight), present)
            if for_weight:
                dW = _joined([_mm(dy.t(), rows, weight_dtype) for _, dy in present], len(weight), present)
            if for_bias:
                db = _joined([dy.sum(0, dtype=bias_dtype) for _, dy in present], len(weight), present)
        dx = None if d_rows is None else d_rows.view_as(x)
        return dx, dW, db, dA, dB, *[None] * 7


def _no_autocast(device: str) -> contextlib.AbstractContextManager:
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else contextlib.nullcontext()


def _parts(sizes: Sequence[int], gradients: Sequence[Tensor | None]) -> list[tuple[slice, Tensor]]:
    """Where each part of the output lies, and its gradient; parts that nothing used are left out."""
    parts, start = [], 0
    for size, dy in zip(sizes, gradients, strict=True):
        if dy is not None:
            parts.append((slice(start, start + size), dy))
        start += size
    return parts


def _joined(blocks: list[Tensor], length: int, present: list[tuple[slice, Tensor]]) -> Tensor | None:
    """The gradient of a weight from those of its rows; zeros for a part of the output that nothing used."""
    if not blocks:
        return None
    if sum(map(len, blocks)) == length:
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    whole = blocks[0].new_zeros(length, *blocks[0].shape[1:])
    for (rows, _), block in zip(present, blocks, strict=True):
        whole[rows] = block
    return whole
