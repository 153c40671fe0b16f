"""Log-probabilities of tokens under an output head that is not trained, with the gradient made in the same pass.

    log p_t = z_t[y_t] - log Σ_v exp(z_t[v]),  z_t = W h_t / temperature
    ∂ log p_t / ∂ h_t = Σ_v (1[v = y_t] - p_t[v]) W[v] / temperature

Of a token, the loss's gradient is that vector times a number. So where W gets no gradient, all that backward needs of
the logits can be made while they are there, and they are made once: what keeps them for no longer, and makes them
again in backward, multiplies three times by W instead of twice. A chunk of tokens' logits is held at a time.

Statistics in float32 (float64 for float64 inputs). On a GPU with Triton they and the gradient of the logits are one
kernel, on other devices PyTorch alone; PEFT_MAMBA_KERNELS=torch or reference forces the latter.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import fused
from .products import mm_in_float32
from .reference import Tensor, accumulator_dtype

KERNELS = "head_triton"
# Of labels: nothing is predicted there.
IGNORED = -100
# What there is for each token besides its log-probability.
OUTPUTS = ("entropy", "is_top1")
# Of logits that are held at once; on a CPU with a few tensors as large, in float32.
CHUNK_BYTES, CPU_CHUNK_BYTES = 2**28, 2**25
# The logits' gradients in float16, of which most are below its normal range.
HALF_SCALE = 2.0**10
# With fewer tokens to predict than this share, theirs are gathered.
WORTH_GATHERING = 7 / 8


class TokenScores(NamedTuple):
    """(N,) each, 0 for ignored targets; None: not asked for."""

    log_probs: Tensor
    entropy: Tensor | None
    is_top1: Tensor | None


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = (),
    count: int | None = None,
) -> TokenScores:
    """log p(target) of each token, in float32; on request the entropy, and whether target is the distribution's mode.

    Of equal logits the first one is the mode. Products are made in the dtype of autocast, if that is on.

    Args:
        hidden: (N, H), what the head reads.
        weight: (V, H), which gets no gradient.
        targets: (N,) int64, 0 … V-1 or -100.
        temperature: that logits are divided by.
        outputs: "entropy", "is_top1" or both.
        count: how many targets are not -100, if known: where they are few, the others take no time.

    Raises:
        ValueError: weight requires a gradient.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight requires a gradient, and there is none for it here. Use TRL's add_fused_lm_head.")
    rows = None
    if count is not None and count < WORTH_GATHERING * len(targets):
        rows = torch.argsort(targets == IGNORED, stable=True)[:count]
    return TokenScores(*_Scores.apply(hidden, weight, targets, temperature, outputs, rows))


class _How(NamedTuple):
    """The dtype of products, what logits are divided by, and which tokens to score; None: all."""

    dtype: torch.dtype
    temperature: float
    rows: Tensor | None


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, outputs, rows):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.how = _How(dtype, temperature, rows)
        made, gradient = _score(
            *(hidden, weight, targets, ctx.how, outputs), "log_probs" if ctx.needs_input_grad[0] else None
        )
        ctx.save_for_backward(gradient, *((hidden, weight, targets) if "entropy" in outputs else ()))
        ctx.count = len(hidden)
        ctx.set_materialize_grads(False)
        return tuple(None if each is None else _spread(each, rows, len(targets)) for each in made)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_log_probs, d_entropy, _):  # type: ignore[override]  # mypy sees the decorator, not the method
        gradient, *given = ctx.saved_tensors
        total = None
        if d_log_probs is not None:
            total = _times(gradient, d_log_probs, ctx.how.rows)
        if d_entropy is not None:
            hidden, weight, targets = given
            _, of_entropy = _score(hidden, weight, targets, ctx.how, (), "entropy")
            part = _times(of_entropy, d_entropy, ctx.how.rows)
            total = part if total is None else total.add_(part)
        d_hidden = None if total is None else _spread(total, ctx.how.rows, ctx.count)
        return d_hidden, None, None, None, None, None


def _times(gradient: Tensor, by: Tensor, rows: Tensor | None) -> Tensor:
    return gradient * (by if rows is None else by.index_select(0, rows))[:, None]


