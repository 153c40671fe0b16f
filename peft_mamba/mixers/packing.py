"""How the boundaries of documents packed into one row get from the call of a model to its mixers.

transformers' classes lose them on the way: MambaForCausalLM and Mamba2ForCausalLM hand neither `seq_idx` nor
`position_ids` to their backbone, and Mamba-1's backbone and blocks drop every further argument. The one argument that
all of them hand on as it is, down to the mixer, is `attention_mask`; so hooks put the boundaries beside the mask, as
`PackedRows`. Nothing is kept on a module: gradient checkpointing recomputes a block from its own arguments, whatever
ran in between, and wrappers of blocks, copies of the model and threads need no thought.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from .. import kernels
from .block import run_blocks
from .projection import hooked
from .sequences import PackedSequences
from .state import CachedMixer, PackedRows, laid_end_to_end

Tensor = torch.Tensor

MODELS = (
    modeling_mamba.MambaForCausalLM,
    modeling_mamba.MambaModel,
    modeling_mamba2.Mamba2ForCausalLM,
    modeling_mamba2.Mamba2Model,
)
# The arguments that each of them takes by position, in order.
_POSITIONAL = {model: tuple(inspect.signature(model.forward).parameters)[1:] for model in MODELS}


def packing_support(model: nn.Module, device: str | None = None) -> str | None:
    """None where documents packed into a row of `model` stay exactly apart, else why they would not, in a sentence.

    Args:
        device: kind of device ("cpu", "cuda", …) that the model will run on; default: where its mixers are now.
    """
    mixers = _mixers(model)
    if not mixers:
        return f"{type(model).__name__} has no Mamba or Mamba-2 mixers of this package to keep packed documents apart."
    if not all(isinstance(mixer, CachedMixer) for mixer in mixers):
        return f"{type(model).__name__} runs transformers' own mixers, which mix packed documents; see use_mixers."
    for kind in {device} if device else {parameter.device.type for mixer in mixers for parameter in mixer.parameters()}:
        try:
            chosen = kernels.select(kind)
        except kernels.KernelError as error:
            return str(error)
        for operation in kernels.OPERATIONS:
            if "seq_idx" not in inspect.signature(getattr(chosen, operation)).parameters:
                return (
                    f"The {chosen.name} kernels for {kind} cannot keep packed documents apart: {operation} mixes them."
                )
    return None


def hook_models(model: nn.Module) -> None:
    """Put the hooks on every model class of the two families inside `model` that runs our mixers; again is harmless."""
    for module in model.modules():
        if not isinstance(module, MODELS) or not all(isinstance(mixer, CachedMixer) for mixer in _mixers(module)):
            continue
        hook = _spread if isinstance(module, modeling_mamba2.Mamba2Model) else _gather
        if hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook, with_kwargs=True)


def last_hidden_state(backbone: Any, input_ids: Tensor, mask: PackedSequences) -> Tensor:
    """What a backbone returns, (B, L, hidden_size), whose sums are made by the norms that follow, in one kernel.

    A backbone that others have put hooks on is called as the module it is.

    Args:
        input_ids: (B, L).
    """
    if hooked(backbone, apart_from=(_gather, _spread)):
        return backbone(input_ids=input_ids, attention_mask=mask, use_cache=False)[0]
    return backbone.norm_f(run_blocks(backbone.layers, backbone.embeddings(input_ids), attention_mask=mask))


def _mixers(model: nn.Module) -> list[nn.Module]:
    """Mixers of both families, ours or transformers', also where FSDP2 has made a subclass of their class."""
    known = (modeling_mamba.MambaMixer, modeling_mamba2.Mamba2Mixer)
    return [module for module in model.modules() if isinstance(module, known)]


