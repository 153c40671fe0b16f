"""Name the place where numbers stopped being finite.

A NaN logit has an argmax of 0 and a NaN log-likelihood: lm-eval would report a score at chance level. We stop instead
and say which layer produced it, since the remedy differs: broken weights, or fp16's range (65504) exceeded by one
layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class NonFiniteError(FloatingPointError):
    """A model produced NaN or infinity where a probability is needed; the message names the first layer that did."""


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    if isinstance(value, dict):  # a transformers ModelOutput is one
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return []


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(value))


def first_nonfinite(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Run `forward` once more and name the first module whose inputs were finite and whose output was not.

    Args:
        model: the model that `forward` calls.
        forward: a call without arguments that repeats the computation in question, in its precision.

    Returns:
        e.g. `backbone.layers.3.mixer.out_proj (Linear) computed inf in float16`, or, when a parameter is not finite
        itself, `parameter backbone.layers.3.norm.weight holds nan`; None if everything was finite.
    """
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"parameter {name} holds {_kind([parameter])}"
    found: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            # Inner modules finish before the ones around them, so the first to be seen is the innermost.
            if not found and _finite((args, kwargs)) and not _finite(output):
                bad = [tensor for tensor in _tensors(output) if not _finite(tensor)]
                dtype = str(bad[0].dtype).removeprefix("torch.")
                found.append(f"{name} ({type(module).__name__}) computed {_kind(bad)} in {dtype}")

        return hook

    hooks = [
        module.register_forward_hook(watch(name or "the model"), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _kind(tensors: list[torch.Tensor]) -> str:
    return "nan" if any(bool(tensor.isnan().any()) for tensor in tensors) else "inf"
