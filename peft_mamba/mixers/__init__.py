"""The mixers that replace transformers' own on a model, one class a family, and how they get there.

from peft_mamba import use_mixers
use_mixers(model)  # a MambaForCausalLM or Mamba2ForCausalLM, with or without adapters
"""

from __future__ import annotations

import logging
import types

from torch import nn
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from .. import kernels
from .block import PARTS
from .graphs import use_cuda_graphs
from .linear import use_fast_linears
from .mamba import MambaMixer
from .mamba2 import Mamba2Mixer
from .packing import hook_models, packing_support
from .recomputation import LEVELS, RecomputeError, recompute
from .sequences import PackedSequences, StatePool
from .state import MixerState, PackedRows

__all__ = [
    "FAMILIES",
    "LEVELS",
    "Mamba2Mixer",
    "MambaMixer",
    "MixerState",
    "PackedRows",
    "RecomputeError",
    "PackedSequences",
    "StatePool",
    "mixers_of",
    "packing_support",
    "recompute",
    "use_cuda_graphs",
    "use_mixers",
]

logger = logging.getLogger(__name__)

# transformers' class to ours; a subclass of the former (another model's variant of it) is left alone.
FAMILIES: dict[type[nn.Module], type[nn.Module]] = {
    modeling_mamba.MambaMixer: MambaMixer,
    modeling_mamba2.Mamba2Mixer: Mamba2Mixer,
}


def mixers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of every mixer of the two families in `model`, ours or still transformers' own."""
    known = {*FAMILIES, *FAMILIES.values()}
    return [(name, module) for name, module in model.named_modules() if type(module) in known]


def use_mixers(model: nn.Module) -> int:
    """Let every Mamba and Mamba-2 mixer of `model` run ours, in place. Doing it twice changes nothing.

    The modules, their parameters and their names stay as they are; only the class of each mixer changes, so the model
    saves, copies and compares as before. Which kernels they run is chosen at each forward, by the device of its input:
    `kernels.describe` and `report` say which. Where oneDNN multiplies faster than MKL (a CPU with AVX-512 that is not
    Intel's), the plain nn.Linear layers of the model, its head among them, become a subclass that lets it.

    The model then keeps documents that are packed into a row apart, state and convolution, gradients included: pass it
    `seq_idx`, (B, L) int, changing at the first token of each document, or `position_ids`, (B, L) or (1, L), that
    restart at 0 there; padding between and around them may be masked with `attention_mask`. With a cache to go on
    from, the first document of a row is the one that goes on. Labels are the caller's: -100 at each first token keeps
    the end of one document from having to predict the start of the next. `packing_support` says whether the kernels
    that would run can do it.

    Returns:
        How many mixers run ours now; 0 for a model of another family.

    Raises:
        NotImplementedError: accelerate offloads weights of a mixer to the CPU or disk, or something has put a forward
            of its own on a mixer, past which ours would not run.
    """
    mixers = mixers_of(model)
    for name, mixer in mixers:
        for part, module in mixer.named_modules(prefix=name):
            # Such a hook brings parameters in for the call of the module that owns them; the mixer reads those of
            # conv1d and dt_proj's bias outside of it.
            if getattr(getattr(module, "_hf_hook", None), "offload", False):
                raise NotImplementedError(
                    f"{part} is offloaded; these mixers need their weights on the device. Load the model on "
                    "devices that hold all of it."
                )
        if "forward" in vars(mixer) and "_old_forward" not in vars(mixer):
            raise NotImplementedError(
                f"{name} has a forward set on the module itself; ours would not run. Remove it first."
            )
    fresh = [mixer for _, mixer in mixers if type(mixer) in FAMILIES]
    if mixers:
        for module in model.modules():
            become = FAMILIES.get(type(module)) or PARTS.get(type(module))
            # A norm or block that something has put a forward of its own on keeps that.
            if become is None or ("forward" in vars(module) and "_old_forward" not in vars(module)):
                continue
            module.__class__ = become
            if "_old_forward" in vars(module):
                # accelerate's hooks (a model spread over devices) call the forward that they found on the module.
                vars(module)["_old_forward"] = types.MethodType(become.forward, module)
    hook_models(model)
    linears = use_fast_linears(model) if mixers else 0
    if fresh:
        path = kernels.describe(next(fresh[0].parameters()).device.type)
        logger.info("%d %s mixers, kernels %s", len(fresh), type(fresh[0]).__name__, path)
        if linears:
            logger.info("%d linear layers multiply float32 on a CPU by oneDNN", linears)
    return len(mixers)