def _gather(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a causal LM and of Mamba-1's backbone: the boundaries travel with the mask from here."""
    given = _by_name(model, args, kwargs)
    if isinstance(given.get("attention_mask"), PackedSequences):
        return args, kwargs
    mask, seq_idx = _rows(given)
    if isinstance(model, modeling_mamba.MambaModel):
        mask = _needed(model, given, mask)
    return _replace_mask(model, args, kwargs, mask if seq_idx is None else _packed(given, mask, seq_idx))


def _spread(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of Mamba-2's backbone, which looks at the mask itself and hands further arguments on."""
    given = _by_name(model, args, kwargs)
    if isinstance(given.get("attention_mask"), PackedSequences):
        args, kwargs = _replace_mask(model, args, kwargs, None)
        return args, {**kwargs, "sequences": given["attention_mask"]}
    mask, seq_idx = _rows(given)
    mask = _needed(model, given, mask)
    args, kwargs = _replace_mask(model, args, kwargs, mask)
    if seq_idx is None:
        return args, kwargs
    packed = _packed(given, mask, seq_idx)
    return args, {**kwargs, "seq_idx": packed.seq_idx, "cu_seqlens": packed.cu_seqlens}


def _needed(model: nn.Module, given: Mapping[str, Any], mask: Tensor | None) -> Tensor | None:
    """The mask, unless it changes nothing, which the host waits for once a forward and not in each layer.

    Without padding that is so; and with padding behind the tokens of each row, as in training, where no state is left
    for later: what comes behind a token does not reach it.
    """
    if mask is None or mask.ndim != 2 or mask.shape[1] < _length(given) or torch.compiler.is_compiling():
        return mask
    config: Any = model.config
    use_cache = given.get("use_cache")
    use_cache = use_cache if use_cache is not None else config.use_cache and not model.training
    real = mask != 0
    if use_cache or given.get("cache_params") is not None:
        harmless = real.all()
    else:
        real = real[:, -_length(given) :]
        harmless = (real[:, 1:] <= real[:, :-1]).all()
    return None if bool(harmless) else mask


def _length(given: Mapping[str, Any]) -> int:
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    return 0 if tokens is None else tokens.shape[1]


def _packed(given: Mapping[str, Any], mask: Tensor | None, seq_idx: Tensor) -> PackedRows:
    """The boundaries as the mixers take them, found out once a forward where no padding and no state is in the way."""
    known = given.get("attention_mask")
    if isinstance(known, PackedRows) and known.cu_seqlens is not None:
        return known
    stateful = given.get("use_cache") or given.get("cache_params") is not None
    if mask is not None or stateful or torch.compiler.is_compiling():
        return PackedRows(mask, seq_idx)
    return PackedRows(None, *laid_end_to_end(seq_idx))


def _names(model: nn.Module) -> tuple[str, ...]:
    return next(names for kind, names in _POSITIONAL.items() if isinstance(model, kind))


def _by_name(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    return {**dict(zip(_names(model), args, strict=False)), **kwargs}


def _replace_mask(model: nn.Module, args: tuple, kwargs: dict, mask: Tensor | PackedRows | None) -> tuple[tuple, dict]:
    """The same call with another attention_mask."""
    position = _names(model).index("attention_mask")
    if position < len(args):
        return (*args[:position], mask, *args[position + 1 :]), kwargs
    return (args, kwargs) if mask is kwargs.get("attention_mask") else (args, {**kwargs, "attention_mask": mask})


def _rows(given: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """(attention_mask, seq_idx) of a forward with these arguments; seq_idx is None where nothing tells of packing.

    Raises:
        ValueError: seq_idx or position_ids are not of the tokens' shape, or position_ids restart after a cached state.
    """
    mask = given.get("attention_mask")
    if isinstance(mask, PackedRows):
        return mask.attention_mask, mask.seq_idx
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    seq_idx, position_ids = given.get("seq_idx"), given.get("position_ids")
    if tokens is None:
        return mask, None
    batch, length = tokens.shape[:2]
    if seq_idx is not None:
        if seq_idx.shape != (batch, length):
            raise ValueError(
                f"seq_idx has shape {tuple(seq_idx.shape)}; it numbers the document of each of the (batch, tokens) = "
                f"{(batch, length)} tokens of this forward."
            )
        return mask, seq_idx
    if position_ids is None:
        return mask, None
    starts = _starts(position_ids, mask, batch, length)
    cache = given.get("cache_params")
    if cache is not None and cache.get_recurrent_state(0) is not None:
        # Whether a row goes on from the cache or starts anew would differ from row to row; seq_idx cannot say so.
        if bool(starts.any()):
            raise ValueError(
                "position_ids restart at 0 in a forward that goes on from a cached state. Start a document without a "
                "cache, or pass seq_idx, with which the first document of each row goes on from the cache."
            )
        return mask, None
    return mask, starts.cumsum(1, dtype=torch.int32)


def _starts(position_ids: Tensor, mask: Tensor | None, batch: int, length: int) -> Tensor:
    """(batch, length) bool: True at each token, padding apart, whose position is 0."""
    if position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        raise ValueError(
            f"position_ids have shape {tuple(position_ids.shape)}; Mamba reads from them where the documents of the "
            f"(batch, tokens) = {(batch, length)} tokens of this forward start."
        )
    starts = (position_ids == 0).expand(batch, length)
    if mask is not None and mask.ndim == 2:
        starts = starts & (mask[:, -length:] != 0)  # padding has position 0 as well, and may lie inside a document
    return starts
