"""`norm.rms_norm` in Triton: one kernel forward, one backward, each program a few rows of one group of channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton.common import Tensor, row_strides

# Rows that a program of the backward goes through where it sums the weight's gradient, which leaves one partial sum a
# program; else each has one.
ROWS_PER_PROGRAM = 16


@triton.jit
def _forward_kernel(
    X,
    W,
    Z,
    Y,
    RSTD,
    stride_x,
    stride_z,
    stride_y,
    eps,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    at = group * N + columns
    x = tl.load(X + row * stride_x + at, mask=mask, other=0.0)
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
    DZ,
    DW,
    stride_dy,
    stride_x,
    stride_z,
    stride_dr,
    stride_dx,
    stride_dz,
    rows,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FOR_WEIGHT: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
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
        tl.store(DX + row * stride_dx + at, dh.to(DX.dtype.element_ty), mask=here)
    if FOR_WEIGHT:
        tl.store(DW + program * (tl.num_programs(1) * N) + at, dw, mask=mask)


def _rows(x: Tensor) -> Tensor:
    """(rows, D) with contiguous channels, without a copy where that is possible."""
    return row_strides(x.reshape(-1, x.shape[-1]))


def _launch(group_size: int) -> dict[str, int]:
    block = triton.next_power_of_2(group_size)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def forward(
    x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, group_size: int, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y, and 1 / root of the mean square of each row and group, (rows, groups) float32."""
    rows = _rows(x)
    gates = rows if gate is None else _rows(gate)
    groups = x.shape[-1] // group_size
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    rstd = torch.empty(len(rows), groups, dtype=torch.float32, device=x.device)
    if not len(rows):
        return y, rstd
    with torch.cuda.device_of(x):
        _forward_kernel[(len(rows), groups)](
            rows,
            weight,
            gates,
            y,
            rstd,
            rows.stride(0),
            gates.stride(0),
            x.shape[-1],
            eps,
            N=group_size,
            GATED=gate is not None,
            **_launch(group_size),
        )
    return y, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    rstd: Tensor,
    group_size: int,
    d_residual: Tensor | None,
    for_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x (that of the residual added), of the weight if asked for, and of the gate if there is one."""
    rows, d_rows = _rows(x), _rows(dy)
    gates = rows if gate is None else _rows(gate)
    residual = d_rows if d_residual is None else _rows(d_residual)
    groups = x.shape[-1] // group_size
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_gate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    each = ROWS_PER_PROGRAM if for_weight else 1
    programs = triton.cdiv(len(rows), each)
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
            dx if d_gate is None else d_gate,
            partial,
            d_rows.stride(0),
            rows.stride(0),
            gates.stride(0),
            residual.stride(0),
            x.shape[-1],
            x.shape[-1],
            len(rows),
            N=group_size,
            ROWS=each,
            GATED=gate is not None,
            RESIDUAL=d_residual is not None,
            FOR_WEIGHT=for_weight,
            **_launch(group_size),
        )
    return dx, partial.sum(0).to(weight.dtype) if for_weight else None, d_gate
