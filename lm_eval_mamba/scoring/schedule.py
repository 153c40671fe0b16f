"""A prefix tree as batches: parents before children, at most so many tokens a batch and so many states at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .tree import PrefixTree


@dataclass(frozen=True)
class Batch:
    """Segments that run at once.

    Attributes:
        segments: (S,) their numbers in the tree.
        source: (S,) the slot of the state that each goes on from; 0 is the state before any token.
        target: (S,) the slot that its own state goes to; 0 where nothing goes on from it.
    """

    segments: np.ndarray
    source: np.ndarray
    target: np.ndarray


def batches(tree: PrefixTree, max_tokens: int, slots: int) -> Iterator[Batch]:
    """All segments of `tree`, each once.

    A batch has at most `max_tokens` tokens, or one segment. Branches run as soon as they can, which frees the state of
    their prefix, and further prefixes fill up the batch. A prefix is taken on only if as many slots are free as the way
    down from it can need: then those taken on last can always be finished, and after them the others.

    Args:
        slots: states held at a time, in the slots 1 to `slots`.

    Raises:
        ValueError: some way down the tree needs more slots.
    """
    if len(tree.height) and tree.height.max() > slots:
        raise ValueError(f"The tree needs {tree.height.max()} states at once; there are {slots} slots.")
    parent, height = tree.parent.tolist(), tree.height.tolist()
    length = (tree.stop - tree.start).tolist()
    children: list[list[int]] = [[] for _ in parent]
    # What can run, the last of a list first: segments that end in a leaf, and those that leave a state.
    ends: list[int] = []
    forks: list[int] = []
    for segment in range(len(parent) - 1, -1, -1):
        above = parent[segment]
        (children[above] if above >= 0 else forks if height[segment] else ends).append(segment)
    waiting = [len(branches) for branches in children]
    free, slot = list(range(slots, 0, -1)), [0] * len(parent)
    while ends or forks:
        taken: list[int] = []
        tokens = 0
        while ends or (forks and height[forks[-1]] <= len(free)):
            stack = ends or forks
            if taken and tokens + length[stack[-1]] > max_tokens:
                break
            segment = stack.pop()
            taken.append(segment)
            tokens += length[segment]
            if height[segment]:
                slot[segment] = free.pop()
        source = [slot[parent[segment]] if parent[segment] >= 0 else 0 for segment in taken]
        yield Batch(*(np.array(x, dtype=np.int64) for x in (taken, source, [slot[segment] for segment in taken])))
        for segment in taken:
            if (above := parent[segment]) >= 0:
                waiting[above] -= 1
                if not waiting[above]:
                    free.append(slot[above])
            for child in children[segment]:
                (forks if height[child] else ends).append(child)
