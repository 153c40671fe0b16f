"""The convolution through causal-conv1d, where that is installed, channel-last.

What it cannot do goes to our own, call by call: cu_seqlens, seq_idx together with an initial state, widths other than 2
to 4, channel counts that are no multiple of 8, float64.
"""

from __future__ import annotations

import torch
from causal_conv1d import causal_conv1d_fn

from .choice import ours
from .reference import Tensor


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
    """`reference.causal_conv1d` through causal-conv1d, channel-last."""
    unsupported = (
        cu_seqlens is not None
        or (seq_idx is not None and initial_state is not None)
        or weight.shape[1] not in (2, 3, 4)
        or x.shape[1] == 0
        or x.shape[2] % 8
        or x.dtype == torch.float64
    )
    if unsupported:
        return ours("causal_conv1d")(
            *(x, weight, bias),
            activation=activation,
            initial_state=initial_state,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
        )
    if x.stride(2) != 1 or x.stride(0) % 8 or x.stride(1) % 8:
        x = x.contiguous()
    before = None
    if initial_state is not None:
        # (B, K-1, D) contiguous, seen channel-first: the layout that the channel-last kernel asks for.
        before = initial_state.to(x.dtype).contiguous().transpose(1, 2)
    y = causal_conv1d_fn(
        x.transpose(1, 2),
        weight,
        bias,
        seq_idx=None if seq_idx is None else seq_idx.to(torch.int32).contiguous(),
        initial_states=before,
        activation=activation,
    )
    return y.transpose(1, 2)
