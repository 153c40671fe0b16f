"""Sequences laid end to end, on the host: which of them run at once, and where what comes before each of them lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..kernels.host import to_device

Tensor = torch.Tensor


class Piece(NamedTuple):
    """Sequences `start` to `stop` of a row, which one scan runs over; see `sequences.Part`."""

    start: int
    stop: int
    before: int | None
    source: np.ndarray
    goes_on: bool
    kept: np.ndarray


@dataclass(frozen=True, eq=False)
class RowLayout:
    """The numbers that a PackedSequences is made of, (S,) each, bounds (S+1,)."""

    bounds: np.ndarray
    source: np.ndarray
    target: np.ndarray
    parent: np.ndarray
    depth: np.ndarray  # how many parents from the beginning

    @classmethod
    def of(cls, lengths: Any, source: Any, target: Any, parent: Any) -> RowLayout:
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

    def pieces(self, apart: bool) -> list[Piece]:
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
            pieces.append(Piece(start, stop, before, source, bool(goes_on[start:stop].any()), kept))
        return pieces

    def windows(self, width: int, device: torch.device) -> tuple[Windows, Windows]:
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
        return Windows.of(in_row, in_pool, none, device), Windows.of(*last(kept), self.target[kept], device)


class Windows(NamedTuple):
    """Where (S, width) inputs of a convolution are."""

    sequences: int
    width: int
    rows: Tensor | None  # (S · width,) in the row, any place for those that are not there; None: none is
    inside: Tensor | None  # (S · width, 1) whether they are in the row; None: all are
    stored: Tensor | None  # (S · width,) in the pool's slots one after the other; None: there are none
    slots: Tensor  # (S,) where these go to, if anywhere

    @classmethod
    def of(cls, in_row: np.ndarray, in_pool: np.ndarray, slots: np.ndarray, device: torch.device) -> Windows:
        count, width = in_row.shape
        there = in_row >= 0
        in_pool = np.where(there, 0, in_pool)
        numbers = [in_row.clip(0).ravel(), there.ravel(), in_pool.ravel(), slots]
        rows, inside, stored, to = to_device(device, np.int64, numbers)
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
