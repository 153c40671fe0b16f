"""Mamba-2's mixer, with every projection called as a module, so that an adapter on it takes effect on every path."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.mamba2 import modeling_mamba2

from .. import kernels
from ..frozen import from_weights
from ..kernels.reference import accumulator_dtype
from .block import MambaRMSNormGated
from .projection import columns_for, hooked, project
from .recomputation import can_be_remade
from .sequences import PackedSequences, Part
from .state import CachedMixer, MixerState, decay_rates, inputs_before, state_after

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
        sequences: PackedSequences | None = None,
    ) -> tuple[Tensor, MixerState | None]:
        D, group_states = self.intermediate_size, self.n_groups * self.ssm_state_size
        if sequences is not None:  # run by our own scan, which takes x, B and C as they lie in one tensor
            cu_seqlens = sequences.cu_seqlens
            z, xBC, dt = project(self.in_proj, hidden_states, sizes=[D, D + 2 * group_states, self.num_heads])
            convolved, parts = [xBC], [slice(None)]
            before = sequences.inputs_before(xBC, self.layer_idx, self.conv_kernel_size - 1)
        else:
            # x, and B with C, are convolved apart: each comes out contiguous, and neither is copied for the scan.
            z, x, rest = project(self.in_proj, hidden_states, sizes=[D, D, 2 * group_states + self.num_heads])
            BC, dt = rest.split([2 * group_states, self.num_heads], dim=-1)
            convolved, parts = [x, BC], [slice(0, D), slice(D, D + 2 * group_states)]
            before = inputs_before(initial_state, self.conv_kernel_size)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias

        def convolve(inputs: Tensor, part: slice) -> Tensor:
            u = kernels.causal_conv1d(
                inputs,
                weight[part],
                None if bias is None else bias[part],
                activation="silu" if self.activation == "silu" else None,
                initial_state=None if before is None else before[..., part],
                seq_idx=seq_idx,
                cu_seqlens=cu_seqlens if seq_idx is None else None,
            )
            return u if self.activation == "silu" else self.act(u)

        done = [convolve(inputs, part) for inputs, part in zip(convolved, parts, strict=True)]
        for u, inputs, part in zip(done, convolved, parts, strict=True):
            can_be_remade(u, functools.partial(convolve, inputs, part))
        if sequences is not None:
            x, B, C = done[0].split([D, group_states, group_states], dim=-1)
        else:
            x, (B, C) = done[0], done[1].split(group_states, dim=-1)
        # The bias and softplus of the step size stay in float32 under autocast.
        dt = F.softplus(dt + self.dt_bias.to(accumulator_dtype(dt)))
        if tuple(self.time_step_limit) != (0.0, float("inf")):
            dt = dt.clamp(*self.time_step_limit)
        A = from_weights("A", decay_rates, self.A_log)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        B, C = (each.unflatten(-1, (self.n_groups, self.ssm_state_size)) for each in (B, C))
        if sequences is not None:

            def scan(part: Part, **states: Any) -> tuple[Tensor, Tensor | None]:
                x_, dt_, B_, C_ = (each[:, part.tokens] for each in (x, dt, B, C))
                rows = {"cu_seqlens": part.cu_seqlens, "memo": part.memo}
                return kernels.ssd(x_, dt_, A, B_, C_, self.D, **rows, **states)

            y = sequences.scan(self.layer_idx, x, scan)
            sequences.keep_inputs(convolved[0], self.layer_idx, self.conv_kernel_size - 1)
            return project(self.out_proj, self._normed(y.flatten(-2), z)), None
        y, ssm = kernels.ssd(
            *(x, dt, A, B, C, self.D),
            initial_state=None if initial_state is None else initial_state.ssm,
            lengths=lengths if return_final_state else None,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens if seq_idx is None else None,
            return_final_state=return_final_state,
        )
        state = None
        if return_final_state and ssm is not None:
            xBC = torch.cat(convolved, dim=-1)
            state = state_after(xBC, ssm, initial_state, lengths, self.conv_kernel_size)
        return project(self.out_proj, self._normed(y.flatten(-2), z), product=not self._output_unread()), state

    def _normed(self, y: Tensor, z: Tensor) -> Tensor:
        if type(self.norm) is not MambaRMSNormGated or hooked(self.norm):
            return self.norm(y, z).to(y.dtype)
        made = {"out_dtype": y.dtype, "columns": columns_for(self.out_proj, y, y.dtype)}
        normed = self.norm(y, z, **made)
        source, gate = y.detach(), z.detach()
        can_be_remade(normed, lambda: self.norm(source, gate, **made))
        return normed
