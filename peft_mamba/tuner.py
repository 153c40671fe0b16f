"""PEFT's LoRA tuner, for Mamba and Mamba-2 as well: importing this module puts it where PEFT looks for LoRA.

Through PEFT's registry of tuners it serves get_peft_model, PeftModel.from_pretrained, transformers' add_adapter and
TRL's peft_config alike, for any LoraConfig. A model of another family is left to PEFT's own LoraModel.
"""

from __future__ import annotations

import logging

import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import (
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
    _maybe_include_all_linear_layers,
)
from peft.utils.other import get_pattern_key
from torch import nn

from .adapter_io import misfit
from .config import MambaLoraConfig
from .mixers import use_mixers
from .precast import refuse_while_precast
from .presets import MAMBA_FAMILIES, family_of
from .report import watch_first_step
from .ties import base_layer, break_tie, tied_adapters

logger = logging.getLogger(__name__)

# Vocabularies are padded to multiples of up to this.
MAX_VOCABULARY_PADDING = 128
# Module name to why an adapter on it cannot take effect.
CANNOT_ADAPT = {
    "conv1d": "its kernels read the weight of this depthwise convolution (a few taps a channel) directly, past any "
    "adapter. To train it whole, name it in modules_to_save",
}


class TargetError(ValueError):
    """An adapter that cannot take effect on this model as it is asked for; the message names module and reason."""


def is_mamba(model: nn.Module) -> bool:
    """Whether the model is of a family whose mixers this package provides."""
    return family_of(model) in MAMBA_FAMILIES


class MambaLoraModel(LoraModel):
    """LoraModel that checks every target before it changes anything, and runs adapter-aware mixers on Mamba models."""

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """As in LoraModel; presets are resolved here.

        Raises:
            PresetError: the model's family lacks the preset.
            TargetError: on a Mamba model, a target that is not there, cannot be adapted, or is smaller than the rank.
            PrecastError: its frozen weights are held in half precision, which the new adapter would get too.
        """
        refuse_while_precast(model, "Adding an adapter")
        config = self.peft_config[adapter_name]
        if isinstance(config, MambaLoraConfig):
            config = self.peft_config[adapter_name] = config.resolve(model)
        if is_mamba(model):
            self._check_targets(config, model)
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )
        if is_mamba(model):
            use_mixers(model)
            if not config.inference_mode:
                watch_first_step(model)

    def _check_targets(self, config, model: nn.Module) -> None:
        """Raises TargetError if any part of what `config` names could not take effect on this Mamba model."""
        if config.target_parameters:
            raise TargetError(
                f"target_parameters={sorted(config.target_parameters)}: PEFT adapts a bare parameter by wrapping the "
                "module that owns it, and the mixers read theirs directly. Name modules in target_modules."
            )
        config = self._prepare_adapter_config(config, self.get_model_config(model))
        config = _maybe_include_all_linear_layers(config, model)
        modules = [
            (name, module)
            for name, module in model.named_modules()
            if name and not any(f".{part}." in f".{name}." for part in ("base_layer", "lora_A", "lora_B"))
        ]
        if isinstance(config.target_modules, (set, list)):
            absent = [
                target
                for target in sorted(config.target_modules)
                if not any(name == target or name.endswith(f".{target}") for name, _ in modules)
            ]
            if absent:
                raise TargetError(f"{family_of(model)} has no module {', '.join(absent)} to adapt.")
        for name, module in modules:
            if self._check_target_module_exists(config, name):
                _check_target(config, name, module)

    def _check_target_module_compatiblity(self, peft_config, model: nn.Module, target_name: str) -> None:
        """PEFT refuses out_proj on Mamba because fused kernels read its weight; these mixers call the module."""
        if not is_mamba(model):
            super()._check_target_module_compatiblity(peft_config, model, target_name)

    def _create_and_replace(  # type: ignore[override]  # LoraModel's signature, which differs from its parent's
        self, lora_config, adapter_name, target, target_name, parent, current_key, *, parameter_name=None
    ) -> None:
        try:
            super()._create_and_replace(
                lora_config, adapter_name, target, target_name, parent, current_key, parameter_name=parameter_name
            )
        except ValueError as error:
            if not is_mamba(self.model):
                raise
            raise TargetError(f"{current_key} ({type(target).__name__}) cannot be adapted: {error}") from error
        if is_mamba(self.model):
            _check_layer(current_key, getattr(parent, target_name))

    def _check_tied_modules(self, model: nn.Module, peft_config) -> None:
        """PEFT warns here that merging into tied embeddings goes wrong; on a Mamba model it does not."""
        if peft_config.ensure_weight_tying or not is_mamba(model):
            super()._check_tied_modules(model, peft_config)

    def _check_merge_allowed(self) -> None:
        """Called before every merge, in place or for good: tied embeddings under an adapter become two matrices.

        Raises:
            PrecastError: frozen weights are held in half precision.
        """
        refuse_while_precast(self.model, "Merging an adapter")
        if not is_mamba(self.model):
            super()._check_merge_allowed()
        elif tied_adapters(self.model):
            break_tie(self.model)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """As in LoraModel; for a Mamba model, weights without a layer and layers without theirs are a TargetError."""
        weights = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if is_mamba(model):
            weights = _without_vocabulary_padding(model, weights)
            _check_weights(model, adapter_name, weights)
        return weights


