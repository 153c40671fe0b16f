"""Mamba-1's mixer, with every projection called as a module, so that an adapter on it takes effect on every path."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call
from transformers.models.mamba import modeling_mamba

from .. import kernels
from ..kernels.reference import accumulator_dtype
from .state import CachedMixer, MixerState, conv_window

Tensor = torch.Tensor


def project_without_bias(linear: nn.Module, x: Tensor) -> Tensor:
    """`linear(x)` less its bias, for a linear layer that may carry adapters.

    The module runs as it is, with zeros in place of its bias, so LoRA and DoRA do what they always do. To subtract the
    bias afterwards would be wrong in half precision: by then it has rounded the product away.
    """
    zeros = {
        name: torch.zeros(parameter.shape, dtype=parameter.dtype, device=x.device)
        for name, parameter in linear.named_parameters()
        if name.rpartition(".")[2] == "bias" and "lora_" not in name
    }
    return functional_call(linear, zeros, (x,), tie_weights=False)


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
    ) -> tuple[Tensor, MixerState | None]:
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        conv_before = None if initial_state is None else initial_state.conv
        u = kernels.causal_conv1d(
            x,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu" if self.activation == "silu" else None,
            initial_state=None if conv_before is None else conv_before[..., 1:].transpose(1, 2),
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
        )
        if self.activation != "silu":
            u = self.act(u)
        time_step, B, C = self.x_proj(u).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
        # The bias and softplus of the step size stay in float32 under autocast, inside the scan.
        y, ssm = kernels.selective_scan(
            u,
            project_without_bias(self.dt_proj, time_step),
            -torch.exp(self.A_log.to(accumulator_dtype(self.A_log))),
            B,
            C,
            self.D,
            z,
            self.dt_proj.bias,
            initial_state=None if initial_state is None else initial_state.ssm,
            lengths=lengths if return_final_state else None,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_final_state=return_final_state,
        )
        state = None
        if return_final_state:
            state = MixerState(conv_window(x, conv_before, lengths, self.conv_kernel_size, cu_seqlens), ssm)
        return self.out_proj(y), state
