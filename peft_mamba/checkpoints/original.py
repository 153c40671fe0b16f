"""The original state-spaces format, turned into the transformers classes.

A checkpoint that `mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel` saved is a config.json with `d_model`,
`n_layer` and `ssm_cfg`, and a state dict whose names are those of transformers but for the embedding's. What
differs are the defaults: each table below gives the transformers field of an original key *and the original's
default*, because those of the two libraries are not the same (Mamba-2: n_groups 1 against 8, tied embeddings,
token ids). What the transformers classes cannot compute is refused by name: no checkpoint is ever almost
converted.

Sources: mamba_ssm 2.3.2, `models/config_mamba.py`, `models/mixer_seq_simple.py`, `modules/mamba_simple.py`,
`modules/mamba2.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from .source import CheckpointError

# original key -> (field of MambaConfig, default of mamba_ssm.modules.mamba_simple.Mamba)
MAMBA_FIELDS: dict[str, tuple[str, Any]] = {
    "d_state": ("state_size", 16),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "dt_rank": ("time_step_rank", "auto"),
    "conv_bias": ("use_conv_bias", True),
    "bias": ("use_bias", False),
    "dt_min": ("time_step_min", 0.001),
    "dt_max": ("time_step_max", 0.1),
    "dt_init": ("time_step_init_scheme", "random"),
    "dt_scale": ("time_step_scale", 1.0),
    "dt_init_floor": ("time_step_floor", 1e-4),
}
# original key -> (field of Mamba2Config, default of mamba_ssm.modules.mamba2.Mamba2)
MAMBA2_FIELDS: dict[str, tuple[str, Any]] = {
    "d_state": ("state_size", 128),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "headdim": ("head_dim", 64),
    "ngroups": ("n_groups", 1),
    "chunk_size": ("chunk_size", 256),
    "conv_bias": ("use_conv_bias", True),
    "bias": ("use_bias", False),
    "dt_limit": ("time_step_limit", (0.0, float("inf"))),
    "dt_min": ("time_step_min", 0.001),
    "dt_max": ("time_step_max", 0.1),
    "dt_init_floor": ("time_step_floor", 1e-4),
}
# Keys that choose a kernel or an initialisation: a trained checkpoint computes the same whatever they say.
NO_EFFECT = {
    "model": {"fused_add_norm", "attn_cfg", "initializer_cfg", "architectures", "dtype", "torch_dtype"},
    "mamba": {"use_fast_path"},
    "mamba2": {"use_mem_eff_path", "sequence_parallel", "process_group", "conv_init", "A_init_range"},
}
# key -> (the one value that the transformers classes compute, what another would need)
MODEL_ONLY: dict[str, tuple[Any, str]] = {
    "rms_norm": (True, "LayerNorm blocks, and the transformers classes have RMSNorm alone"),
    "attn_layer_idx": ([], "attention layers: it is a hybrid model"),
    "d_intermediate": (0, "an MLP in each block"),
}
MAMBA2_ONLY: dict[str, tuple[Any, str]] = {
    "rmsnorm": (True, "a mixer without its gated norm"),
    "norm_before_gate": (False, "a norm before the gate, and Mamba2ForCausalLM has it after"),
    "D_has_hdim": (False, "a D of its own for each channel, and Mamba2ForCausalLM has one for each head"),
    "learnable_init_states": (False, "trained initial states"),
}
NORM_EPSILON = 1e-5


def convert_config(original: Mapping[str, Any], source: str) -> MambaConfig | Mamba2Config:
    """The transformers config of an original one (the contents of its config.json).

    `vocab_size` becomes the padded one, which the embedding has: the next multiple of
    `pad_vocab_size_multiple`. Raises CheckpointError, naming `source` and the key, for a value that the
    transformers classes cannot compute, an unknown key, and a value of the wrong kind.
    """
    rest = dict(original)
    ssm_cfg = dict(rest.pop("ssm_cfg", None) or {})
    layer = ssm_cfg.pop("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise CheckpointError(f"{source}: ssm_cfg.layer is {layer!r}, expected Mamba1 or Mamba2")
    family = "mamba2" if layer == "Mamba2" else "mamba"

    d_model = _whole(rest.pop("d_model"), "d_model", source)
    vocab_size = _whole(rest.pop("vocab_size", 50277), "vocab_size", source)
    multiple = _whole(rest.pop("pad_vocab_size_multiple", 8), "pad_vocab_size_multiple", source)
    fields: dict[str, Any] = {
        "hidden_size": d_model,
        "num_hidden_layers": _whole(rest.pop("n_layer"), "n_layer", source),
        "vocab_size": -(-vocab_size // multiple) * multiple,
        "layer_norm_epsilon": float(rest.pop("norm_epsilon", NORM_EPSILON)),
        "residual_in_fp32": rest.pop("residual_in_fp32", True),
        "tie_word_embeddings": rest.pop("tie_embeddings", True),
        # <|endoftext|> of the tokenizer that these models were trained with, unlike Mamba2Config's 1, 0, 2.
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    _take_only(rest, MODEL_ONLY, "", source)
    _refuse_unknown(rest, NO_EFFECT["model"], "", source)

    table = MAMBA2_FIELDS if family == "mamba2" else MAMBA_FIELDS
    fields |= {name: ssm_cfg.pop(key, default) for key, (name, default) in table.items()}
    fields["expand"] = _whole(fields["expand"], "ssm_cfg.expand", source)
    if family == "mamba2":
        if fields["layer_norm_epsilon"] != NORM_EPSILON:
            raise CheckpointError(
                f"{source}: norm_epsilon is {fields['layer_norm_epsilon']}, but the mixers' gated norm has "
                f"{NORM_EPSILON} in the original, and Mamba2ForCausalLM has one epsilon for both"
            )
        _take_only(ssm_cfg, MAMBA2_ONLY, "ssm_cfg.", source)
        fields |= _heads(fields, ssm_cfg.pop("d_ssm", None), source)
        fields["time_step_limit"] = tuple(float(bound) for bound in fields["time_step_limit"])
    _refuse_unknown(ssm_cfg, NO_EFFECT[family], "ssm_cfg.", source)
    try:
        return Mamba2Config(**fields) if family == "mamba2" else MambaConfig(**fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {' '.join(str(error).split())}") from error


def convert_state_dict(original: Mapping[str, torch.Tensor], *, tied: bool, source: str) -> dict[str, torch.Tensor]:
    """The same tensors (not copied) under the names of MambaForCausalLM or Mamba2ForCausalLM.

    Raises CheckpointError if the embeddings are tied and the file has two that differ.
    """
    prefix, renamed = "backbone.embedding.", "backbone.embeddings."
    state = {(renamed + k[len(prefix) :] if k.startswith(prefix) else k): v for k, v in original.items()}
    head, embedding = state.get("lm_head.weight"), state.get("backbone.embeddings.weight")
    if tied and head is not None and embedding is not None and not torch.equal(head, embedding):
        raise CheckpointError(
            f"{source}: tie_embeddings is true, yet lm_head.weight and backbone.embedding.weight differ. Set "
            "tie_embeddings to false in config.json if the model was trained so."
        )
    return state


def _heads(fields: Mapping[str, Any], d_ssm: int | None, source: str) -> dict[str, int]:
    """num_heads of a Mamba-2 config, once its inner width, heads and groups are known to fit."""
    inner, head_dim, groups = (
        fields["expand"] * fields["hidden_size"],
        fields["head_dim"],
        fields["n_groups"],
    )
    if d_ssm not in (None, inner):
        raise CheckpointError(
            f"{source}: ssm_cfg.d_ssm is {d_ssm}, which needs a gated MLP in the mixer for the other "
            f"{inner - d_ssm} of its {inner} channels; Mamba2ForCausalLM has none"
        )
    if inner % _whole(head_dim, "ssm_cfg.headdim", source) != 0:
        raise CheckpointError(
            f"{source}: ssm_cfg.headdim is {head_dim}, expected a divisor of expand * d_model = {inner}"
        )
    heads = inner // head_dim
    if heads % _whole(groups, "ssm_cfg.ngroups", source) != 0:
        raise CheckpointError(f"{source}: ssm_cfg.ngroups is {groups}, expected a divisor of the {heads} heads")
    # The original normalises each group for itself. transformers once took all channels together.
    if groups > 1 and "group_size" not in inspect.signature(MambaRMSNormGated).parameters:
        raise CheckpointError(
            f"{source}: ssm_cfg.ngroups is {groups}, which needs a gated norm by groups, and that of this "
            "transformers release has none. Upgrade transformers."
        )
    return {"num_heads": heads}


def _take_only(rest: dict[str, Any], only: Mapping[str, tuple[Any, str]], prefix: str, source: str) -> None:
    """Takes out of `rest` the keys of `only`, and refuses another value than the one given there."""
    for key, (value, needs) in only.items():
        found = rest.pop(key, value)
        if found != value and not (found is None and not value):
            raise CheckpointError(
                f"{source}: {prefix}{key} is {found!r}, which needs {needs}. Only {value!r} can be converted."
            )


def _refuse_unknown(rest: Mapping[str, Any], ignored: set[str], prefix: str, source: str) -> None:
    unknown = sorted(key for key in rest if key not in ignored and not key.startswith("_"))
    if unknown:
        names = ", ".join(f"{prefix}{key}" for key in unknown)
        raise CheckpointError(
            f"{source}: config.json has keys that mamba_ssm 2.3.2 does not know: {names}. Whether they "
            "change the computation cannot be told; take them out of config.json if they do not."
        )


def _whole(value: Any, key: str, source: str) -> int:
    """A positive whole number (2.0 counts as one)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 1:
        raise CheckpointError(f"{source}: {key} is {value!r}, expected a positive whole number")
    return int(value)
