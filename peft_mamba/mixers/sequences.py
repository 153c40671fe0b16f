"""Sequences of different lengths laid end to end in one row, each from a state of its own: forks without padding.

    pool = StatePool(model, slots=2)
    model.backbone(shared[None], attention_mask=PackedSequences.of([len(shared)], pool, target=[1]), use_cache=False)
    model.backbone(branches[None], attention_mask=PackedSequences.of([3, 5], pool, source=[1, 1]), use_cache=False)

The second forward continues the first one twice. Nothing in it waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

Tensor = torch.Tensor


class StatePool:
    """The states of all mixers of a model in numbered slots, float32. Slot 0 is the state before any token.

    Args:
        model: with mixers of this package, all on one device.
        slots: how many states besides slot 0.
    """

    def __init__(self, model: nn.Module, slots: int) -> None:
        self.slots = slots
        self._conv: dict[int, Tensor] = {}
        self._ssm: dict[int, Tensor] = {}
        for mixer in _mixers(model):
            self.device = mixer.A_log.device
            conv, ssm = _shapes(mixer)
            self._conv[mixer.layer_idx] = torch.zeros(slots + 1, *conv, device=self.device)
            self._ssm[mixer.layer_idx] = torch.zeros(slots + 1, *ssm, device=self.device)

    @staticmethod
    def bytes_per_state(model: nn.Module) -> int:
        """Bytes that one slot takes over all layers of `model`."""
        return 4 * sum(torch.Size(shape).numel() for mixer in _mixers(model) for shape in _shapes(mixer))

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the convolution's and the scan's states in `slots`: (S, C, K) and (S, D, N) or (S, H, P, N)."""
        return self._conv[layer].index_select(0, slots), self._ssm[layer].index_select(0, slots)

    def write(self, layer: int, slots: Tensor, conv: Tensor, ssm: Tensor) -> None:
        """Overwrite `slots`, none of which occurs twice."""
        self._conv[layer].index_copy_(0, slots, conv.float())
        self._ssm[layer].index_copy_(0, slots, ssm.float())


def _mixers(model: nn.Module) -> list[Any]:
    from .state import CachedMixer  # which knows this module

    return [module for module in model.modules() if isinstance(module, CachedMixer)]


def _shapes(mixer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    conv = (mixer.conv1d.weight.shape[0], mixer.conv_kernel_size)
    if mixer.A_log.ndim == 2:
        return conv, tuple(mixer.A_log.shape)
    return conv, (mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)


class PackedSequences(NamedTuple):
    """What takes the place of `attention_mask` on its way to a mixer where a row holds sequences with own states.

    cu_seqlens: (S+1,) int32; sequence s is the tokens cu_seqlens[s] to cu_seqlens[s+1] of a batch of one row.
    pool: where states are read from and left; None: every sequence starts from nothing and leaves nothing.
    source: (S,) int64, the slot that each sequence goes on from; None: all start from nothing.
    kept, target: (F,) int64, sequences whose final state goes to a slot, and that slot; None: none does.
    """

    cu_seqlens: Tensor
    pool: StatePool | None = None
    source: Tensor | None = None
    kept: Tensor | None = None
    target: Tensor | None = None

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        pool: StatePool,
        source: Sequence[int] | None = None,
        target: Sequence[int] | None = None,
    ) -> PackedSequences:
        """From numbers on the host; in `target` 0 stands for a state that is not kept.

        Raises:
            ValueError: source or target have not one slot a sequence.
        """
        for name, slots in (("source", source), ("target", target)):
            if slots is not None and len(slots) != len(lengths):
                raise ValueError(f"{name} has {len(slots)} slots for {len(lengths)} sequences.")
        device = pool.device

        def on_device(numbers: Any) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=device)

        bounds = on_device([0, *lengths]).cumsum(0, dtype=torch.int32)
        kept = [s for s, slot in enumerate(target or ()) if slot]
        return cls(
            bounds,
            pool,
            None if source is None else on_device(source),
            on_device(kept) if kept else None,
            on_device([target[s] for s in kept]) if kept and target else None,
        )


def sequence_windows(x: Tensor, before: Tensor | None, cu_seqlens: Tensor, width: int) -> Tensor:
    """(S, C, width): the last `width` inputs up to each sequence's end, for inputs x (1, L, C).

    Args:
        before: (S, C, width), the inputs before each sequence; None: there were none.
    """
    starts, stops = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    place = stops - starts + torch.arange(-width, 0, device=x.device)  # (S, width), negative before the first token
    inside = (place >= 0)[:, None]
    if x.shape[1] == 0:
        windows = x.new_zeros(len(place), x.shape[2], width)
    else:
        windows = x[0][(starts + place).clamp_min(0)].transpose(1, 2)
    if before is None:
        return windows.masked_fill(~inside, 0.0)
    earlier = before.gather(2, (width + place).clamp(0, width - 1)[:, None].expand_as(before))
    return torch.where(inside, windows, earlier)
