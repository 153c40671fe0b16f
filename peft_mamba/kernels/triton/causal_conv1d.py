"""Depthwise causal convolution in Triton, channel-last, forward and backward; shapes and meanings as in `reference`.

Both passes are bound by memory. They walk strips of tokens with the last inputs, and in backward the unfinished
gradients, in registers. A strip starts with width - 1 tokens of which it only needs the inputs, and in backward ends
with as many. Backward recomputes what went into the activation. Sums over tokens are made in a fixed order, so that the
same inputs give the same bits.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .. import chunked
from ..reference import check_packed
from ..room import gradient_place, new_gradient
from . import causal_conv1d_kernels as kernels
from .common import Tensor, cdiv, row_strides, search_steps

# Beyond this the registers of backward's window run out.
MAX_WIDTH = 8
# A program, one warp, takes so many channels of a strip of so many tokens, GROUP of them at a time; in backward, which
# reads further beyond a strip, of a longer one.
CHANNELS, TOKENS, GROUP = 128, 16, 8
BACKWARD_TOKENS = 32
# Where the weight gets a gradient, every strip leaves sums: longer strips, leaving registers to the sums; shorter where
# else there would be fewer programs on a multiprocessor.
SUMMED_TOKENS, SUMMED_GROUP, PROGRAMS = 128, 4, 16


def _summed_tokens(x: Tensor) -> int:
    """Tokens of a strip where the weight gets a gradient."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    columns = x.shape[0] * cdiv(x.shape[2], CHANNELS)
    tokens = SUMMED_TOKENS
    while tokens > TOKENS and columns * cdiv(x.shape[1], tokens) < PROGRAMS * processors:
        tokens //= 2
    return tokens


def _paired(*tensors: Tensor) -> bool:
    """Whether channels can be loaded by twos."""
    return all(
        tensor.element_size() == 2
        and tensor.data_ptr() % 4 == 0
        and all(size % 2 == 0 for size in (tensor.shape[-1], *tensor.stride()[:-1]))
        for tensor in tensors
    )


def _forward(x, weight, bias, initial_state, seq_idx, cu_seqlens, silu):
    batch, length, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    strips = cdiv(length, TOKENS)
    with torch.cuda.device_of(x):
        kernels.forward[(batch * strips * cdiv(channels, CHANNELS),)](
            *(x, weight, bias, initial_state, seq_idx, cu_seqlens, y),
            *(length, channels, strips, TOKENS, 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1),
            *(search_steps(cu_seqlens), x.stride(0), x.stride(1)),
            **_switches(weight, bias, silu, seq_idx, cu_seqlens),
            HAS_INITIAL=initial_state is not None,
            PAIRED=_paired(x),
            CHANNELS=CHANNELS,
            GROUP=GROUP,
            num_warps=1,
        )
    return y


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, seq_idx, cu_seqlens, silu):
        ctx.silu, ctx.place = silu, gradient_place(x)
        ctx.save_for_backward(x, weight, bias, initial_state, seq_idx, cu_seqlens)
        return _forward(x, weight, bias, initial_state, seq_idx, cu_seqlens, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]  # mypy sees the decorator, not the method
        x, weight, bias, initial_state, seq_idx, cu_seqlens = ctx.saved_tensors
        need_x, need_weight, need_bias, need_initial = ctx.needs_input_grad[:4]
        need_weight = need_weight or need_bias
        dy = row_strides(dy)
        batch, length, channels = x.shape
        tokens = _summed_tokens(x) if need_weight else BACKWARD_TOKENS
        strips = cdiv(length, tokens)
        switches = _switches(weight, bias, ctx.silu, seq_idx, cu_seqlens)
        dx = new_gradient(ctx.place, x, reads=dy) if need_x else None
        dweight = dbias = dinitial = None
        with torch.cuda.device_of(x):
            if need_x or need_weight:
                if need_weight:  # a sum for each program, added up below
                    dweight = weight.new_empty(batch * strips, *weight.shape, dtype=torch.float32)
                    dbias = weight.new_empty(batch * strips, channels, dtype=torch.float32)
                into = x if dx is None else dx
                kernels.backward[(batch * strips * cdiv(channels, CHANNELS),)](
                    *(x, weight, bias, initial_state, seq_idx, cu_seqlens, dy, into, dweight, dbias),
                    *(length, channels, strips, tokens, 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1),
                    *(search_steps(cu_seqlens), x.stride(0), x.stride(1), dy.stride(0), dy.stride(1)),
                    *(into.stride(0), into.stride(1)),
                    **switches,
                    HAS_INITIAL=initial_state is not None,
                    NEED_X=need_x,
                    NEED_WEIGHT=need_weight,
                    PAIRED=_paired(x, dy),
                    CHANNELS=CHANNELS,
                    GROUP=SUMMED_GROUP if need_weight else GROUP,
                    num_warps=1,
                )
            if need_initial:
                dinitial = torch.empty_like(initial_state)
                kernels.initial_gradients[(len(initial_state), cdiv(channels, CHANNELS))](
                    *(x, weight, bias, initial_state, seq_idx, cu_seqlens, dy, dinitial, length, channels),
                    *(x.stride(0), x.stride(1), dy.stride(0), dy.stride(1)),
                    **switches,
                    CHANNELS=CHANNELS,
                    num_warps=1,
                )
        if dweight is not None and dbias is not None:
            dweight = dweight.sum(0).to(weight.dtype)
            dbias = None if bias is None else dbias.sum(0).to(bias.dtype)
        return dx, dweight, dbias, dinitial, None, None, None


def _switches(weight, bias, silu, seq_idx, cu_seqlens) -> dict[str, int | bool]:
    return {
        "WIDTH": weight.shape[1],
        "SILU": silu,
        "HAS_BIAS": bias is not None,
        "HAS_SEQ_IDX": seq_idx is not None,
        "PACKED": cu_seqlens is not None,
    }


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
    """`reference.causal_conv1d`; float64, empty inputs and widths above MAX_WIDTH go to `chunked`.

    x may be a slice of something wider, as long as its last dimension is contiguous. First derivatives only.
    """
    if x.dtype == torch.float64 or x.numel() == 0 or weight.shape[1] > MAX_WIDTH:
        return chunked.causal_conv1d(
            *(x, weight, bias),
            activation=activation,
            initial_state=initial_state,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
        )
    if activation not in ("silu", None):
        raise ValueError(f"activation is 'silu' or None, not {activation!r}")
    if cu_seqlens is not None:
        check_packed(x, cu_seqlens, initial_state, seq_idx=seq_idx)
        cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    if weight.shape[1] == 1:
        initial_state = None
    run = _CausalConv1d.apply if torch.is_grad_enabled() else _forward
    return run(
        row_strides(x),
        weight.contiguous(),
        bias,
        None if initial_state is None else initial_state.contiguous(),
        None if seq_idx is None else seq_idx.to(torch.int32).contiguous(),
        cu_seqlens,
        activation == "silu",
    )
