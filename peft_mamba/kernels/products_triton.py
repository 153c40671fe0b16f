"""`products` in Triton: a program makes a tile of the result, with all terms of its sums at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton.common import Tensor, interpreted, row_strides

# Two programs fit a processor of an H100, so that one loads while the other stores.
TILE = {"ROWS": 128, "COLUMNS": 128, "num_warps": 8, "num_stages": 2}
# The most terms that a step of a product takes.
TERMS = 64


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


def _terms(K: int) -> int:
    return max(16, min(TERMS, triton.next_power_of_2(K)))


def add_products(addend: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """`products.add_products` for tensors in half precision."""
    rows, columns = addend.shape
    y = torch.empty(rows, columns, dtype=addend.dtype, device=addend.device)
    if not y.numel():
        return y
    addend = row_strides(addend)
    (a, b), (c, d) = (tuple(map(row_strides, pair)) for pair in (pairs[0], pairs[-1]))
    second = c.shape[1] if len(pairs) > 1 else 0
    grid = triton.cdiv(columns, TILE["COLUMNS"]), triton.cdiv(rows, TILE["ROWS"])
    with torch.cuda.device_of(addend):
        _add_products_kernel[grid](
            *(addend, a, b, c, d, y, rows, columns),
            *(each.stride(0) for each in (addend, a, b, c, d)),
            K=a.shape[1],
            K_SECOND=second,
            TERMS=_terms(a.shape[1]),
            TERMS_SECOND=_terms(second),
            # The interpreter multiplies bfloat16's bits as if they were integers.
            DOT=tl.float32 if interpreted() else {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[addend.dtype],
            **TILE,
        )
    return y
