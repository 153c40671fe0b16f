"""Small checkpoints in the original state-spaces format, written as mamba_ssm writes them, for the tests."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_mamba.checkpoints import CheckpointError

from .original_reference import Config, StateDict, is_mamba2

MAMBA = {"d_model": 32, "n_layer": 2, "vocab_size": 50, "pad_vocab_size_multiple": 8, "ssm_cfg": {}}
MAMBA["rms_norm"] = MAMBA["residual_in_fp32"] = MAMBA["fused_add_norm"] = True
SSD = {"layer": "Mamba2", "d_state": 16, "headdim": 16, "chunk_size": 8}
MAMBA2 = {
    **MAMBA,
    "ssm_cfg": SSD,
    "d_intermediate": 0,
    "attn_layer_idx": [],
    "attn_cfg": {},
    "tie_embeddings": True,
}


def mamba(**ssm) -> dict:
    return {**MAMBA, "ssm_cfg": ssm}


def mamba2(**ssm) -> dict:
    return {**MAMBA2, "ssm_cfg": {**SSD, **ssm}}


def save(directory: Path, config: dict, weights: dict, kind: str = "bin") -> str:
    """Writes a checkpoint: as mamba_ssm does (bin), as safetensors, or as two shards of either."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if kind.endswith("safetensors"):  # which refuses two names for one tensor
        weights = {name: value.clone().contiguous() for name, value in weights.items()}
    write = save_file if kind.endswith("safetensors") else torch.save
    stem, ending = ("model", ".safetensors") if write is save_file else ("pytorch_model", ".bin")
    if kind.startswith("sharded"):
        halves = [dict(list(weights.items())[part::2]) for part in (0, 1)]
        names = [f"{stem}-0000{part}-of-00002{ending}" for part in (1, 2)]
        for name, half in zip(names, halves, strict=True):
            write(half, directory / name)
        index = {"weight_map": {key: name for name, half in zip(names, halves, strict=True) for key in half}}
        (directory / f"{stem}{ending}.index.json").write_text(json.dumps(index))
    else:
        write(weights, directory / (stem + ending))
    return str(directory)


def message_of(call, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def random_checkpoint(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> StateDict:
    """A state dict in the original names and shapes; no weight is zero, one or equal to another."""
    ssm, d_model = config.get("ssm_cfg") or {}, config["d_model"]
    inner, width = ssm.get("expand", 2) * d_model, ssm.get("d_conv", 4)
    multiple = config.get("pad_vocab_size_multiple", 8)
    vocab = math.ceil(config["vocab_size"] / multiple) * multiple
    if is_mamba2(config):
        n, heads = ssm.get("d_state", 128), inner // ssm.get("headdim", 64)
        conv = inner + 2 * ssm.get("ngroups", 1) * n
        mixer = {"in_proj.weight": (inner + conv + heads, d_model), "A_log": (heads,), "D": (heads,)}
        mixer |= {"dt_bias": (heads,), "norm.weight": (inner,)}
    else:
        n, rank, conv = ssm.get("d_state", 16), ssm.get("dt_rank", "auto"), inner
        rank = math.ceil(d_model / 16) if rank == "auto" else rank
        mixer = {"in_proj.weight": (2 * inner, d_model), "A_log": (inner, n), "D": (inner,)}
        mixer |= {
            "x_proj.weight": (rank + 2 * n, inner),
            "dt_proj.weight": (inner, rank),
            "dt_proj.bias": (inner,),
        }
    mixer |= {"conv1d.weight": (conv, 1, width), "out_proj.weight": (d_model, inner)}
    if ssm.get("conv_bias", True):
        mixer["conv1d.bias"] = (conv,)
    if ssm.get("bias", False):
        mixer |= {"in_proj.bias": (mixer["in_proj.weight"][0],), "out_proj.bias": (d_model,)}
    shapes = {"backbone.embedding.weight": (vocab, d_model), "backbone.norm_f.weight": (d_model,)}
    for i in range(config["n_layer"]):
        shapes[f"backbone.layers.{i}.norm.weight"] = (d_model,)
        shapes |= {f"backbone.layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
    draw = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    for name, value in weights.items():
        if "embedding" in name:
            value *= 0.02  # as small as mamba_ssm draws them, so that the epsilon of the norms shows
        elif value.dim() > 1 and not name.endswith("A_log"):
            value *= value[0].numel() ** -0.5
        value += 1.0 if "norm" in name or name.endswith(".D") else 0.0
    head = weights["backbone.embedding.weight"]
    tied = config.get("tie_embeddings", True)
    weights["lm_head.weight"] = head if tied else torch.randn(head.shape, generator=draw) * head.std()
    return {name: value.to(dtype) for name, value in weights.items()}
