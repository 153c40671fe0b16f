"""`norm.rms_norm` in Triton: one kernel forward, one backward, each program a few rows of one group of channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .room import Place, new_gradient, with_room
from .triton.common import Tensor, cdiv, next_power_of_2, row_strides

# Rows that a program of the backward goes through where it sums the weight's gradient, which leaves one partial sum a
# program; else each has one.
ROWS_PER_PROGRAM = 16


@triton.jit
def _forward_kernel(
    X,
    ADDED,
    W,
    Z,
    Y,
    SUM,  # of X's dtype
    RSTD,
    stride_x,
    stride_added,
    stride_z,
    stride_y,
    stride_sum,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    ADDS: tl.constexpr,
    GATED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    columns = tl.max_contiguous(tl.arange(0, BLOCK), RUN)
    mask = columns < N
    at = group * N + columns
    x = tl.load(X + row * stride_x + at, mask=mask, other=0.0)
    if ADDS:
        added = tl.load(ADDED + row * stride_added + at, mask=mask, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + added).to(X.dtype.element_ty)
        tl.store(SUM + row * stride_sum + at, x, mask=mask)
    h = x.to(tl.float32)
    if GATED:
        z = tl.load(Z + row * stride_z + at, mask=mask, other=0.0).to(tl.float32)
        h = h * z * tl.sigmoid(z)
    rstd = 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / N + eps)
    tl.store(RSTD + row * tl.num_programs(1) + group, rstd)
    w = tl.load(W + at, mask=mask, other=0.0).to(tl.float32)
    normed = (h * rstd).to(X.dtype.element_ty).to(tl.float32)
    tl.store(Y + row * stride_y + at, (w * normed).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    DY,
    X,
    W,
    Z,
    RSTD,
    DR,
    DX,
    DA,  # DX in another dtype
    DZ,
    DW,
    stride_dy,
    stride_x,
    stride_z,
    stride_dr,
    stride_dx,
    stride_da,
    stride_dz,
    rows,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FOR_ADDED: tl.constexpr,
    FOR_WEIGHT: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    columns = tl.max_contiguous(tl.arange(0, BLOCK), RUN)
    mask = columns < N
    at = group * N + columns
    w = tl.load(W + at, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        here = mask & (row < rows)
        dy = tl.load(DY + row * stride_dy + at, mask=here, other=0.0).to(tl.float32)
        x = tl.load(X + row * stride_x + at, mask=here, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + row * tl.num_programs(1) + group, mask=row < rows, other=0.0)
        h = x
        if GATED:
            z = tl.load(Z + row * stride_z + at, mask=here, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(z)
            h = x * z * sigmoid
        normed = h * rstd
        g = dy * w
        dh = (g - normed * (tl.sum(g * normed, axis=0) / N)) * rstd
        if FOR_WEIGHT:
            dw += dy * normed.to(X.dtype.element_ty).to(tl.float32)
        if GATED:
            dz = dh * x * sigmoid * (1.0 + z * (1.0 - sigmoid))
            tl.store(DZ + row * stride_dz + at, dz.to(DZ.dtype.element_ty), mask=here)
            dh = dh * z * sigmoid
        if RESIDUAL:
            dh += tl.load(DR + row * stride_dr + at, mask=here, other=0.0).to(tl.float32)
        dx = dh.to(DX.dtype.element_ty)
        tl.store(DX + row * stride_dx + at, dx, mask=here)
        if FOR_ADDED:
            tl.store(DA + row * stride_da + at, dx.to(DA.dtype.element_ty), mask=here)
    if FOR_WEIGHT:
        tl.store(DW + program * (tl.num_programs(1) * N) + at, dw, mask=mask)


def _rows(x: Tensor) -> Tensor:
    """(rows, D) with contiguous channels, without a copy where that is possible."""
    return row_strides(x.reshape(-1, x.shape[-1]))


def _launch(group_size: int, *tensors: Tensor | None) -> dict[str, int]:
    """How a kernel that loads rows of these tensors is launched."""
    block = next_power_of_2(group_size)
    # A lane has as many neighbours as one load of the widest dtype brings. With more, as the narrowest would have it,
    # loads of the widest leave out every other half of a sector, and its stores go through shared memory.
    run = 16 // max(each.element_size() for each in tensors if each is not None)
    return {"BLOCK": block, "RUN": run, "num_warps": min(max(block // 512, 1), 16)}


def forward(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    gate: Tensor | None,
    eps: float,
    group_size: int,
    out_dtype: torch.dtype,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, 1 / root of the mean square of each row and group, (rows, groups) float32, and x + added or, without, x.

    Args:
        added: of x's shape, its dtype no wider than x's.
        columns: that are left free behind each row of y.
    """
    rows = _rows(x)
    gates = rows if gate is None else _rows(gate)
    addends = rows if added is None else _rows(added)
    groups = x.shape[-1] // group_size
    y = with_room(x.shape, columns, out_dtype, x.device)
    total = x if added is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(len(rows), groups, dtype=torch.float32, device=x.device)
    if not len(rows):
        return y, rstd, total
    with torch.cuda.device_of(x):
        _forward_kernel[(len(rows), groups)](
            rows,
            addends,
            weight,
            gates,
            y,
            total,
            rstd,
            rows.stride(0),
            addends.stride(0),
            gates.stride(0),
            x.shape[-1] + columns,
            x.shape[-1],
            eps,
            N=group_size,
            ADDS=added is not None,
            GATED=gate is not None,
            **_launch(group_size, x, added, gate, y),
        )
    return y, rstd, total


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    rstd: Tensor,
    group_size: int,
    d_residual: Tensor | None,
    for_weight: bool,
    added: torch.dtype | None,
    place_added: Place | None = None,
    place_gate: Place | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (that of the residual added), of `added`, of the weight if asked for, and of a gate.

    Args:
        x: the sum, where there is one.
        added: dtype of what was added to it; None: nothing was, or it gets no gradient.
        place_added, place_gate: of these gradients, see `room`; None: none.
    """
    rows, d_rows = _rows(x), _rows(dy)
    gates = rows if gate is None else _rows(gate)
    residual = d_rows if d_residual is None else _rows(d_residual)
    groups = x.shape[-1] // group_size
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_added = None if added is None else dx if added == x.dtype else new_gradient(place_added, x, added)
    d_gate = None if gate is None else new_gradient(place_gate, gate)
    of_added, of_gate = (dx if each is None else each for each in (d_added, d_gate))
    each = ROWS_PER_PROGRAM if for_weight else 1
    programs = cdiv(len(rows), each)
    partial = torch.zeros(max(programs, 1) if for_weight else 0, x.shape[-1], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _backward_kernel[(max(programs, 1), groups)](
            d_rows,
            rows,
            weight,
            gates,
            rstd,
            residual,
            dx,
            of_added,
            of_gate,
            partial,
            d_rows.stride(0),
            rows.stride(0),
            gates.stride(0),
            residual.stride(0),
            x.shape[-1],
            _rows(of_added).stride(0),
            _rows(of_gate).stride(0),
            len(rows),
            N=group_size,
            ROWS=each,
            GATED=gate is not None,
            RESIDUAL=d_residual is not None,
            FOR_ADDED=d_added is not None and d_added is not dx,
            FOR_WEIGHT=for_weight,
            **_launch(group_size, dy, x, gate, d_residual),
        )
    return dx, d_added, partial.sum(0).to(weight.dtype) if for_weight else None, d_gate
