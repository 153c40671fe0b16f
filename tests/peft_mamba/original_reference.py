"""The original Mamba and Mamba-2 language models in float64, from their equations and the original parameter
names.

An independent implementation for the tests of checkpoint conversion: nothing is shared with transformers or
with mamba_ssm, every sum over time is a Python loop, and the config is read with the defaults of mamba_ssm
2.3.2.

    logits = reference_logits(config, state_dict, input_ids)  # (batch, length, padded vocabulary), float64

Sources: Gu and Dao 2023 (arXiv 2312.00752), equations 1 and 2 and algorithm 2; Dao and Gu 2024 (arXiv
2405.21060), sections 3 and 7.
"""

from __future__ import annotations

import math
from typing import Any

import torch

Config = dict[str, Any]
StateDict = dict[str, torch.Tensor]


def reference_logits(config: Config, state_dict: StateDict, input_ids: torch.Tensor) -> torch.Tensor:
    """input_ids (batch, length), int64 -> logits (batch, length, padded vocabulary), float64."""
    w = {name: value.double() for name, value in state_dict.items()}
    epsilon = config.get("norm_epsilon", 1e-5)
    mixer = mamba2_mixer if is_mamba2(config) else mamba_mixer
    residual = w["backbone.embedding.weight"][input_ids]
    for i in range(config["n_layer"]):
        layer = f"backbone.layers.{i}."
        normed = rms_norm(residual, w[layer + "norm.weight"], epsilon)
        own = {name.removeprefix(layer + "mixer."): v for name, v in w.items() if name.startswith(layer + "mixer.")}
        residual = residual + mixer(config, own, normed)
    head = "backbone.embedding.weight" if config.get("tie_embeddings", True) else "lm_head.weight"
    return rms_norm(residual, w["backbone.norm_f.weight"], epsilon) @ w[head].T


def mamba_mixer(config: Config, w: StateDict, u: torch.Tensor) -> torch.Tensor:
    """Selective scan, one state (channels, d_state) per sequence: h_t = exp(dt A) h + dt B x, y = C h + D
    x."""
    d_state = (config.get("ssm_cfg") or {}).get("d_state", 16)
    x, z = linear(u, w, "in_proj").chunk(2, dim=-1)
    x = silu(causal_conv(x, w))
    rank = w["dt_proj.weight"].shape[1]
    low, b, c = linear(x, w, "x_proj").split([rank, d_state, d_state], dim=-1)
    dt = softplus(linear(low, w, "dt_proj"))
    a = -torch.exp(w["A_log"])
    h = torch.zeros(x.shape[0], *a.shape, dtype=torch.float64)
    ys = []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None]
        h = torch.exp(step * a) * h + step * b[:, t, None, :] * x[:, t, :, None]
        ys.append((h * c[:, t, None, :]).sum(-1) + w["D"] * x[:, t])
    return linear(torch.stack(ys, dim=1) * silu(z), w, "out_proj")


def mamba2_mixer(config: Config, w: StateDict, u: torch.Tensor) -> torch.Tensor:
    """SSD, one scalar A per head, one state (headdim, d_state) per head, B and C shared by the heads of a
    group."""
    ssm = config.get("ssm_cfg") or {}
    head_dim, groups, d_state = ssm.get("headdim", 64), ssm.get("ngroups", 1), ssm.get("d_state", 128)
    inner = ssm.get("expand", 2) * config["d_model"]
    heads = inner // head_dim
    low, high = ssm.get("dt_limit", (0.0, math.inf))
    z, xbc, dt = linear(u, w, "in_proj").split([inner, inner + 2 * groups * d_state, heads], dim=-1)
    xbc = silu(causal_conv(xbc, w))
    x, b, c = xbc.split([inner, groups * d_state, groups * d_state], dim=-1)
    batch, length = u.shape[:2]
    dt = softplus(dt + w["dt_bias"]).clamp(low, high)
    a = -torch.exp(w["A_log"])
    x = x.reshape(batch, length, heads, head_dim)
    group_of = torch.arange(heads) // (heads // groups)
    b, c = (v.reshape(batch, length, groups, d_state)[:, :, group_of] for v in (b, c))
    h = torch.zeros(batch, heads, head_dim, d_state, dtype=torch.float64)
    ys = []
    for t in range(length):
        step = dt[:, t, :, None, None]
        h = torch.exp(step * a[:, None, None]) * h + step * x[:, t, :, :, None] * b[:, t, :, None, :]
        ys.append((h * c[:, t, :, None, :]).sum(-1) + w["D"][:, None] * x[:, t])
    y = torch.stack(ys, dim=1).reshape(batch, length, inner) * silu(z)
    y = rms_norm(y.reshape(batch, length, groups, -1), w["norm.weight"].reshape(groups, -1), 1e-5)
    return linear(y.reshape(batch, length, inner), w, "out_proj")


def linear(x: torch.Tensor, w: StateDict, name: str) -> torch.Tensor:
    return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)


def causal_conv(x: torch.Tensor, w: StateDict) -> torch.Tensor:
    """Depthwise over (batch, length, channels): out_t = bias + sum_k weight[k] x_(t - width + 1 + k)."""
    weight = w["conv1d.weight"][:, 0]
    width = weight.shape[1]
    padded = torch.cat([torch.zeros(x.shape[0], width - 1, x.shape[2], dtype=torch.float64), x], dim=1)
    taps = (weight[:, k] * padded[:, k : k + x.shape[1]] for k in range(width))
    return sum(taps, start=w.get("conv1d.bias", torch.zeros((), dtype=torch.float64)))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


def is_mamba2(config: Config) -> bool:
    return (config.get("ssm_cfg") or {}).get("layer") == "Mamba2"
