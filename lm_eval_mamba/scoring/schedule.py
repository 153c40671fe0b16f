"""A prefix tree as batches: parents before children, at most so many tokens a batch and so many states at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .tree import PrefixTree


@dataclass(frozen=True)
class Batch:
    """Segments that run at once, in the order in which `PackedSequences` takes them.

    Attributes:
        segments: (S,) their numbers in the tree.
        parent: (S,) which of these each goes on from; -1 where that is none.
        source: (S,) the slot of the state that it goes on from instead; 0 is the state before any token.
        target: (S,) the slot that its own state goes to for later batches; 0 where none goes on from it.
    """

    segments: np.ndarray
    parent: np.ndarray
    source: np.ndarray
    target: np.ndarray


def batches(tree: PrefixTree, max_tokens: int, slots: int, within: int = 0) -> Iterator[Batch]:
    """All segments of `tree`, each once.

    A batch has at most `max_tokens` tokens, or one segment. Branches run as soon as they can, which frees the state of
    their prefix, and further prefixes fill up the batch. A prefix that only leaves hang from runs with them in one
    batch, and its state is not kept: but for the last one of a batch, if that has no room for all of its leaves. Any
    other prefix is taken on only if as many slots are free as the way down from it can need: then those taken on last
    can always be finished, and after them the others.

    Args:
        slots: states held at a time, in the slots 1 to `slots`.
        within: prefixes that run in one batch with their leaves; 0: all states are kept in slots.

    Raises:
        ValueError: some way down the tree needs more slots.
    """
    if len(tree.height) and tree.height.max() > slots:
        raise ValueError(f"The tree needs {tree.height.max()} states at once; there are {slots} slots.")
    parent, height = tree.parent.tolist(), tree.height.tolist()
    length = (tree.stop - tree.start).tolist()
    children: list[list[int]] = [[] for _ in parent]
    lowest = 1 if within else 0  # the greatest height of what needs no slot to run
    # What can run, the last of a list first: segments that are a leaf or have leaves alone, and those above them.
    ends: list[int] = []
    forks: list[int] = []
    for segment in range(len(parent) - 1, -1, -1):
        above = parent[segment]
        (children[above] if above >= 0 else forks if height[segment] > lowest else ends).append(segment)
    waiting = [len(branches) for branches in children]
    free, slot = list(range(slots, 0, -1)), [0] * len(parent)
    while ends or forks:
        taken: list[int] = []
        tokens = prefixes = 0
        while ends or (forks and height[forks[-1]] <= len(free)):
            stack = ends or forks
            segment = stack[-1]
            prefix = bool(within) and height[segment] == 1
            needed = length[segment]
            if prefix and not free:  # there is no slot for its state if some of its leaves find no room
                needed += sum(length[child] for child in children[segment])
            if taken and (tokens + needed > max_tokens or (prefix and prefixes == within)):
                break
            taken.append(stack.pop())
            tokens += length[segment]
            if prefix:
                prefixes += 1
                ends += children[segment]
            elif height[segment]:
                slot[segment] = free.pop()
        yield _batch(taken, parent, height, children, slot, free)
        for segment in taken:
            if (above := parent[segment]) >= 0:
                waiting[above] -= 1
                if not waiting[above] and slot[above]:
                    free.append(slot[above])
            if height[segment] > lowest:
                for child in children[segment]:
                    (forks if height[child] > lowest else ends).append(child)


def _batch(
    taken: list[int],
    parent: list[int],
    height: list[int],
    children: list[list[int]],
    slot: list[int],
    free: list[int],
) -> Batch:
    here = set(taken)
    for segment in taken:
        if height[segment] and not slot[segment] and not here.issuperset(children[segment]):
            slot[segment] = free.pop()
    # Those that go on from one of the others come last, and before them what these go on from.
    taken = sorted(taken, key=lambda segment: (parent[segment] in here, height[segment] > 0))
    place = {segment: i for i, segment in enumerate(taken)}
    parents = [place.get(parent[segment], -1) for segment in taken]
    above = [parent[segment] if parents[i] < 0 else -1 for i, segment in enumerate(taken)]
    source = [slot[segment] if segment >= 0 else 0 for segment in above]
    return Batch(*(np.array(x, dtype=np.int64) for x in (taken, parents, source, [slot[s] for s in taken])))
