"""Mamba-2's mixer, with every projection called as a module, so that an adapter on it takes effect on every path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers.models.mamba2 import modeling_mamba2

from .. import kernels
from ..kernels.reference import accumulator_dtype
from .state import CachedMixer, MixerState, conv_window

Tensor = torch.Tensor


class Mamba2Mixer(CachedMixer, modeling_mamba2.Mamba2Mixer):
    """transformers' mixer with one forward for training, scoring and generation. Adds no parameters.

    The parent's forward hands the weight of out_proj to a fused kernel when it trains, past any adapter, and lets
    padding into the state there.
    """

    def mix(
        self,
        hidden_states: Tensor,
        *,
        initial_state: MixerState | None = None,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_final_state: bool = False,
    ) -> tuple[Tensor, MixerState | None]:
        z, xBC, dt = self.in_proj(hidden_states).split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        conv_before = None if initial_state is None else initial_state.conv
        u = kernels.causal_conv1d(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu" if self.activation == "silu" else None,
            initial_state=None if conv_before is None else conv_before[..., 1:].transpose(1, 2),
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
        )
        if self.activation != "silu":
            u = self.act(u)
        group_states = self.n_groups * self.ssm_state_size
        x, B, C = u.split([self.intermediate_size, group_states, group_states], dim=-1)
        # The bias and softplus of the step size stay in float32 under autocast.
        dt = F.softplus(dt.to(accumulator_dtype(dt)) + self.dt_bias).clamp(*self.time_step_limit)
        y, ssm = kernels.ssd(
            x.unflatten(-1, (self.num_heads, self.head_dim)),
            dt,
            -torch.exp(self.A_log.to(accumulator_dtype(self.A_log))),
            B.unflatten(-1, (self.n_groups, self.ssm_state_size)),
            C.unflatten(-1, (self.n_groups, self.ssm_state_size)),
            self.D,
            initial_state=None if initial_state is None else initial_state.ssm,
            lengths=lengths if return_final_state else None,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_final_state=return_final_state,
        )
        state = None
        if return_final_state:
            state = MixerState(conv_window(xBC, conv_before, lengths, self.conv_kernel_size, cu_seqlens), ssm)
        return self.out_proj(self.norm(y.flatten(-2), z).to(y.dtype)), state
