"""Frozen weights on the device in autocast's precision alone; the fp32 originals wait in host memory.

    with peft_mamba.precast_frozen_weights(model, torch.bfloat16):
        ...  # train under torch.autocast("cuda", torch.bfloat16)

Under a LoRA, autocast casts the same frozen weights in every forward and backward anew, always to the same values.
Inside they are cast already: a step casts none of them, computes the same, and they take half the memory.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from .kernels.room import with_room
from .mixers.projection import PRECAST, hooked, is_adapted, is_bare, is_linear, room_for
from .mixers.state import CachedMixer
from .precision import Precision

logger = logging.getLogger(__name__)


class PrecastError(ValueError):
    """Weights that cannot be held in half precision, or something that cannot be done while they are."""


@contextlib.contextmanager
def precast_frozen_weights(model: nn.Module, dtype: str | torch.dtype) -> Iterator[int]:
    """Hold the frozen fp32 weights of our mixers' linear layers in `dtype`, for computing under autocast to it.

    A weight that is trained, shared, or read by more than its layer's product (under DoRA, for one) stays as it is.
    Parameters stay the objects that they are. On a CPU the originals lie where they lay, so nothing is saved. Inside

    - state dicts, and so checkpoints, have the originals;
    - other autocast, or none, training the weights, loading them, adding and merging adapters through PEFT, copying and
      pickling the model are refused, as each would take half precision for the weights;
    - what wrote to the weights past all that (`layer.merge()`) is noticed at the end.

    At the end every original is back, on the device where its parameter is then.

    Args:
        dtype: bf16 or fp16.

    Yields:
        How many weights are held.

    Raises:
        PrecastError: `dtype` is fp32, or no weight can be held, or they are already. At the end: a weight was written
            to, which is lost.
        PrecisionError: `dtype` is no precision, or the device cannot compute in it.
        torch.OutOfMemoryError: at the end, there is no room for fp32; originals are then left in host memory.
    """
    precision = Precision.parse(dtype)
    if precision.autocast is None:
        raise PrecastError(f"dtype={dtype} is what the weights are in. Give bf16 or fp16, whichever autocast is to.")
    refuse_while_precast(model, "Casting")
    layers, others = _layers(model)
    if not layers:
        why = others or "there is no mixer of ours in the model; peft_mamba.use_mixers puts them there"
        raise PrecastError(f"No weight can be held in {precision.name}: {why}.")
    for device in {_base(layer).weight.device for layer in layers.values()}:
        precision.check_device(device)
    held: list[_Precast] = []
    try:
        for name, layer in layers.items():
            held.append(_Precast(name, layer, precision.autocast))
        # All originals have left the device before the first cast weight comes: one by one, each would take a part of
        # the memory that the original of another has left, and no other would fit into the rest.
        clear_device_cache()
        for each in held:
            each.place()
        logger.info("%d frozen weights are held in %s%s", len(held), precision.name, others and f"; {others}")
        yield len(held)
        if written := [each.name for each in held if each.written()]:
            raise PrecastError(
                f"Something wrote to {len(written)} of the weights that were held in {precision.name}, such as "
                f"{written[0]}; they are what they were before. Write to weights outside of precast_frozen_weights."
            )
    finally:
        devices = [each.give_back() for each in held]
        for each, device in zip(held, devices, strict=True):
            each.parameter.data = each.parameter.data.to(device)


def precastable(model: nn.Module) -> list[torch.Tensor]:
    """The weights that `precast_frozen_weights` would hold; the model may be on the meta device."""
    return [_base(layer).weight for layer in _layers(model)[0].values()]


def refuse_while_precast(model: nn.Module, doing: str) -> None:
    """Raises PrecastError if weights of `model` are held in half precision."""
    if any(PRECAST in vars(module) for module in model.modules()):
        raise PrecastError(f"{doing} takes fp32 weights; these are held in half. Leave precast_frozen_weights first.")


class _Precast:
    """One weight that is held. Its layer has this in its `__dict__`, where `project` finds it."""

    def __init__(self, name: str, adapted: nn.Module, dtype: torch.dtype) -> None:
        layer = _base(adapted)
        self.name, self.parameter = name, layer.weight
        self._layer, self._dtype, self._original = layer, dtype, layer.weight.data.cpu()
        self._device: torch.device | None = self.parameter.device  # until it is there again
        self.free = room_for(adapted, self.parameter, dtype)
        self.parameter.data = self._original.to(dtype)
        vars(layer)[PRECAST] = self
        self._hooks = (
            layer.register_state_dict_post_hook(functools.partial(self._give_original)),  # torch sets attributes on it
            layer.register_load_state_dict_pre_hook(self._refuse_loading),
        )

    def place(self) -> None:
        """Put the cast weight on the device, which it comes to from host memory."""
        assert self._device is not None
        cast = with_room(self.parameter.shape, self.free.columns, self._dtype, self._device, self.free.rows)
        self.parameter.data = cast.copy_(self.parameter.data)
        self._device = None

    def check(self, device: str) -> None:
        """Raises PrecastError unless the weight is computed with as what it is held for."""
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        weight = self._layer.weight
        if not autocast == weight.dtype == self._dtype or weight.requires_grad:
            raise PrecastError(
                f"{self.name} is held in {self._dtype}, frozen, for autocast to that. Now autocast is "
                f"{autocast or 'off'}, the weight {weight.dtype}{', to be trained' if weight.requires_grad else ''}. "
                "Leave precast_frozen_weights first."
            )

    def written(self) -> bool:
        """Whether the layer has another weight than what the original was cast to."""
        now = self._layer.weight
        if now is not self.parameter or now.dtype != self._dtype:
            return True
        cast = self._original.to(now.device).to(self._dtype)
        return not torch.equal(cast.view(torch.int16), now.data.view(torch.int16))  # bits: a NaN equals itself

    def give_back(self) -> torch.device:
        """Let the parameter have its original, in host memory; the device where it was."""
        device = self._device or self.parameter.device
        self.parameter.data = self._original
        for hook in self._hooks:
            hook.remove()
        del vars(self._layer)[PRECAST]
        return device

    def _give_original(self, layer: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict[f"{prefix}weight"] = self._original

    def _refuse_loading(self, layer: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}weight" in state_dict:
            refuse_while_precast(layer, f"Loading {self.name}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        refuse_while_precast(self._layer, "Copying or pickling the model")


def _base(layer: nn.Module) -> nn.Linear:
    """The linear layer that an adapter is on, or this one."""
    base: Any = getattr(layer, "base_layer", layer)
    return base


def _layers(model: nn.Module) -> tuple[dict[str, nn.Module], str]:
    """The layers of our mixers whose weights can be held, by name; how many others there are, and why."""
    places = Counter(
        _place(each)
        for module in model.modules()
        for each in (*module._parameters.values(), *module._buffers.values())
        if each is not None
    )
    layers: dict[str, nn.Module] = {}
    others: Counter[str] = Counter()
    mixers: list[tuple[str, Any]] = [each for each in model.named_modules() if isinstance(each[1], CachedMixer)]
    for prefix, mixer in mixers:
        for name, layer in mixer.named_children():
            if not (isinstance(layer, nn.Linear) or is_adapted(layer)):
                continue
            if reason := _why_not(layer, _base(layer), places):
                others[reason] += 1
            else:
                layers[f"{prefix}.{name}"] = layer
    return layers, ", ".join(f"{count} {reason}" for reason, count in others.items())


def _place(tensor: torch.Tensor) -> int:
    """What tensors that share memory have in common."""
    return tensor.untyped_storage().data_ptr() or id(tensor)  # 0 on the meta device


def _why_not(layer: nn.Module, base: nn.Module, places: Counter[int]) -> str | None:
    """What keeps a layer's weight from being held: it is to change, or more than the layer's product reads it."""
    if not is_linear(base) or not (layer is base or type(layer) is LoraLinear):
        return f"are {type(base).__name__} in {type(layer).__name__}"
    if isinstance(layer, LoraLinear) and (layer.lora_variant or layer.merged):
        return "have an adapter merged into them" if layer.merged else "are under DoRA or the like, which reads them"
    if hooked(layer) or not is_bare(base):
        return "have hooks, a forward of their own or a parametrisation"
    if base.weight.requires_grad:
        return "are trained"
    if base.weight.dtype != torch.float32:
        return f"are {base.weight.dtype}"
    return "share their memory" if places[_place(base.weight)] > 1 else None
