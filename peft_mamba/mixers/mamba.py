"""Mamba-1's mixer, with every projection called as a module, so that an adapter on it takes effect on every path."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.mamba import modeling_mamba

from .. import kernels
from ..frozen import from_weights
from ..kernels.room import gradient_place, seen_as, set_gradient_place, with_room
from .projection import columns_for, draws, project
from .recomputation import can_be_remade, remakes_some
from .sequences import PackedSequences, Part
from .state import CachedMixer, MixerState, decay_rates, inputs_before, state_after

Tensor = torch.Tensor


class MambaMixer(CachedMixer, modeling_mamba.MambaMixer):
    """transformers' mixer with one forward for training, scoring and generation. Adds no parameters.

    The parent's forward hands the weights of x_proj, dt_proj and out_proj to fused kernels, past any adapter; starts
    from a zero state when more than one token follows a cached one; and lets padding into the state.
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
        x, z = project(self.in_proj, hidden_states, sizes=[self.intermediate_size] * 2)
        if sequences is None:
            conv_before = inputs_before(initial_state, self.conv_kernel_size)
        else:
            cu_seqlens = sequences.cu_seqlens
            conv_before = sequences.inputs_before(x, self.layer_idx, self.conv_kernel_size - 1)

        def convolve() -> Tensor:
            u = kernels.causal_conv1d(
                x,
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                activation="silu" if self.activation == "silu" else None,
                initial_state=conv_before,
                seq_idx=seq_idx,
                cu_seqlens=cu_seqlens if seq_idx is None else None,
            )
            return u if self.activation == "silu" else self.act(u)

        u = convolve()
        can_be_remade(u, convolve)
        selected, u = project(self.x_proj, u, through=True)
        if (place := gradient_place(x)) is not None:  # x's gradient is made when u's is of no more use
            set_gradient_place(u, place._replace(lent=True))
        time_step, B, C = selected.split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
        # The bias and softplus of the step size stay in float32 under autocast, inside the scan.
        delta = project(self.dt_proj, time_step, bias=False)
        if remakes_some() and not draws(self.dt_proj):
            can_be_remade(delta, lambda: project(self.dt_proj, time_step, bias=False))
        A = from_weights("A", decay_rates, self.A_log)
        if sequences is not None:

            def scan(part: Part, **states: Any) -> tuple[Tensor, Tensor | None]:
                u_, delta_, B_, C_, z_ = (each[:, part.tokens] for each in (u, delta, B, C, z))
                rows = {"cu_seqlens": part.cu_seqlens, "memo": part.memo}
                return kernels.selective_scan(u_, delta_, A, B_, C_, self.D, z_, self.dt_proj.bias, **rows, **states)

            y = sequences.scan(self.layer_idx, u, scan)
            sequences.keep_inputs(x, self.layer_idx, self.conv_kernel_size - 1)
            return project(self.out_proj, y), None
        rows: dict[str, Any] = {"cu_seqlens": cu_seqlens}
        if cu_seqlens is not None and seq_idx is not None:
            # Documents side by side; with seq_idx a scan goes through all of a row one after the other.
            u, z = (set_gradient_place(each.flatten(0, 1)[None], gradient_place(each)) for each in (u, z))
            delta, B, C = (each.flatten(0, 1)[None] for each in (delta, B, C))
        else:
            rows |= {
                "initial_state": None if initial_state is None else initial_state.ssm,
                "lengths": lengths if return_final_state else None,
                "seq_idx": seq_idx,
                "return_final_state": return_final_state,
            }
        columns = columns_for(self.out_proj, u, u.dtype)
        out = with_room(u.shape, columns, u.dtype, u.device) if columns else None
        y, ssm = kernels.selective_scan(u, delta, A, B, C, self.D, z, self.dt_proj.bias, out=out, **rows)
        y = seen_as(y, (*hidden_states.shape[:2], self.intermediate_size))
        state = None
        if return_final_state and ssm is not None:
            state = state_after(x, ssm, initial_state, lengths, self.conv_kernel_size)
        return project(self.out_proj, y, product=not self._output_unread()), state
