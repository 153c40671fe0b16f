"""The causal depthwise convolution in PyTorch alone: one shifted product a tap, added in place.

Channel-last, so that each product runs along vectors and no transpose or padded copy surrounds it, which on a CPU is
faster than oneDNN's convolution. Backward keeps the input and computes what went into the activation again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .reference import accumulator_dtype, check_packed

Tensor = torch.Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`reference.causal_conv1d`, tap by tap. First derivatives only."""
    if activation not in ("silu", None):
        raise ValueError(f"activation is 'silu' or None, not {activation!r}")
    if cu_seqlens is not None:
        check_packed(x, cu_seqlens, initial_state, seq_idx=seq_idx)
        inputs, tokens = _with_earlier_inputs(x[0], initial_state, weight.shape[1] - 1, cu_seqlens)
        return causal_conv1d(inputs[None], weight, bias, activation=activation)[:, tokens]
    return _Convolution.apply(x, weight, bias, initial_state, activation, seq_idx)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, before, activation, seq_idx):
        ctx.save_for_backward(x, weight, bias, before, seq_idx)
        ctx.activation = activation
        y = _products(x, weight, bias, before, seq_idx)
        return (F.silu(y, inplace=True) if activation == "silu" else y).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]  # mypy sees the decorator, not the method
        x, weight, bias, before, seq_idx = ctx.saved_tensors
        dtype, (batch, length, channels), width = accumulator_dtype(x), x.shape, weight.shape[1]
        dy, inputs, taps = dy.to(dtype), x.to(dtype), weight.to(dtype).t().contiguous()
        if ctx.activation == "silu":
            dy = torch.ops.aten.silu_backward(dy, _products(x, weight, bias, before, seq_idx))
        dx = dy * taps[-1]
        d_taps = torch.zeros_like(taps)
        d_before = dx.new_zeros(batch, width - 1, channels)
        for back in range(width):
            d_here = dy[:, back:]
            if back:
                d_here = _zero(d_here, None if seq_idx is None else _crosses(seq_idx, back))
                dx[:, : max(0, length - back)].addcmul_(d_here, taps[-1 - back])
            if ctx.needs_input_grad[1]:
                d_taps[-1 - back] = (d_here * inputs[:, : max(0, length - back)]).sum((0, 1))
            if back and before is not None:
                reach = min(back, length)
                d_there = _zero(dy[:, :reach], None if seq_idx is None else _left_first(seq_idx, reach))
                earlier = slice(width - 1 - back, width - 1 - back + reach)
                d_before[:, earlier].addcmul_(d_there, taps[-1 - back])
                if ctx.needs_input_grad[1]:
                    d_taps[-1 - back] += (d_there * before[:, earlier].to(dtype)).sum((0, 1))
        return (
            dx.to(x.dtype),
            d_taps.t().to(weight.dtype),
            None if bias is None else dy.sum((0, 1)).to(bias.dtype),
            None if before is None else d_before.to(before.dtype),
            None,
            None,
        )


def _with_earlier_inputs(x: Tensor, before: Tensor | None, reach: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """x (L, D) with each sequence's `reach` earlier inputs (zero where None) in front of it, and where x's tokens are.

    No tap of a token then reaches into another sequence.
    """
    sizes = cu_seqlens.diff().long()
    sequences = torch.arange(len(sizes), device=x.device)
    begin = cu_seqlens[:-1].long() + sequences * reach
    tokens = torch.arange(len(x), device=x.device) + (torch.repeat_interleave(sizes) + 1) * reach
    earlier = (begin[:, None] + torch.arange(reach, device=x.device)).flatten()
    source = torch.empty(len(tokens) + len(earlier), dtype=torch.long, device=x.device)
    source[torch.cat([tokens, earlier])] = torch.arange(len(source), device=x.device)
    states = x.new_zeros(len(earlier), x.shape[1]) if before is None else before.flatten(0, 1).to(x.dtype)
    return torch.cat([x, states]).index_select(0, source), tokens


def _products(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """bias + Σ_k weight_k x_{t-K+1+k}, (B, L, D) in the accumulator's dtype; never `x` itself."""
    dtype, length, width = accumulator_dtype(x), x.shape[1], weight.shape[1]
    x, taps = x.to(dtype), weight.to(dtype).t().contiguous()
    y = x * taps[-1] if bias is None else torch.addcmul(bias.to(dtype), x, taps[-1])
    for back in range(1, width):
        inputs = _zero(x[:, : max(0, length - back)], None if seq_idx is None else _crosses(seq_idx, back))
        y[:, back:].addcmul_(inputs, taps[-1 - back])
        if before is not None:
            reach = min(back, length)
            earlier = before[:, width - 1 - back : width - 1 - back + reach].to(dtype)
            earlier = _zero(earlier, None if seq_idx is None else _left_first(seq_idx, reach))
            y[:, :reach].addcmul_(earlier, taps[-1 - back])
    return y


def _crosses(seq_idx: Tensor, back: int) -> Tensor:
    """(B, L - back): whether the tokens at and `back` before each position from `back` on are of two documents."""
    return seq_idx[:, back:] != seq_idx[:, : max(0, seq_idx.shape[1] - back)]


def _left_first(seq_idx: Tensor, reach: int) -> Tensor:
    """(B, reach): whether a token is past its row's first document, the only one that earlier inputs belong to."""
    return seq_idx[:, :reach] != seq_idx[:, :1]


def _zero(x: Tensor, where: Tensor | None) -> Tensor:
    """x (B, T, D), zero where (B, T) is True."""
    return x if where is None else x.masked_fill(where[..., None], 0.0)
