"""Which modules a preset adapts, in one table: (family, preset) to module names.

    all     every linear layer inside the network; as in PEFT's "all-linear", the output head is not one of them
    sll     the selected linear layers
    w       W alone, the layer that computes Δ, B and C of every token: a LoRA on it ties their adaptation
    not-w   every linear layer but W

Sources: `all`, and `sll` for Mamba and Pythia: the ALL and SLL configurations of "Mamba State-Space Models Are
Lyapunov-Stable Learners" (2406.00209); SLL is also the example that transformers' documentation gives for Mamba. Its W
is x_proj in Mamba and in_proj in Mamba-2; `w` against `not-w` is its ablation. `sll` for Mamba-2 is the same selection
among the layers that Mamba-2 has: it lacks x_proj and dt_proj, whose work in_proj does.
"""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

PRESETS = ("all", "sll", "w", "not-w")

# Family (a transformers model_type) to preset to module names, matched as suffixes of the full name.
MODULES: dict[str, dict[str, tuple[str, ...]]] = {
    "mamba": {
        "all": ("in_proj", "x_proj", "dt_proj", "out_proj"),
        "sll": ("x_proj", "embeddings", "in_proj", "out_proj"),
        "w": ("x_proj",),
        "not-w": ("in_proj", "dt_proj", "out_proj"),
    },
    "mamba2": {
        "all": ("in_proj", "out_proj"),
        "sll": ("embeddings", "in_proj", "out_proj"),
        "w": ("in_proj",),
        "not-w": ("out_proj",),
    },
    "gpt_neox": {
        "all": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        "sll": ("dense", "embed_in", "query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
    },
}
MAMBA_FAMILIES = ("mamba", "mamba2")


class PresetError(ValueError):
    """A preset that does not exist, or that the model's family lacks; the message names those there are."""


def family_of(model: nn.Module) -> str | None:
    """The model's `config.model_type`; None for a module that is no transformers model."""
    config = getattr(model, "config", None)
    return config.model_type if isinstance(config, PretrainedConfig) else None


def check_preset(preset: str) -> None:
    """Raises PresetError unless `preset` is the name of one."""
    if preset not in PRESETS:
        raise PresetError(f"There is no preset {preset!r}; there are {', '.join(PRESETS)}.")


def preset_modules(model: nn.Module, preset: str) -> list[str]:
    """The target modules of a preset on this model, sorted.

    Suffixes from the table for the families in it; for any other model `all` is the full name of every linear layer
    but the output head.

    Raises:
        PresetError: no such preset, or the family lacks it.
    """
    check_preset(preset)
    family = family_of(model)
    if family in MODULES:
        presets = MODULES[family]
        if preset not in presets:
            raise PresetError(f"{family} has no preset {preset!r}; it has {', '.join(presets)}.")
        return sorted(presets[preset])
    if preset != "all":
        raise PresetError(
            f"{family or type(model).__name__} has no preset {preset!r}; beside {', '.join(MODULES)} there is only all."
        )
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return sorted(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    )