def _check_target(config, name: str, module: nn.Module) -> None:
    kind = name.rpartition(".")[2]
    if kind in CANNOT_ADAPT:
        raise TargetError(f"{name} cannot be adapted: {CANNOT_ADAPT[kind]}.")
    base = base_layer(module)
    if isinstance(base, nn.Linear):
        size = min(base.in_features, base.out_features)
    elif isinstance(base, nn.Embedding):
        size = min(base.num_embeddings, base.embedding_dim)
    else:
        return  # left to PEFT, which adapts what it has a layer for and refuses the rest
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    if rank > size and not config.inference_mode:  # a waste to train; harmless in an adapter that is trained already
        raise TargetError(
            f"{name} has rank {size} at most, and r={rank} is more. Lower r, or cap this layer alone: "
            f"rank_pattern={{{kind!r}: {size}}}."
        )


def _check_layer(name: str, layer: nn.Module) -> None:
    """Raises TargetError where PEFT has put its layer for plain weights on a quantised one that it has no layer for."""
    if type(layer) in (LoraLinear, LoraEmbedding):
        base = base_layer(layer)
        dtype = base.get_parameter("weight").dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise TargetError(
                f"{name} cannot be adapted: its weight is quantised ({type(base).__name__}, {dtype}), and PEFT has no "
                "LoRA layer for it. Load the base model in fp32, fp16, bf16 or a bitsandbytes format."
            )


def _without_vocabulary_padding(model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights` less the rows of vocabulary entries that this model was cut by.

    A vocabulary is padded beyond its tokenizer, to a multiple of a power of two, and lm-eval's `peft=` cuts the model's
    embeddings to the tokenizer before it loads the adapter. Rows of an adapter on them go the same way: no token has
    the ids of those that are cut. (Not with DoRA, whose norms are over all of the vocabulary.)
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    cut = {}
    for name, tensor in weights.items():
        axis = 1 if ".lora_embedding_A." in name else 0 if ".lm_head.lora_B." in name else None
        dora = f"{name.partition('.lora_')[0]}.lora_magnitude_vector"
        if axis is None or name not in shapes or any(other.startswith(dora) for other in weights):
            continue
        rows = shapes[name][axis]
        if 0 < tensor.shape[axis] - rows < MAX_VOCABULARY_PADDING:
            logger.warning("%s: cut from %d rows to the %d of the model.", name, tensor.shape[axis], rows)
            cut[name] = tensor.narrow(axis, 0, rows)
    return weights | cut


def _check_weights(model: nn.Module, adapter_name: str, weights: dict[str, torch.Tensor]) -> None:
    """Raises TargetError unless `weights` are, name by name and shape by shape, those of the adapter on `model`."""
    prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
    adapter = _filter_state_dict_by_key_prefixes(model.state_dict(), prefixes)
    expected = {name: tensor.shape for name, tensor in adapter.items()}
    brought = {name: tensor.shape for name, tensor in weights.items() if ".lora_" in name}
    wrong = [
        f"{name} has shape {tuple(shape)}, the model's layer {tuple(expected[name])}"
        for name, shape in brought.items()
        if name in expected and shape != expected[name]
    ]
    if problem := misfit(brought.keys(), expected.keys(), wrong):
        raise TargetError(f"The adapter {problem}.")


def register() -> None:
    """Make MambaLoraModel the tuner that PEFT uses for LoRA."""
    current = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA]
    if current not in (LoraModel, MambaLoraModel):
        logger.warning(
            "peft_mamba takes the place of %s.%s as PEFT's LoRA tuner.", current.__module__, current.__name__
        )
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = MambaLoraModel
