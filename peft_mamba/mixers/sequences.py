"""Sequences of different lengths laid end to end in one row, each from a state of its own: forks without padding.

    pool = StatePool(model, slots=2)
    model.backbone(shared[None], attention_mask=PackedSequences.of([len(shared)], pool, target=[1]), use_cache=False)
    model.backbone(branches[None], attention_mask=PackedSequences.of([3, 5], pool, source=[1, 1]), use_cache=False)

The second forward continues the first one twice. In one forward, without a state that outlives a layer:

    model.backbone(all_of_it[None], attention_mask=PackedSequences.of([len(shared), 3, 5], parent=[-1, 0, 0]), …)

Nothing in either waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..kernels.host import ON_HOST, OnHost, to_device
from .row_layout import RowLayout, Windows

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

    def conv(self, layer: int) -> Tensor:
        """(slots + 1, K-1, C): the convolution's states, no copies."""
        return self._conv[layer]

    def ssm(self, layer: int) -> Tensor:
        """(slots + 1, D, N) or (slots + 1, H, P, N): the scan's states, no copies, for a kernel to pick from."""
        return self._ssm[layer]


def _mixers(model: nn.Module) -> list[Any]:
    from .state import CachedMixer  # which knows this module

    return [module for module in model.modules() if isinstance(module, CachedMixer)]


