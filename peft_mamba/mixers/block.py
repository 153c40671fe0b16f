"""The blocks and norms around the mixers: one kernel a norm, and the choice of what is kept for backward.

As with the mixers, transformers' modules keep their names and parameters and change their class.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from ..kernels.norm import rms_norm, rms_norm_residual
from ..kernels.room import as_gradient_of, gradient_place, set_gradient_place
from .projection import columns_for, draws, hooked, is_adapted, plain
from .recomputation import DEFAULT, Checkpoints, Remakes, can_be_remade, checkpointed, in_other_hands

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
        self,
        hidden_states: Tensor,
        gate: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        columns: int = 0,
    ) -> Tensor:
        return rms_norm(
            hidden_states,
            self.weight,
            self.variance_epsilon,
            gate=gate,
            group_size=self.group_size,
            out_dtype=out_dtype,
            columns=columns,
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
        return _summed(*self.unsummed(hidden_states, None, cache_params, attention_mask, **kwargs))

    def unsummed(
        self,
        hidden_states: Tensor,
        added: Tensor | None = None,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        checkpoints: Checkpoints | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """The forward of hidden_states + added, and of its result the two terms, for the next block to add.

        Args:
            hidden_states, added: (B, L, hidden_size) each; added is None where there is one term alone.
            checkpoints: where the result goes if it is one; None: to memory of its own.
        """

        def run(hidden_states: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return self._parts(hidden_states, added, cache_params=cache_params, attention_mask=attention_mask, **kwargs)

        level = self.level(cache_params)
        if level == "block":
            parameters = [each for each in self.parameters() if each.requires_grad]
            add = torch.add if checkpoints is None else checkpoints.add
            return checkpointed(run, _summed(hidden_states, added), parameters, draws=self.draws(), add=add), None
        if level == "mixer" and not in_other_hands():
            with Remakes().collecting():
                return run(hidden_states, added)
        return run(hidden_states, added)

    def level(self, cache_params: Cache | None = None) -> str:
        """What is made again of a forward now: `recompute`, where that can be."""
        # A cache is written once; transformers' own checkpoint makes everything again already.
        trains = self.training and torch.is_grad_enabled() and cache_params is None
        possible = trains and not self.gradient_checkpointing and not torch.compiler.is_compiling()
        return self.recompute if possible else "none"

    def draws(self) -> bool:
        """Whether running it draws random numbers, see `projection.draws`."""
        layers = [each for each in self.mixer.children() if isinstance(each, nn.Linear) or is_adapted(each)]
        return any(map(draws, layers))

    def _parts(self, hidden_states: Tensor, added: Tensor | None, **kwargs) -> tuple[Tensor, Tensor]:
        """The residual, and what the mixer adds to it."""
        norm = self.norm
        ours = type(norm) in (MambaRMSNorm, Mamba2RMSNorm) and not hooked(norm)
        if added is not None:
            dtype = torch.promote_types(hidden_states.dtype, added.dtype)
            if not ours or not hidden_states.dtype == dtype == norm.weight.dtype:  # else the norm adds them
                hidden_states, added = hidden_states + added, None
        residual = hidden_states
        if ours:
            hidden_states = hidden_states.to(norm.weight.dtype)
            # What a plain in_proj under autocast would round its input to.
            device, out_dtype = hidden_states.device.type, None
            if torch.is_autocast_enabled(device) and plain(self.mixer.in_proj) is not None:
                out_dtype = torch.get_autocast_dtype(device)
            eps = norm.variance_epsilon
            made: Any = {"out_dtype": out_dtype, "columns": columns_for(self.mixer.in_proj, hidden_states, out_dtype)}
            normed, same = rms_norm_residual(hidden_states, norm.weight, eps, added=added, **made)
            source = same.detach()
            residual = same if residual is hidden_states else residual
            can_be_remade(normed, lambda: rms_norm(source, norm.weight, eps, **made))
        else:
            normed = norm(hidden_states.to(norm.weight.dtype))
        if self.residual_in_fp32:
            residual = residual.to(torch.float32)
        return residual, self.mixer(normed, **kwargs)


def _summed(hidden_states: Tensor, added: Tensor | None) -> Tensor:
    if added is None:
        return hidden_states
    if torch.is_grad_enabled() and gradient_place(added) is not None:
        return _Sum.apply(hidden_states, added)
    return hidden_states + added


class _Sum(torch.autograd.Function):
    """x + added, of which the gradient of `added` goes to its place: autograd would cast it to memory of its own."""

    @staticmethod
    def forward(ctx, x, added):
        ctx.dtype = x.dtype
        ctx.like = set_gradient_place(added.new_empty(1).expand(added.shape), gradient_place(added))
        return x + added

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[override]  # mypy sees the decorator, not the method
        return dy.to(ctx.dtype), as_gradient_of(ctx.like, dy)


class MambaBlock(Block, modeling_mamba.MambaBlock):
    """See Block."""

    def unsummed(self, hidden_states, added=None, cache_params=None, attention_mask=None, checkpoints=None, **kwargs):
        # transformers drops further arguments here, too; the boundaries of packed documents come with the mask.
        return Block.unsummed(self, hidden_states, added, cache_params, attention_mask, checkpoints)


class Mamba2Block(Block, modeling_mamba2.Mamba2Block):
    """See Block."""


def run_blocks(blocks: Iterable[Any], hidden_states: Tensor, **kwargs) -> Tensor:
    """Blocks one after the other: what a mixer adds to the residual is added by the next block's norm, in one kernel.

    A block that is not ours, or whose call does more than its forward, is called as the module it is.

    Args:
        hidden_states: (B, L, hidden_size).
        kwargs: of every block.
    """
    blocks = list(blocks)
    fused = [type(b) in (MambaBlock, Mamba2Block) and not (hooked(b) or b.gradient_checkpointing) for b in blocks]
    added = checkpoints = None
    # None for the last one: what it leaves may be kept for long, and with it all that it shares memory with.
    ahead = zip(blocks[:-1], fused, strict=False)
    if count := sum(each and block.level(kwargs.get("cache_params")) == "block" for block, each in ahead):
        dtype = torch.float32 if any(block.residual_in_fp32 for block in blocks) else hidden_states.dtype
        checkpoints = Checkpoints(count, hidden_states, dtype)
    for block, each in zip(blocks, fused, strict=True):
        if each:
            hidden_states, added = block.unsummed(hidden_states, added, checkpoints=checkpoints, **kwargs)
        else:
            hidden_states, added = block(_summed(hidden_states, added), **kwargs), None
    return _summed(hidden_states, added)


# transformers' class to ours.
PARTS: dict[type[nn.Module], type[nn.Module]] = {
    modeling_mamba.MambaBlock: MambaBlock,
    modeling_mamba.MambaRMSNorm: MambaRMSNorm,
    modeling_mamba2.Mamba2Block: Mamba2Block,
    modeling_mamba2.Mamba2RMSNorm: Mamba2RMSNorm,
    modeling_mamba2.MambaRMSNormGated: MambaRMSNormGated,
}
