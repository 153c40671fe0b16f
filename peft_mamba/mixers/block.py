"""The blocks and norms around the mixers: one kernel a norm, and the choice of what is kept for backward.

As with the mixers, transformers' modules keep their names and parameters and change their class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from ..kernels.norm import rms_norm, rms_norm_residual
from .projection import draws, hooked, is_adapted, plain
from .recomputation import DEFAULT, Remakes, can_be_remade, checkpointed, in_other_hands

Tensor = torch.Tensor


class _Norm:
    """transformers' RMS norm, which keeps its input alone for backward."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class MambaRMSNorm(_Norm, modeling_mamba.MambaRMSNorm):
    """See _Norm."""


class Mamba2RMSNorm(_Norm, modeling_mamba2.Mamba2RMSNorm):
    """See _Norm."""


class MambaRMSNormGated(modeling_mamba2.MambaRMSNormGated):
    """Mamba-2's norm of y · silu(z), which keeps y and z alone for backward."""

    def forward(
        self, hidden_states: Tensor, gate: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        return rms_norm(
            hidden_states,
            self.weight,
            self.variance_epsilon,
            gate=gate,
            group_size=self.group_size,
            out_dtype=out_dtype,
        )


class Block:
    """norm, mixer, residual; `recompute` says what backward finds and what it makes again."""

    recompute: str = DEFAULT
    gradient_checkpointing: bool
    training: bool
    residual_in_fp32: bool
    norm: Any
    mixer: Any
    parameters: Any

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        def run(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            return self._parts(hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs)

        # A cache is written once; transformers' own checkpoint makes everything again already.
        trains = self.training and torch.is_grad_enabled() and cache_params is None
        level = self.recompute if trains and not self.gradient_checkpointing else "none"
        if torch.compiler.is_compiling():
            level = "none"
        if level == "block":
            parameters = [each for each in self.parameters() if each.requires_grad]
            return checkpointed(run, hidden_states, parameters, draws=self.draws())
        if level == "mixer" and not in_other_hands():
            with Remakes().collecting():
                residual, mixed = run(hidden_states)
        else:
            residual, mixed = run(hidden_states)
        return residual + mixed

    def draws(self) -> bool:
        """Whether running it draws random numbers, see `projection.draws`."""
        layers = [each for each in self.mixer.children() if isinstance(each, nn.Linear) or is_adapted(each)]
        return any(map(draws, layers))

    def _parts(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
        """The residual, and what the mixer adds to it."""
        norm, residual = self.norm, hidden_states
        if type(norm) in (MambaRMSNorm, Mamba2RMSNorm) and not hooked(norm):
            hidden_states = hidden_states.to(norm.weight.dtype)
            # What a plain in_proj under autocast would round its input to.
            device, out_dtype = hidden_states.device.type, None
            if torch.is_autocast_enabled(device) and plain(self.mixer.in_proj) is not None:
                out_dtype = torch.get_autocast_dtype(device)
            source, eps = hidden_states.detach(), norm.variance_epsilon
            normed, same = rms_norm_residual(hidden_states, norm.weight, eps, out_dtype=out_dtype)
            residual = same if residual is hidden_states else residual
            can_be_remade(normed, lambda: rms_norm(source, norm.weight, eps, out_dtype=out_dtype))
        else:
            normed = norm(hidden_states.to(norm.weight.dtype))
        if self.residual_in_fp32:
            residual = residual.to(torch.float32)
        return residual, self.mixer(normed, **kwargs)


class MambaBlock(Block, modeling_mamba.MambaBlock):
    """See Block."""

    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        # transformers drops further arguments here, too; the boundaries of packed documents come with the mask.
        return Block.forward(self, hidden_states, cache_params, attention_mask)


class Mamba2Block(Block, modeling_mamba2.Mamba2Block):
    """See Block."""

    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        return Block.forward(self, hidden_states, cache_params, attention_mask, **kwargs)


# transformers' class to ours.
PARTS: dict[type[nn.Module], type[nn.Module]] = {
    modeling_mamba.MambaBlock: MambaBlock,
    modeling_mamba.MambaRMSNorm: MambaRMSNorm,
    modeling_mamba2.Mamba2Block: Mamba2Block,
    modeling_mamba2.Mamba2RMSNorm: Mamba2RMSNorm,
    modeling_mamba2.MambaRMSNormGated: MambaRMSNormGated,
}