def _shapes(mixer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    conv = (mixer.conv_kernel_size - 1, mixer.conv1d.weight.shape[0])
    if mixer.A_log.ndim == 2:
        return conv, tuple(mixer.A_log.shape)
    return conv, (mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)


class Part(NamedTuple):
    """Neighbours in the row that one scan runs over: all as many forks away from what the batch starts from."""

    tokens: slice  # of the row
    cu_seqlens: Tensor  # (S+1,) int32, from 0
    source: Tensor | None  # (S,) int64, whose states they go on from; None: all start from nothing
    before: int | None  # the part whose sequences `source` counts; None: it counts slots of the pool
    goes_on: bool  # whether anything needs their final states
    kept: Tensor | None  # (F,) int64, those whose final state goes to a slot; None: all do
    target: Tensor | None  # (F,) int64, that slot; None: no state is kept
    memo: dict  # what is known of cu_seqlens and source, see `kernels.reference.selective_scan`


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """What takes the place of `attention_mask` on its way to a mixer where a row holds sequences with own states.

    All layers share it: what depends on the batch alone is found out once. Made by `of`.

    Attributes:
        cu_seqlens: (S+1,) int32; sequence s is the tokens cu_seqlens[s] to cu_seqlens[s+1] of a batch of one row.
        parts: the sequences in their order, as scans take them.
        pool: where states are read from and left; None: nowhere.
    """

    cu_seqlens: Tensor
    parts: list[Part]
    pool: StatePool | None
    _layout: RowLayout
    _windows: dict[int, tuple[Windows, Windows]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls,
        lengths: Sequence[int] | np.ndarray,
        pool: StatePool | None = None,
        source: Sequence[int] | np.ndarray | None = None,
        target: Sequence[int] | np.ndarray | None = None,
        parent: Sequence[int] | np.ndarray | None = None,
        device: torch.device | str | None = None,
    ) -> PackedSequences:
        """From numbers on the host.

        Args:
            lengths: (S,) tokens of each sequence.
            source: (S,) the slot that each goes on from, 0 for none. None: none does.
            target: (S,) the slot that its final state goes to, none of them twice, 0 for none. All reading comes before
                the writing. None: no state is kept.
            parent: (S,) the sequence of this row that it goes on from instead, -1 for none. Sequences that are as
                many parents from the beginning have to be next to each other, those whose state is needed after
                those whose is not. None: each starts from its source.
            device: where all of it goes; default: the pool's, without one the CPU.

        Raises:
            ValueError: source, target or parent have not one entry a sequence, a sequence has a parent and a source,
                there are slots but no pool, or parents are not in order.
        """
        layout = RowLayout.of(lengths, source, target, parent)
        if pool is None and (layout.source.any() or layout.target.any()):
            raise ValueError("source and target are slots of a pool; there is none.")
        if device is None:
            device = "cpu" if pool is None else pool.device
        where = torch.device(device)
        # A CPU has the final states of all at no cost, and is faster with one scan over more of them.
        pieces = layout.pieces(apart=where.type != "cpu" or bool(layout.depth.any()))
        bounds = [layout.bounds, *(layout.bounds[p.start : p.stop + 1] - layout.bounds[p.start] for p in pieces)]
        numbers = [each for p in pieces for each in (p.source, p.kept, layout.target[p.start : p.stop][p.kept])]
        whole, *cu_seqlens = to_device(where, np.int32, bounds)
        on_device = iter(to_device(where, np.int64, numbers))
        parts = []
        for piece, bound, numbers in zip(pieces, cu_seqlens, bounds[1:], strict=True):
            from_where, kept, to = (next(on_device) for _ in range(3))
            starts = piece.before is not None or bool(piece.source.any())
            parts.append(
                Part(
                    slice(int(layout.bounds[piece.start]), int(layout.bounds[piece.stop])),
                    bound,
                    from_where if starts else None,
                    piece.before,
                    piece.goes_on,
                    None if len(piece.kept) == piece.stop - piece.start else kept,
                    to if len(piece.kept) else None,
                    {ON_HOST: OnHost(numbers, piece.source if starts else None)},
                )
            )
        return cls(whole, parts, pool, layout)

    def inputs_before(self, x: Tensor, layer: int, width: int) -> Tensor | None:
        """(S, width, C): the inputs of a convolution that come before each sequence; None: there are none.

        Args:
            x: (1, L, C), the inputs of this row.
        """
        before, _ = self._find_windows(width, x.device)
        return before.take(x, None if self.pool is None else self.pool.conv(layer))

    def keep_inputs(self, x: Tensor, layer: int, width: int) -> None:
        """Leave the last `width` inputs of a convolution in the slots of the sequences whose state is kept."""
        _, after = self._find_windows(width, x.device)
        if self.pool is None or not after.sequences:
            return
        into = self.pool.conv(layer)
        windows = after.take(x, into)
        if windows is None:
            into.index_fill_(0, after.slots, 0.0)
        else:
            into.index_copy_(0, after.slots, windows.float())

    def scan(self, layer: int, like: Tensor, run: Callable[..., tuple[Tensor, Tensor | None]]) -> Tensor:
        """A scan over the row, part by part, its states from and to where they belong.

        Args:
            like: (1, L, ...), of the output's shape and dtype.
            run: takes a part, and `initial_state`, `initial_index`, `return_final_state` and `out` to hand to a scan.

        Returns:
            (1, L, ...)
        """
        pool = None if self.pool is None else self.pool.ssm(layer)
        apart = len(self.parts) > 1 and not torch.is_grad_enabled()
        whole = torch.empty(like.shape, dtype=like.dtype, device=like.device) if apart else None
        outputs: list[Tensor] = []
        final: list[Tensor | None] = []
        kept: list[tuple[Tensor, Tensor]] = []
        for part in self.parts:
            states = pool if part.before is None else final[part.before]
            y, last = run(
                part,
                initial_state=None if part.source is None else states,
                initial_index=part.source,
                return_final_state=part.goes_on,
                out=None if whole is None else whole[:, part.tokens],
            )
            outputs.append(y)
            final.append(last)
            if part.before is not None:
                # All that goes on from these follows them at once, but for what ends there.
                final[: part.before] = [None] * part.before
            if part.target is not None and last is not None:
                kept.append((part.target, last if part.kept is None else last.index_select(0, part.kept)))
        if pool is not None:
            for target, states in kept:
                pool.index_copy_(0, target, states.float())
        if whole is not None:
            return whole
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1) if outputs else like

    def _find_windows(self, width: int, device: torch.device) -> tuple[Windows, Windows]:
        if width not in self._windows:
            self._windows[width] = self._layout.windows(width, device)
        return self._windows[width]
