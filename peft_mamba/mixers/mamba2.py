"""Mamba-2's mixer, with every projection called as a module, so that an adapter on it takes effect on every path."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from transformers.models.mamba2 import modeling_mamba2

from .. import kernels
from ..kernels.reference import accumulator_dtype
from .block import MambaRMSNormGated
from .projection import hooked, project
from .recomputation import can_be_remade
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
        D, group_states = self.intermediate_size, self.n_groups * self.ssm_state_size
        # x, and B with C, are convolved apart: each comes out contiguous, and neither is copied for the scan.
        parts = (slice(0, D), slice(D, D + 2 * group_states))
        z, x, rest = project(self.in_proj, hidden_states, sizes=[D, D, 2 * group_states + self.num_heads])
        BC, dt = rest.split([2 * group_states, self.num_heads], dim=-1)
        convolved = (x, BC)
        conv_before = None if initial_state is None else initial_state.conv
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias

        def convolve(inputs: Tensor, part: slice) -> Tensor:
            u = kernels.causal_conv1d(
                inputs,
                weight[part],
                None if bias is None else bias[part],
                activation="silu" if self.activation == "silu" else None,
                initial_state=None if conv_before is None else conv_before[:, part, 1:].transpose(1, 2),
                seq_idx=seq_idx,
                cu_seqlens=cu_seqlens if seq_idx is None else None,
            )
            return u if self.activation == "silu" else self.act(u)

        x, BC = (convolve(inputs, part) for inputs, part in zip(convolved, parts, strict=True))
        for u, inputs, part in zip((x, BC), convolved, parts, strict=True):
            can_be_remade(u, functools.partial(convolve, inputs, part))
        B, C = BC.split(group_states, dim=-1)
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
            cu_seqlens=cu_seqlens if seq_idx is None else None,
            return_final_state=return_final_state,
        )
        state = None
        if return_final_state:
            xBC = torch.cat(convolved, dim=-1)
            state = MixerState(conv_window(xBC, conv_before, lengths, self.conv_kernel_size, cu_seqlens), ssm)
        return project(self.out_proj, self._normed(y.flatten(-2), z), product=not self._output_unread()), state

    def _normed(self, y: Tensor, z: Tensor) -> Tensor:
        if type(self.norm) is not MambaRMSNormGated or hooked(self.norm):
            return self.norm(y, z).to(y.dtype)
        normed = self.norm(y, z, out_dtype=y.dtype)
        source, gate = y.detach(), z.detach()
        can_be_remade(normed, lambda: self.norm(source, gate, out_dtype=y.dtype))
        return normed
