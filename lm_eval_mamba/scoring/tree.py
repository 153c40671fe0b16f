"""Token sequences as a compact prefix tree: each stretch that several share is a segment of its own, where that pays.

Knows nothing of models: sequences in, arrays out.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PrefixTree:
    """Segments of sequences; a parent has a lower number than its children.

    Attributes:
        leaves: the distinct sequences that are no prefix of another, in lexicographic order, (tokens,) uint32 each.
        leaf_of: (sequences,) the leaf that each sequence given is, or is a prefix of.
        start, stop: (segments,) the tokens of a segment are start to stop of its leaf.
        leaf: (segments,) a leaf that passes through the segment.
        parent: (segments,) the segment before it; -1 where it starts from nothing.
        segment_of: (leaves,) the segment that each leaf ends in.
        height: (segments,) segments with children on the longest way down from here, itself included: states that
            have to be held at once to get through.
    """

    leaves: list[np.ndarray]
    leaf_of: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    leaf: np.ndarray
    parent: np.ndarray
    segment_of: np.ndarray
    height: np.ndarray

    @property
    def tokens_run(self) -> int:
        return int((self.stop - self.start).sum())

    def tokens(self, segment: int) -> np.ndarray:
        return self.leaves[self.leaf[segment]][self.start[segment] : self.stop[segment]]

    def segments_at(self, leaf: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """The segments that hold token number `depth` of each `leaf`."""
        segments = self.segment_of[leaf]
        while (above := self.start[segments] > depth).any():
            segments = np.where(above, self.parent[segments], segments)
        return segments

    @classmethod
    def of(
        cls,
        sequences: Sequence[Sequence[int]],
        fork_cost: float = 0,
        max_height: int | None = None,
        every_end: bool = False,
    ) -> PrefixTree:
        """
        Args:
            sequences: token ids below 2**32, none empty.
            fork_cost: what it costs to leave a state or to go on from one, in tokens. A stretch is shared where that
                costs less than to run it once more for each branch.
            max_height: most states held at once; 0 shares nothing.
            every_end: each distinct sequence gets a segment of its own, also if it is a prefix of another.
        """
        keys = [_key(sequence) for sequence in sequences]
        order = sorted(set(keys))
        # A prefix sorts before what it is a prefix of, with nothing but other such prefixes in between.
        kept = [a for a, b in zip(order, [*order[1:], b""], strict=True) if every_end or not b.startswith(a)]
        number = {}
        for i, key in enumerate(kept):
            number[key] = i
        if not every_end:
            ahead = len(kept)
            for key in reversed(order):
                ahead = number.setdefault(key, ahead)
        leaves = [np.frombuffer(key, dtype=">u4").astype(np.uint32) for key in kept]
        leaf_of = np.array([number[key] for key in keys], dtype=np.int64)
        return cls(leaves, leaf_of, *_segments(leaves, fork_cost, max_height))


def _key(sequence: Sequence[int]) -> bytes:
    """Bytes that sort as the tokens do."""
    tokens = array("I", sequence)
    tokens.byteswap()
    return tokens.tobytes()


def shared(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens that both start with."""
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    return int(different.argmax()) if different.any() else length


def _branching(leaves: list[np.ndarray]) -> tuple[list[int], list[list[int]]]:
    """(depth, children) of the nodes of the full tree, the root last; child i < 0 is leaf -1 - i."""
    depths: list[int] = []
    children: list[list[int]] = []

    def node(depth: int) -> int:
        depths.append(depth)
        children.append([])
        return len(depths) - 1

    # The nodes on the way to the leaf at hand; what was closed last hangs below the innermost that shares enough.
    open_nodes = [node(0)]
    last = -1
    for i in range(1, len(leaves)):
        depth = shared(leaves[i - 1][:-1], leaves[i][:-1])  # each keeps a token for itself
        while depths[open_nodes[-1]] > depth:
            top = open_nodes.pop()
            children[top].append(last)
            last = top
        if depths[open_nodes[-1]] < depth:
            open_nodes.append(node(depth))
        children[open_nodes[-1]].append(last)
        last = -1 - i
    while open_nodes:
        top = open_nodes.pop()
        children[top].append(last)
        last = top
    return depths, children


def _segments(leaves: list[np.ndarray], fork_cost: float, max_height: int | None) -> tuple[np.ndarray, ...]:
    # Flat lists of numbers: many small tuples would keep Python's garbage collector busy.
    rows: list[int] = []  # start, stop, leaf, parent of each
    segment_of = np.zeros(len(leaves), dtype=np.int64)
    if leaves:
        depths, children = _branching(leaves)
        # Node, segment above it, where that stops, its level; leaves come out in order, for neighbours share most.
        todo = [0, -1, 0, 0]
        while todo:
            level, depth, parent, node = todo.pop(), todo.pop(), todo.pop(), todo.pop()
            if node < 0:
                leaf = -1 - node
                segment_of[leaf] = len(rows) // 4
                rows += (depth, len(leaves[leaf]), leaf, parent)
                continue
            branches = children[node]
            saved = (len(branches) - 1) * (depths[node] - depth)
            if saved > fork_cost * len(branches) and (max_height is None or level < max_height):
                first = node
                while first >= 0:
                    first = children[first][0]
                rows += (depth, depths[node], -1 - first, parent)
                parent, depth, level = len(rows) // 4 - 1, depths[node], level + 1
            for child in reversed(branches):
                todo += (child, parent, depth, level)
    start, stop, leaf_of, parents = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    height = np.zeros(len(start), dtype=np.int64)
    for segment in range(len(start) - 1, -1, -1):
        if (above := parents[segment]) >= 0:
            height[above] = max(height[above], height[segment] + 1)
    return start, stop, leaf_of, parents, segment_of, height
