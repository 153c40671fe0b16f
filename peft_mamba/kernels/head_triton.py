"""`head` in Triton: a program scores one token, and then writes the gradient over its logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton.common import Tensor
from .triton.elementwise import LN2, LOG2E

# Logits that a program takes at once: so many for each of so many columns, which have sums and maxima of their own.
TILE = {"ROWS": 4, "COLUMNS": 1024, "num_warps": 8}
# Below any logit, and finite.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _fold(
    z, v, target, rate, highest, total, weighted, before, ENTROPY: tl.constexpr, TOP1: tl.constexpr
):  # fmt: skip
    """Take logits into the sums of their columns; `before` is the highest in front of the target."""
    new = tl.maximum(highest, tl.max(z, axis=0))
    e = tl.exp2((z - new[None, :]) * rate)
    fade = tl.exp2((highest - new) * rate)
    total = total * fade + tl.sum(e, axis=0)
    if ENTROPY:
        weighted = weighted * fade + tl.sum(e * z, axis=0)
    if TOP1:
        before = tl.maximum(before, tl.max(tl.where(v < target, z, LOWEST), axis=0))
    return new, total, weighted, before


@triton.jit
def _by_logits(z, log_total, spread, rate, factor, OF_ENTROPY: tl.constexpr):
    """The gradient of the score of another token than the target, times `factor`."""
    log_p = z * rate - log_total
    by = tl.exp2(log_p) * -factor
    if OF_ENTROPY:
        by *= log_p * LN2 + spread
    return by


@triton.jit(do_not_specialize=["rate", "scale"])
def _score_kernel(
    logits,
    targets,
    log_probs,
    entropy,
    is_top1,
    stride,
    columns,
    rate,
    scale,
    HAS_ENTROPY: tl.constexpr,
    HAS_TOP1: tl.constexpr,
    OF_LOG_PROBS: tl.constexpr,
    OF_ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    counts = target >= 0
    tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    whole = columns // (ROWS * COLUMNS) * (ROWS * COLUMNS)
    rest = whole + tile
    inside = rest < columns
    rate2 = rate * LOG2E  # logarithms are to base 2
    highest = tl.full([COLUMNS], LOWEST, tl.float32)
    before = tl.full([COLUMNS], LOWEST, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    weighted = tl.zeros([COLUMNS], tl.float32)
    if counts:
        for first in range(0, whole, ROWS * COLUMNS):
            z = tl.load(logits + first + tile).to(tl.float32)
            highest, total, weighted, before = _fold(
                z, first + tile, target, rate2, highest, total, weighted, before, HAS_ENTROPY or OF_ENTROPY, HAS_TOP1
            )
        z = tl.where(inside, tl.load(logits + rest, mask=inside, other=0.0).to(tl.float32), LOWEST)
        highest, total, weighted, before = _fold(
            z, rest, target, rate2, highest, total, weighted, before, HAS_ENTROPY or OF_ENTROPY, HAS_TOP1
        )
        mode = tl.max(highest, axis=0)
        share = tl.exp2((highest - mode) * rate2)
        sum_exp = tl.sum(total * share, axis=0)
        log_total = mode * rate2 + tl.log2(sum_exp)
        of_target = tl.load(logits + target).to(tl.float32)
        log_p = of_target * rate2 - log_total
        tl.store(log_probs + row, log_p * LN2)
        spread = 0.0
        if HAS_ENTROPY or OF_ENTROPY:
            spread = (log_total - tl.sum(weighted * share, axis=0) / sum_exp * rate2) * LN2
        if HAS_ENTROPY:
            tl.store(entropy + row, spread)
        if HAS_TOP1:
            tl.store(is_top1 + row, (of_target >= mode) & (of_target > tl.max(before, axis=0)))
        if OF_LOG_PROBS or OF_ENTROPY:
            factor = rate * scale
            tl.debug_barrier()  # all have read the target's logit
            for first in range(0, whole, ROWS * COLUMNS):
                z = tl.load(logits + first + tile).to(tl.float32)
                by = _by_logits(z, log_total, spread, rate2, factor, OF_ENTROPY)
                tl.store(logits + first + tile, by.to(logits.dtype.element_ty))
            z = tl.load(logits + rest, mask=inside, other=0.0).to(tl.float32)
            by = _by_logits(z, log_total, spread, rate2, factor, OF_ENTROPY)
            tl.store(logits + rest, by.to(logits.dtype.element_ty), mask=inside)
            if OF_LOG_PROBS:
                tl.debug_barrier()  # the target's is written last
                tl.store(logits + target, ((1.0 - tl.exp2(log_p)) * factor).to(logits.dtype.element_ty))
    else:
        tl.store(log_probs + row, 0.0)
        if HAS_ENTROPY:
            tl.store(entropy + row, 0.0)
        if HAS_TOP1:
            tl.store(is_top1 + row, False)
        if OF_LOG_PROBS or OF_ENTROPY:
            nothing = tl.zeros([ROWS, COLUMNS], logits.dtype.element_ty)
            for first in range(0, whole, ROWS * COLUMNS):
                tl.store(logits + first + tile, nothing)
            tl.store(logits + rest, nothing, mask=inside)


def score(
    logits: Tensor,
    targets: Tensor,
    rate: float,
    scale: float,
    scores: tuple[Tensor, Tensor | None, Tensor | None],
    gradient: str | None,
) -> None:
    """`head._in_pytorch` as one kernel."""
    log_probs, entropy, is_top1 = scores
    with torch.cuda.device_of(logits):
        _score_kernel[(len(logits),)](
            *(logits, targets, log_probs),
            log_probs if entropy is None else entropy,
            log_probs if is_top1 is None else is_top1.view(torch.int8),
            *(logits.stride(0), logits.shape[1], rate, scale),
            HAS_ENTROPY=entropy is not None,
            HAS_TOP1=is_top1 is not None,
            OF_LOG_PROBS=gradient == "log_probs",
            OF_ENTROPY=gradient == "entropy",
            **TILE,
        )
