"""`products` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton.common import Tensor, cdiv, interpreted, next_power_of_2, row_strides

# Several programs fit a processor of an H100, so that one loads while others store.
TILE = {"ROWS": 64, "COLUMNS": 128, "num_warps": 4, "num_stages": 3}
CAST = {"SIZE": 1024, "num_warps": 4}
# The most terms that a step of a product takes.
TERMS = 32
# A program of `from_both_sides` goes through so many rows of one block of columns, a tile at a time, and leaves sums
# for each of its rows and columns, which another kernel adds up: atomic sums would come out different every time.
ROWS_PER_PROGRAM = 1024
BLOCK = {"ROWS": 64, "COLUMNS": 256, "num_warps": 4, "num_stages": 4}
SUM = {"SUMS": 256, "AT_ONCE": 8, "num_warps": 4}


@triton.jit
def _multiplied(sums, a, b, i, j, in_rows, in_columns, a_row, b_row, K: tl.constexpr, TERMS: tl.constexpr, DOT):
    for start in range(0, K, TERMS):
        k = start + tl.arange(0, TERMS)
        left = tl.load(a + i[:, None] * a_row + k[None, :], mask=in_rows[:, None] & (k < K)[None, :], other=0.0)
        right = tl.load(b + k[:, None] * b_row + j[None, :], mask=(k < K)[:, None] & in_columns[None, :], other=0.0)
        sums = tl.dot(left.to(DOT), right.to(DOT), sums)
    return sums


@triton.jit(do_not_specialize=["rows"])
def _add_products_kernel(
    addend,
    a,
    b,
    c,
    d,
    y,
    rows,
    columns,
    addend_row,
    a_row,
    b_row,
    c_row,
    d_row,
    K: tl.constexpr,
    K_SECOND: tl.constexpr,  # 0: there is no second product
    TERMS: tl.constexpr,
    TERMS_SECOND: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first = tl.program_id(1).to(tl.int64) * ROWS
    i = tl.arange(0, ROWS)
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = first + i < rows, j < columns
    inside = in_rows[:, None] & in_columns[None, :]
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    sums = _multiplied(sums, a + first * a_row, b, i, j, in_rows, in_columns, a_row, b_row, K, TERMS, DOT)
    if K_SECOND > 0:
        c += first * c_row
        sums = _multiplied(sums, c, d, i, j, in_rows, in_columns, c_row, d_row, K_SECOND, TERMS_SECOND, DOT)
    added = tl.load(addend + first * addend_row + i[:, None] * addend_row + j[None, :], mask=inside, other=0.0)
    sums += added.to(tl.float32)
    tl.store(y + first * columns + i[:, None] * columns + j[None, :], sums.to(y.dtype.element_ty), mask=inside)


def _dot(dtype: torch.dtype) -> tl.dtype:
    """What the factors are multiplied in: the interpreter multiplies bfloat16's bits as if they were integers."""
    return tl.float32 if interpreted() else {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def _terms(K: int) -> int:
    return max(16, min(TERMS, next_power_of_2(K)))


def add_products(addend: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """`products.add_products` for tensors in half precision."""
    rows, columns = addend.shape
    y = torch.empty(rows, columns, dtype=addend.dtype, device=addend.device)
    if not y.numel():
        return y
    addend = row_strides(addend)
    (a, b), (c, d) = (tuple(map(row_strides, pair)) for pair in (pairs[0], pairs[-1]))
    second = c.shape[1] if len(pairs) > 1 else 0
    grid = cdiv(columns, TILE["COLUMNS"]), cdiv(rows, TILE["ROWS"])
    with torch.cuda.device_of(addend):
        _add_products_kernel[grid](
            *(addend, a, b, c, d, y, rows, columns),
            *(each.stride(0) for each in (addend, a, b, c, d)),
            K=a.shape[1],
            K_SECOND=second,
            TERMS=_terms(a.shape[1]),
            TERMS_SECOND=_terms(second),
            DOT=_dot(addend.dtype),
            **TILE,
        )
    return y


@triton.jit(do_not_specialize=["down_size", "scaling"])
def _cast_adapter_kernel(
    A,
    B,
    down,
    up,
    behind,
    down_size,
    up_size,
    scaling,
    behind_row,
    RANK: tl.constexpr,
    BEHIND: tl.constexpr,
    SIZE: tl.constexpr,
):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    of_down, of_up = at < down_size, (at >= down_size) & (at < down_size + up_size)
    a = tl.load(A + at, mask=of_down, other=0.0)
    tl.store(down + at, a.to(down.dtype.element_ty), mask=of_down)
    at -= down_size
    b = (tl.load(B + at, mask=of_up, other=0.0) * scaling).to(up.dtype.element_ty)
    tl.store(up + at, b, mask=of_up)
    if BEHIND:
        tl.store(behind + (at // RANK).to(tl.int64) * behind_row + at % RANK, b, mask=of_up)


def cast_adapter(
    A: Tensor, B: Tensor, scaling: float, dtype: torch.dtype, down: Tensor | None, behind: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`products.cast_adapter` for contiguous A and B in float32."""
    down, up = torch.empty_like(A, dtype=dtype) if down is None else down, torch.empty_like(B, dtype=dtype)
    with torch.cuda.device_of(A):
        _cast_adapter_kernel[(cdiv(A.numel() + B.numel(), CAST["SIZE"]),)](
            *(A, B, down, up, up if behind is None else behind, A.numel(), B.numel(), float(scaling)),
            0 if behind is None else behind.stride(0),
            RANK=len(A),
            BEHIND=behind is not None,
            **CAST,
        )
    return down, up


@triton.jit(do_not_specialize=["rows"])
def _from_both_sides_kernel(
    g,
    up,
    t,
    left,
    right,
    rows,
    columns,
    total,
    g_row,
    up_row,
    t_row,
    RANK: tl.constexpr,
    R: tl.constexpr,
    DOT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
):
    block, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    j, k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, R)
    in_columns, in_rank = j < columns, k < RANK
    begin = group * PER_PROGRAM
    g += begin * g_row
    t += begin * t_row
    left += (block * rows + begin) * RANK
    lifts = tl.load(up + j[:, None] * up_row + k[None, :], mask=in_columns[:, None] & in_rank[None, :], other=0.0)
    sums = tl.zeros([COLUMNS, R], tl.float32)
    for first in range(0, PER_PROGRAM, ROWS):
        i = first + tl.arange(0, ROWS)
        in_rows = begin + i < rows
        tile = tl.load(g + i[:, None] * g_row + j[None, :], mask=in_rows[:, None] & in_columns[None, :], other=0.0)
        low = tl.load(t + i[:, None] * t_row + k[None, :], mask=in_rows[:, None] & in_rank[None, :], other=0.0)
        tile, low = tile.to(DOT), low.to(DOT)
        of_rows = tl.dot(tile, lifts.to(DOT))
        tl.store(left + i[:, None] * RANK + k[None, :], of_rows, mask=in_rows[:, None] & in_rank[None, :])
        sums = tl.dot(tl.trans(tile), low, sums)
    at = (group * total + j[:, None]) * RANK + k[None, :]
    tl.store(right + at, sums, mask=in_columns[:, None] & in_rank[None, :])


@triton.jit
def _sum(
    partial, y, y_row, program, size, count, scaling, RANK: tl.constexpr, SUMS: tl.constexpr, AT_ONCE: tl.constexpr
):
    at = program * SUMS + tl.arange(0, SUMS)
    total = tl.zeros([SUMS], tl.float32)
    for first in range(0, count, AT_ONCE):
        n = first + tl.arange(0, AT_ONCE)
        mask = (n < count)[:, None] & (at < size)[None, :]
        total += tl.sum(tl.load(partial + n.to(tl.int64)[:, None] * size + at[None, :], mask=mask, other=0.0), axis=0)
    place = (at // RANK).to(tl.int64) * y_row + at % RANK
    tl.store(y + place, (total * scaling).to(y.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["left_size", "right_size", "left_count", "right_count", "scaling", "programs"])
def _sums_kernel(
    left,
    right,
    q,
    d,
    left_size,
    right_size,
    left_count,
    right_count,
    scaling,
    programs,
    q_row,
    RANK: tl.constexpr,
    SUMS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    program = tl.program_id(0)
    if program < programs:
        _sum(left, q, q_row, program, left_size, left_count, 1.0, RANK, SUMS, AT_ONCE)
    else:
        _sum(right, d, RANK, program - programs, right_size, right_count, scaling, RANK, SUMS, AT_ONCE)


def from_both_sides(
    parts: list[tuple[Tensor, Tensor]], t: Tensor, scaling: float, dtype: torch.dtype, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`products.from_both_sides` for tensors in half precision."""
    rows, rank = t.shape
    t = row_strides(t)
    total = sum(g.shape[1] for g, _ in parts)
    blocks = [cdiv(g.shape[1], BLOCK["COLUMNS"]) for g, _ in parts]
    groups = cdiv(rows, ROWS_PER_PROGRAM)
    left = torch.empty(sum(blocks), rows, rank, dtype=torch.float32, device=t.device)
    right = torch.empty(groups, total, rank, dtype=torch.float32, device=t.device)
    q = torch.empty(rows, rank, dtype=t.dtype, device=t.device) if out is None else out
    d = torch.empty(total, rank, dtype=dtype, device=t.device)
    block = column = 0
    with torch.cuda.device_of(t):
        for (g, up), count in zip(parts, blocks, strict=True):
            g, up = row_strides(g), row_strides(up)
            _from_both_sides_kernel[(count, groups)](
                *(g, up, t, left[block:], right[:, column:], rows, g.shape[1], total),
                *(g.stride(0), up.stride(0), t.stride(0)),
                RANK=rank,
                R=max(16, next_power_of_2(rank)),
                DOT=_dot(t.dtype),
                PER_PROGRAM=ROWS_PER_PROGRAM,
                **BLOCK,
            )
            block, column = block + count, column + g.shape[1]
        programs = cdiv(q.numel(), SUM["SUMS"])
        _sums_kernel[(programs + cdiv(d.numel(), SUM["SUMS"]),)](
            *(left, right, q, d, q.numel(), d.numel(), len(left), groups, float(scaling), programs),
            q.stride(0),
            RANK=rank,
            **SUM,
        )
    return q, d
