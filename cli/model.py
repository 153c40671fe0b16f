"""The model that a run trains: fp32 weights, our mixers, the preset's adapter with ranks that its layers can hold."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from peft_mamba import MambaLoraConfig, checkpoints, preset_modules, use_mixers

from .settings import ModelFacts, Settings


def skeleton(settings: dict[str, Any]) -> PreTrainedModel:
    """The model without its weights, on the meta device: names and shapes from its config alone.

    Raises:
        CheckpointError: there is no such checkpoint, or it is no causal language model.
    """
    config = checkpoints.load_config(
        settings["model"],
        revision=settings["revision"],
        trust_remote_code=settings["trust_remote_code"],
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=settings["trust_remote_code"]
        )


def facts(model: PreTrainedModel) -> ModelFacts:
    """What the recipes' defaults depend on."""
    return ModelFacts(model.config.model_type, model.num_parameters())


def load(settings: Settings, device: torch.device) -> PreTrainedModel:
    """The weights, in fp32 on `device`, with our mixers."""
    model = checkpoints.AutoMambaForCausalLM.from_pretrained(
        settings.model,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        device_map={"": device},
    )
    use_mixers(model)
    return model


def load_tokenizer(settings: Settings) -> Any:
    """The checkpoint's tokenizer; GPT-NeoX's for an original checkpoint, which has none."""
    source = checkpoints.tokenizer_source(settings.model, settings.revision)
    revision = settings.revision if source == settings.model else None
    return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=settings.trust_remote_code)


def with_adapter(model: PreTrainedModel, settings: Settings) -> tuple[Any, dict[str, int]]:
    """The model under the preset's LoRA, and the modules whose rank is capped with their ranks.

    A layer of in × out features holds no update of a rank above min(in, out): there r is that, and alpha goes down with
    it, so that the update is scaled by alpha/r as everywhere else. With preset `full` every weight trains.

    Raises:
        PresetError: the model's family lacks the preset.
    """
    set_seed(settings.seed)  # the adapter's initial weights
    if settings.preset == "full":
        model.requires_grad_(True)
        return model, {}
    assert settings.r is not None and settings.alpha is not None and settings.dropout is not None
    ranks = capped_ranks(model, settings.preset, settings.r)
    config = MambaLoraConfig(
        preset=settings.preset,
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a float serves; PEFT only annotates an int
        lora_dropout=settings.dropout,
        rank_pattern=dict(ranks),
        alpha_pattern={name: settings.alpha * rank / settings.r for name, rank in ranks.items()},
    )
    return peft.get_peft_model(model, config), ranks


def capped_ranks(model: nn.Module, preset: str, r: int) -> dict[str, int]:
    """Kind of module to the largest rank that all of its layers hold, for those that cannot hold r."""
    ranks: dict[str, int] = {}
    targets = preset_modules(model, preset)
    for name, module in model.named_modules():
        kind = next((target for target in targets if name == target or name.endswith(f".{target}")), None)
        weight = getattr(module, "weight", None)
        if kind is not None and weight is not None and min(weight.shape) < r:
            ranks[kind] = min(min(weight.shape), ranks.get(kind, r))
    return ranks


def matched_modules(model: nn.Module) -> dict[str, int]:
    """Kind of module to the number of them that train: adapted layers, or every module with weights of its own."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner = name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
            counts.setdefault(owner, 0)
    kinds: dict[str, int] = {}
    for owner in counts:
        kind = owner.rpartition(".")[2]
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds
