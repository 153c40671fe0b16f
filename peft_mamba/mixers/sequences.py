"""Sequences of different lengths laid end to end in one row, each from a state of its own: forks without padding.

    pool = StatePool(model, slots=2)
    model.backbone(shared[None], attention_mask=PackedSequences.of([len(shared)], pool, target=[1]), use_cache=False)
    model.backbone(branches[None], attention_mask=PackedSequences.of([3, 5], pool, source=[1, 1]), use_cache=False)

The second forward continues the first one twice. Nothing in it waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

Tensor = torch.Tensor


class StatePool:
    """The states of all mixers of a model in numbered slots, float32. Slot 0 is the state before any token; what is in
    another before it is written to is undefined.

    Of the convolution's inputs a slot holds the K - 1 that reach beyond its last token, in the order in which kernels
    take them, (K - 1, C).

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
            self._conv[mixer.layer_idx] = torch.empty(slots + 1, *conv, device=self.device)
            self._ssm[mixer.layer_idx] = torch.empty(slots + 1, *ssm, device=self.device)
            for states in (self._conv[mixer.layer_idx], self._ssm[mixer.layer_idx]):
                states[0].zero_()

    @staticmethod
    def bytes_per_state(model: nn.Module) -> int:
        """Bytes that one slot takes over all layers of `model`."""
        return 4 * sum(torch.Size(shape).numel() for mixer in _mixers(model) for shape in _shapes(mixer))

    def conv(self, layer: int, slots: Tensor) -> Tensor:
        """(S, C, K-1): copies of the convolution's states in `slots`, which are small."""
        return self._conv[layer].index_select(0, slots).transpose(1, 2)

    def ssm(self, layer: int) -> Tensor:
        """(slots + 1, D, N) or (slots + 1, H, P, N): the scan's states, no copies, for a kernel to pick from."""
        return self._ssm[layer]

    def write(self, layer: int, slots: Tensor, conv: Tensor, ssm: Tensor) -> None:
        """Overwrite `slots`, none of which occurs twice, with (S, C, K-1) and (S, D, N) or (S, H, P, N)."""
        self._conv[layer].index_copy_(0, slots, conv.transpose(1, 2).float())
        self._ssm[layer].index_copy_(0, slots, ssm.float())


def _mixers(model: nn.Module) -> list[Any]:
    from .state import CachedMixer  # which knows this module

    return [module for module in model.modules() if isinstance(module, CachedMixer)]


def _shapes(mixer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    conv = (mixer.conv_kernel_size - 1, mixer.conv1d.weight.shape[0])
    if mixer.A_log.ndim == 2:
        return conv, tuple(mixer.A_log.shape)
    return conv, (mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """What takes the place of `attention_mask` on its way to a mixer where a row holds sequences with own states.

    All layers share it: what depends on the batch alone is found out once, in the first of them.

    Attributes:
        cu_seqlens: (S+1,) int32; sequence s is the tokens cu_seqlens[s] to cu_seqlens[s+1] of a batch of one row.
        pool: where states are read from and left; None: every sequence starts from nothing and leaves nothing.
        source: (S,) int64, the slot that each sequence goes on from; None: all start from nothing.
        kept, target: (F,) int64, sequences whose final state goes to a slot, in ascending order, and that slot; None:
            none does.
        shortest: tokens that every sequence in `kept` has at least, as far as is known without asking the device.
        memo: what kernels have found out about cu_seqlens, see `kernels.reference.ssd`.
    """

    cu_seqlens: Tensor
    pool: StatePool | None = None
    source: Tensor | None = None
    kept: Tensor | None = None
    target: Tensor | None = None
    shortest: int = 0
    memo: dict = field(default_factory=dict, init=False, repr=False)
    _ends: dict[int, _Ends] = field(default_factory=dict, init=False, repr=False)

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
            min((lengths[s] for s in kept), default=0),
        )

    def of_kept(self, states: Tensor) -> Tensor:
        """(F, ...): those of (S, ...) that go to a slot."""
        if self.kept is None or self.kept.shape[0] == states.shape[0]:  # all of them are kept, each once
            return states
        return states.index_select(0, self.kept)

    def windows(self, x: Tensor, before: Tensor | None, width: int) -> Tensor:
        """(F, C, width): the last `width` inputs up to the end of each sequence in `kept`, for inputs x (1, L, C).

        Args:
            before: (S, C, width), the inputs before each sequence; None: there were none.
        """
        if not width:
            return x.new_zeros(len(self.cu_seqlens) - 1 if self.kept is None else len(self.kept), x.shape[2], 0)
        if width not in self._ends:
            self._ends[width] = _Ends.of(self, width)
        rows, inside, earlier = self._ends[width]
        if x.shape[1]:
            windows = x[0].index_select(0, rows)
        else:
            windows = x.new_zeros(len(rows), x.shape[2])
        if before is None and inside is not None:
            windows = windows.masked_fill(~inside, 0.0)
        elif before is not None and inside is not None and earlier is not None:
            windows = torch.where(inside, windows, before.transpose(1, 2).flatten(0, 1).index_select(0, earlier))
        return windows.unflatten(0, (-1, width)).transpose(1, 2)


class _Ends(NamedTuple):
    """Where the last inputs of sequences lie, F · width of them."""

    rows: Tensor  # (F · width,) in the row; any place for those that come before the sequence
    inside: Tensor | None  # (F · width, 1) not before the sequence; None: none is
    earlier: Tensor | None  # (F · width,) among the S · width inputs before all sequences

    @classmethod
    def of(cls, sequences: PackedSequences, width: int) -> _Ends:
        bounds, kept = sequences.cu_seqlens.long(), sequences.kept
        if kept is None:
            kept = torch.arange(len(bounds) - 1, device=bounds.device)
        starts, stops = bounds.index_select(0, kept)[:, None], bounds.index_select(0, kept + 1)[:, None]
        back = torch.arange(-width, 0, device=bounds.device)
        rows = stops + back
        if sequences.shortest >= width:
            return cls(rows.flatten(), None, None)
        place = rows - starts  # negative before the first token
        earlier = kept[:, None] * width + (width + place).clamp(0, width - 1)
        return cls(rows.clamp_min(0).flatten(), (place >= 0).view(-1, 1), earlier.flatten())
