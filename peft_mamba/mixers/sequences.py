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
    memo: dict  # what kernels have found out about cu_seqlens, see `kernels.reference.selective_scan`


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
    _host: _OnHost
    _windows: dict[int, tuple[_Windows, _Windows]] = field(default_factory=dict, init=False, repr=False)

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
            device: where all of it goes; default: the pool's.

        Raises:
            ValueError: source, target or parent have not one entry a sequence, a sequence has a parent and a source,
                there are slots but no pool, or parents are not in order.
        """
        host = _OnHost.of(lengths, source, target, parent)
        if pool is None and (host.source.any() or host.target.any()):
            raise ValueError("source and target are slots of a pool; there is none.")
        where = torch.device(pool.device if device is None and pool is not None else device or "cpu")
        # A CPU has the final states of all at no cost, and is faster with one scan over more of them.
        pieces = host.pieces(apart=where.type != "cpu" or bool(host.depth.any()))
        bounds = [host.bounds, *(host.bounds[p.start : p.stop + 1] - host.bounds[p.start] for p in pieces)]
        numbers = [each for p in pieces for each in (p.source, p.kept, host.target[p.start : p.stop][p.kept])]
        whole, *cu_seqlens = _to_device(where, np.int32, bounds)
        on_device = iter(_to_device(where, np.int64, numbers))
        parts = []
        for piece, bound in zip(pieces, cu_seqlens, strict=True):
            from_where, kept, to = (next(on_device) for _ in range(3))
            parts.append(
                Part(
                    slice(int(host.bounds[piece.start]), int(host.bounds[piece.stop])),
                    bound,
                    from_where if piece.before is not None or piece.source.any() else None,
                    piece.before,
                    piece.goes_on,
                    None if len(piece.kept) == piece.stop - piece.start else kept,
                    to if len(piece.kept) else None,
                    {},
                )
            )
        return cls(whole, parts, pool, host)

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

    def _find_windows(self, width: int, device: torch.device) -> tuple[_Windows, _Windows]:
        if width not in self._windows:
            self._windows[width] = self._host.windows(width, device)
        return self._windows[width]


class _Piece(NamedTuple):
    """A `Part` on the host: sequences `start` to `stop`."""

    start: int
    stop: int
    before: int | None
    source: np.ndarray
    goes_on: bool
    kept: np.ndarray


@dataclass(frozen=True, eq=False)
class _OnHost:
    """The numbers that a PackedSequences is made of, (S,) each, bounds (S+1,)."""

    bounds: np.ndarray
    source: np.ndarray
    target: np.ndarray
    parent: np.ndarray
    depth: np.ndarray  # how many parents from the beginning

    @classmethod
    def of(cls, lengths: Any, source: Any, target: Any, parent: Any) -> _OnHost:
        count = len(lengths)
        given = []
        for name, numbers, none in (("source", source, 0), ("target", target, 0), ("parent", parent, -1)):
            if numbers is not None and len(numbers) != count:
                raise ValueError(f"{name} has {len(numbers)} entries for {count} sequences.")
            given.append(np.full(count, none) if numbers is None else np.asarray(numbers, dtype=np.int64))
        source, target, parent = given
        if (parent >= np.arange(count)).any():
            raise ValueError("A sequence goes on from one that comes before it; a parent is behind its child.")
        if (both := np.flatnonzero((parent >= 0) & (source != 0))).size:
            raise ValueError(f"Sequence {both[0]} goes on from a sequence and from a slot; give one of the two.")
        depth = np.zeros(count, dtype=np.int64)
        above = parent.copy()
        while (going := above >= 0).any():
            depth += going
            above = np.where(going, parent[above], -1)
        bounds = np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)
        return cls(bounds, source, target, parent, depth)

    def pieces(self, apart: bool) -> list[_Piece]:
        """The parts; `apart`: sequences that nothing goes on from are not with others."""
        count = len(self.parent)
        goes_on = self.target != 0
        goes_on[self.parent[self.parent >= 0]] = True
        changes = np.diff(self.depth) != 0
        if apart:
            changes |= np.diff(goes_on) != 0
        starts = [0, *(np.flatnonzero(changes) + 1).tolist()] if count else []
        piece_of = np.repeat(np.arange(len(starts)), np.diff([*starts, count]))
        pieces = []
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], count], strict=True)):
            source, before = self.source[start:stop], None
            if self.depth[start]:
                parents = self.parent[start:stop]
                before = int(piece_of[parents[0]])
                if before >= number or (piece_of[parents] != before).any():
                    raise ValueError(
                        "Sequences whose states are needed have to follow each other with as many parents; sort them "
                        "by how many they have, and then by whether anything goes on from them."
                    )
                source = parents - starts[before]
            kept = np.flatnonzero(self.target[start:stop])
            pieces.append(_Piece(start, stop, before, source, bool(goes_on[start:stop].any()), kept))
        return pieces

    def windows(self, width: int, device: torch.device) -> tuple[_Windows, _Windows]:
        """Where the inputs before each sequence are, and the last ones of those that are kept."""
        starts, stops = self.bounds[:-1, None], self.bounds[1:, None]
        back = np.arange(-width, 0)
        in_row = np.full((len(self.source), width), -1)
        in_pool = self.source[:, None] * width + width + back

        def last(sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rows = stops[sequences] + back
            place = rows - starts[sequences]  # negative before the first token
            earlier = np.clip(width + place, 0, max(width - 1, 0))
            inside = place >= 0
            return (
                np.where(inside, rows, np.take_along_axis(in_row[sequences], earlier, 1)),
                np.where(inside, 0, np.take_along_axis(in_pool[sequences], earlier, 1)),
            )

        for depth in range(1, int(self.depth.max(initial=0)) + 1):
            here = np.flatnonzero(self.depth == depth)
            in_row[here], in_pool[here] = last(self.parent[here])
        kept = np.flatnonzero(self.target)
        none = np.zeros(0, dtype=np.int64)
        return _Windows.of(in_row, in_pool, none, device), _Windows.of(*last(kept), self.target[kept], device)


class _Windows(NamedTuple):
    """Where (S, width) inputs of a convolution are."""

    sequences: int
    width: int
    rows: Tensor | None  # (S · width,) in the row, any place for those that are not there; None: none is
    inside: Tensor | None  # (S · width, 1) whether they are in the row; None: all are
    stored: Tensor | None  # (S · width,) in the pool's slots one after the other; None: there are none
    slots: Tensor  # (S,) where these go to, if anywhere

    @classmethod
    def of(cls, in_row: np.ndarray, in_pool: np.ndarray, slots: np.ndarray, device: torch.device) -> _Windows:
        count, width = in_row.shape
        there = in_row >= 0
        in_pool = np.where(there, 0, in_pool)
        numbers = [in_row.clip(0).ravel(), there.ravel(), in_pool.ravel(), slots]
        rows, inside, stored, to = _to_device(device, np.int64, numbers)
        anything_stored = bool((in_pool >= width).any())  # in a slot other than 0
        return cls(
            count,
            width,
            rows if there.any() else None,
            None if there.all() else inside.bool()[:, None],
            stored if anything_stored else None,
            to,
        )

    def take(self, x: Tensor, pool: Tensor | None) -> Tensor | None:
        """(S, width, C) out of x (1, L, C) and (slots + 1, width, C); None: all of them are zeros."""
        shape = (self.sequences, self.width, x.shape[2])
        if not self.width or not self.sequences:
            return x.new_zeros(shape)
        if self.rows is None:
            if self.stored is None or pool is None:
                return None
            return pool.flatten(0, 1).index_select(0, self.stored).view(shape)
        taken = x[0].index_select(0, self.rows)
        if self.inside is not None:
            if self.stored is None or pool is None:
                taken = taken.masked_fill(~self.inside, 0.0)
            else:
                taken = torch.where(self.inside, taken, pool.flatten(0, 1).index_select(0, self.stored))
        return taken.view(shape)


def _to_device(device: torch.device, dtype: Any, arrays: list[np.ndarray]) -> list[Tensor]:
    """Vectors on the device, in one copy that the host does not wait for."""
    if not arrays:
        return []
    together = torch.from_numpy(np.concatenate(arrays).astype(dtype, copy=False))
    if device.type == "cuda":
        together = together.pin_memory()
    return list(together.to(device, non_blocking=True).split([len(each) for each in arrays]))