def _spread(values: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """Values of `rows` among zeros; of all rows if there are none."""
    if rows is None:
        return values
    return values.new_zeros(count, *values.shape[1:]).index_copy_(0, rows, values)


def _score(
    hidden: Tensor, weight: Tensor, targets: Tensor, how: _How, outputs: tuple[str, ...], gradient: str | None
) -> tuple[TokenScores, Any]:
    """(n,) each of the n tokens to score, and (n, H) each token's gradient of the score so named, if any."""
    dtype = how.dtype
    autocast = torch.is_autocast_enabled(hidden.device.type)
    with torch.autocast(hidden.device.type, enabled=False) if autocast else contextlib.nullcontext():
        if how.rows is not None:
            hidden, targets = hidden.index_select(0, how.rows), targets.index_select(0, how.rows)
        inputs, W = hidden.to(dtype), weight.to(dtype)
        count, size = len(inputs), len(W)
        log_probs = torch.empty(count, dtype=accumulator_dtype(inputs), device=hidden.device)
        scores = TokenScores(
            log_probs,
            torch.empty_like(log_probs) if "entropy" in outputs else None,
            torch.empty_like(log_probs, dtype=torch.bool) if "is_top1" in outputs else None,
        )
        made = None if gradient is None else log_probs.new_empty(hidden.shape)
        scale = HALF_SCALE if dtype == torch.float16 else 1.0
        kernels = fused.for_tensor(KERNELS, inputs)
        run = _in_pytorch if kernels is None else kernels.score
        chunk = _chunk(count, size * dtype.itemsize, CPU_CHUNK_BYTES if hidden.device.type == "cpu" else CHUNK_BYTES)
        # Rows at multiples of 16 bytes, which products need to be fast.
        held = inputs.new_empty(min(chunk, count), -(-size // 8) * 8)[:, :size]
        for first in range(0, count, chunk):
            here = slice(first, first + chunk)
            x = inputs[here]
            logits = torch.mm(x, W.t(), out=held[: len(x)])
            of_chunk = TokenScores._make(None if each is None else each[here] for each in scores)
            run(logits, targets[here], 1 / how.temperature, scale, of_chunk, gradient)
            if made is not None:
                mm_in_float32(logits, W, out=made[here])
        if made is not None and scale != 1.0:
            made.mul_(1 / scale)
    return scores, made


def _chunk(tokens: int, bytes_each: int, limit: int) -> int:
    """Of how many tokens logits are held: parts of about one size, of whole tiles of a product."""
    parts = max(1, -(-tokens * bytes_each // limit))
    return max(1, min(tokens, -(-tokens // (parts * 128)) * 128))


def _in_pytorch(
    logits: Tensor, targets: Tensor, rate: float, scale: float, scores: TokenScores, gradient: str | None
) -> None:
    """Writes the scores of a chunk, and over `logits` `scale` times the gradient of one of them by the logits."""
    z = logits.to(scores.log_probs.dtype) * rate
    ignored = targets == IGNORED
    targets = targets.clamp(min=0)[:, None]
    if scores.is_top1 is not None:
        torch.logical_and(z.argmax(-1) == targets[:, 0], ~ignored, out=scores.is_top1)
    log_p = z.sub_(z.logsumexp(-1, keepdim=True))
    scores.log_probs.copy_(log_p.gather(-1, targets)[:, 0].masked_fill_(ignored, 0.0))
    if scores.entropy is None and gradient is None:
        return
    p = log_p.exp()
    if scores.entropy is not None:
        scores.entropy.copy_((p * log_p).sum(-1).neg_().masked_fill_(ignored, 0.0))
    if gradient is None:
        return
    if gradient == "entropy":
        by_logits = p.mul_(log_p.sub_((p * log_p).sum(-1, keepdim=True)))
    else:
        by_logits = p.scatter_add_(-1, targets, p.new_full(targets.shape, -1.0))
    logits.copy_(by_logits.mul_(-rate * scale).masked_fill_(ignored[:, None], 0.0))
