"""Sequences that go on from one state, as Mamba-2's kernels take them: together in a chunk, if they fit one.

The answers to a question are a few tokens each. As chunks of their own they leave most of a tile empty, and each reads
the state that they all start from.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..host import OnHost, to_device
from .common import Tensor

# The least share of all chunks to save: to keep sequences apart within a chunk takes a kernel a little time, too.
WORTH = 1 / 8


class Families(NamedTuple):
    """What takes the place of cu_seqlens and initial_index.

    Attributes:
        bounds: (F+1,) int32, a family each from here to there.
        source: (F,) int64, the row of the initial states that all of a family start from; None: there is no index.
        documents: (1, L) int32, another number for neighbours in a family; None: each family is one sequence.
        one_chunk: no family has several chunks.
    """

    bounds: Tensor
    source: Tensor | None
    documents: Tensor | None
    one_chunk: bool

    @classmethod
    def of(cls, known: OnHost, chunk: int, cu_seqlens: Tensor, index: Tensor | None, has_initial: bool) -> Families:
        """Neighbours with the same source, as many as fit a chunk of so many tokens.

        Args:
            known: the numbers in cu_seqlens and index.
            has_initial: sequences start from a state; without an index each from its own.
        """
        lengths = np.diff(known.bounds)
        chunks = -(-lengths // chunk)
        if known.source is not None:
            source = known.source
        else:
            source = np.arange(len(lengths)) if has_initial else np.zeros(len(lengths), np.int64)
        first = _first_of_each(lengths.tolist(), source.tolist(), chunk)
        bounds = np.concatenate([known.bounds[first], known.bounds[-1:]])
        saved = chunks.sum() - (-(-np.diff(bounds) // chunk)).sum()
        if saved < max(1, WORTH * chunks.sum()):
            return cls(cu_seqlens, index, None, bool((chunks <= 1).all()))
        device = cu_seqlens.device
        numbers = np.repeat(np.arange(len(lengths)), lengths)
        bounds_, documents = to_device(device, np.int32, [bounds, numbers])
        index = None if index is None else to_device(device, np.int64, [source[first]])[0]
        return cls(bounds_, index, documents[None], bool((np.diff(bounds) <= chunk).all()))


def _first_of_each(lengths: list[int], source: list[int], chunk: int) -> list[int]:
    """The first sequence of every family."""
    first: list[int] = []
    tokens = 0
    for number, length in enumerate(lengths):
        if first and source[number] == source[number - 1] and tokens + length <= chunk:
            tokens += length
        else:
            first.append(number)
            tokens = length
    return first
