"""In which order a scan visits its tokens: all sequences side by side, one token of each at every step.

A batch of rows, documents packed into rows and sequences of unequal length are the same thing to a recurrence: a set of
sequences. Sorted from long to short, those that still run at a step are the first few, so their states are one slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Schedule:
    """S sequences over the R = B·L tokens of (B, L) rows, taken apart into steps.

    counts: how many sequences have a token at each step, never rising; they sum to R.
    order: (R,) the token, counted through all rows, of each place: step by step, long sequences first. None: the rows
        themselves are the sequences, so the places are the tokens with time in front.
    first: for each state that goes in, the sequence that starts from it, counted from the longest.
    last: for each state that comes out, the sequence that ends in it. Both None where order is.
    sequences: S. states: how many go in and come out: one a row, or, of a packed row, one a sequence.
    """

    counts: list[int]
    order: Tensor | None
    first: Tensor | None
    last: Tensor | None
    sequences: int
    states: int

    @classmethod
    def of(cls, batch: int, length: int, starts: Tensor | None) -> Schedule:
        """For rows (batch, length); `starts`, of that shape, is True where a token starts a new document in its row."""
        if starts is None or not length or not bool(starts.any()):
            return cls([batch] * length, None, None, None, batch, batch)
        starts = starts.clone()
        starts[:, 0] = True
        flat = starts.flatten()
        begin = flat.nonzero()[:, 0]
        counts, order, rank = _side_by_side(torch.diff(begin, append=begin.new_tensor([flat.numel()])))
        ends = (flat.cumsum(0) - 1).view(batch, length)
        return cls(counts, order, rank[ends[:, 0]], rank[ends[:, -1]], len(begin), batch)

    @classmethod
    def packed(cls, cu_seqlens: Tensor) -> Schedule:
        """For one row of sequences laid end to end, each with states of its own; see `reference`."""
        counts, order, rank = _side_by_side(cu_seqlens.diff().long())
        return cls(counts, order, rank, rank, len(rank), len(rank))

    def gather(self, x: Tensor) -> Tensor:
        """(B, L, F) to (R, F), in the order of the places; contiguous."""
        if self.order is None:
            return x.transpose(0, 1).reshape(-1, x.shape[2])
        return x.reshape(-1, x.shape[2]).index_select(0, self.order)

    def scatter(self, places: Tensor, batch: int, length: int) -> Tensor:
        """The inverse of `gather`: (R, F) to (B, L, F)."""
        if self.order is None:
            return places.view(length, batch, places.shape[1]).transpose(0, 1)
        out = torch.empty_like(places)
        return out.index_copy_(0, self.order, places).view(batch, length, places.shape[1])

    def chunks(self, places: int) -> list[tuple[int, list[int]]]:
        """(first place, counts) of runs of steps that hold at most so many places each, or one step."""
        chunks: list[tuple[int, list[int]]] = []
        start = held = 0
        for count in self.counts:
            if not chunks or held + count > places:
                start, held = start + held, 0
                chunks.append((start, []))
            chunks[-1][1].append(count)
            held += count
        return chunks


def _side_by_side(sizes: Tensor) -> tuple[list[int], Tensor, Tensor]:
    """Counts and order for sequences of these sizes (S,), some perhaps 0, and each one's rank from long to short."""
    device = sizes.device
    rank = torch.empty_like(sizes)
    rank[sizes.argsort(descending=True, stable=True)] = torch.arange(len(sizes), device=device)
    sequence = torch.repeat_interleave(sizes)
    tokens = torch.arange(len(sequence), device=device)
    step = tokens - (sizes.cumsum(0) - sizes)[sequence]
    counts = torch.bincount(step)
    places = counts.cumsum(0)[step] - counts[step] + rank[sequence]
    order = torch.empty_like(places)
    order[places] = tokens
    return counts.tolist(), order, rank
