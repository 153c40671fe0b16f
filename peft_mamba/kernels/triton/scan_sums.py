"""Gradients of B and C from what the programs of the selective scan leave of them: summed and rounded in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import Tensor, cdiv

# Tokens of a program, and numbers that it loads at once.
TOKENS, NUMBERS = 2, 1024


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _sum_shares(
    shares, dB, dC, tokens, blocks, STATES: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, BLOCKS: tl.constexpr
):
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, 2 * N)
    row = (t.to(tl.int64) * blocks)[:, None, None]
    sums = tl.zeros([TOKENS, BLOCKS, 2 * N], tl.float32)
    for first in range(0, blocks, BLOCKS):
        b = first + tl.arange(0, BLOCKS)
        at = shares + (row + b[None, :, None]) * (2 * N) + column[None, None, :]
        sums += tl.load(at, mask=(t < tokens)[:, None, None] & (b < blocks)[None, :, None], other=0.0)
    total = tl.sum(sums, 1)
    state = column % N
    inside = (t < tokens)[:, None] & (state < STATES)[None, :]
    at = t.to(tl.int64)[:, None] * STATES + state[None, :]
    tl.store(dB + at, total.to(dB.dtype.element_ty), mask=inside & (column < N)[None, :])
    tl.store(dC + at, total.to(dC.dtype.element_ty), mask=inside & (column >= N)[None, :])


def sum_shares(shares: Tensor, states: int, dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor]:
    """dB and dC (T, states), in these dtypes, from (T, programs, 2, N) in float32: always in the same order."""
    tokens, blocks, _, N = shares.shape
    dB, dC = (shares.new_empty(tokens, states, dtype=dtype) for dtype in dtypes)
    if dB.numel():
        _sum_shares[(cdiv(tokens, TOKENS),)](
            *(shares, dB, dC, tokens, blocks),
            STATES=states,
            N=N,
            TOKENS=TOKENS,
            BLOCKS=max(1, NUMBERS // (TOKENS * 2 * N)),
        )
    return dB, dC
