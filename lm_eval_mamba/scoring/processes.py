"""Several processes score one prefix tree: each takes some of its branches whole.

lm-eval deals documents out to processes one by one, so that each process would run what all documents share, and the
shots of every subject. Here the processes tell each other their requests, each scores those that lie next to each other
in the tree, and they tell each other the answers.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from .scorer import Answer
from .tree import shared

logger = logging.getLogger(f"lm_eval.{__name__}")

Request = tuple[Sequence[int], int]  # tokens, and how many of them, at the end, are the continuation

# Seconds that processes wait for each other before each scores its own: all come at once, or one has nothing to score.
PATIENCE = 60.0


@dataclass(frozen=True)
class Share:
    """What this process scores of all requests.

    Attributes:
        requests: the share.
        numbers: (requests,) their numbers among those of all processes.
        own: the numbers of what this process was asked for.
    """

    requests: list[Request]
    numbers: np.ndarray
    own: range


def end_in_order() -> None:
    """End the processes' default group before this one's interpreter ends, if gloo runs it.

    Rank 0 goes on alone for a while, with bootstraps and results, and nobody ends the group: of the others, about one
    in twenty then aborted ("terminate called without an active exception"), and the launcher stopped rank 0 for it.
    """

    def end() -> None:
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()

    atexit.register(end)


class Processes:
    """All processes of an evaluation; each makes one of these, at the same point of the program.

    Args:
        rank: number of this process.
        count: how many there are, at least 2, in torch's default group.
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self._call = 0
        self._apart = False
        host, port = os.environ.get("MASTER_ADDR", "localhost"), [0]
        if rank == 0:
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            port = [self._store.port]
        dist.broadcast_object_list(port)
        if rank > 0:
            self._store = dist.TCPStore(host, port[0], is_master=False)

    def share(self, requests: Sequence[Request]) -> Share | None:
        """This process' part of all requests; None where a process did not come, and from then on."""
        if self._apart or not self._all_came():
            self._apart = True
            return None
        everything: list = [None] * self.count
        counts = np.array([count for _, count in requests], dtype=np.int64)
        lengths = np.array([len(tokens) for tokens, _ in requests], dtype=np.int64)
        tokens = np.fromiter(
            itertools.chain.from_iterable(tokens for tokens, _ in requests), np.uint32, int(lengths.sum())
        )
        dist.all_gather_object(everything, (counts, lengths, tokens))
        sequences = [
            sequence
            for _, lengths, tokens in everything
            for sequence in np.split(tokens, np.cumsum(lengths)[:-1])[: len(lengths)]
        ]
        counts = np.concatenate([counts for counts, _, _ in everything])
        mine = np.flatnonzero(divide([sequence[:-1] for sequence in sequences], self.count) == self.rank)
        first = sum(len(counts) for counts, _, _ in everything[: self.rank])
        return Share([(sequences[i].tolist(), int(counts[i])) for i in mine], mine, range(first, first + len(requests)))

    def answers(self, share: Share, found: Sequence[Answer]) -> list[Answer]:
        """The answers to what this process was asked for, from those that all processes found for their shares."""
        everything: list = [None] * self.count
        logprobs, greedy = np.array([logprob for logprob, _ in found]), np.array([greedy for _, greedy in found])
        dist.all_gather_object(everything, (share.numbers, logprobs, greedy))
        known: dict[int, Answer] = {}
        for numbers, logprobs, greedy in everything:
            known |= zip(numbers.tolist(), zip(logprobs.tolist(), greedy.tolist(), strict=True), strict=True)
        return [known[number] for number in share.own]

    def _all_came(self) -> bool:
        """Whether all processes score now. They agree on it, whoever comes how late."""
        name, self._call = f"call {self._call}", self._call + 1
        if self._store.add(f"{name} came", 1) == self.count:
            self._store.compare_set(name, "", "together")
        until = time.monotonic() + PATIENCE
        while not self._store.check([name]):  # to wait for what compare_set sets is not possible in every version
            if time.monotonic() > until:
                self._store.compare_set(name, "", "apart")  # if nothing has been set by now
            time.sleep(0.01)
        together = self._store.get(name) == b"together"
        if not together:
            logger.warning(
                "Of %d processes, not all had requests to score within %.0f s: each scores its own, and runs again "
                "what they share.",
                self.count,
                PATIENCE,
            )
        return together


def divide(sequences: Sequence[np.ndarray], parts: int) -> np.ndarray:
    """The part that each sequence goes to, such that few tokens are run in several parts.

    In lexicographic order, neighbours share most. Parts are stretches of that order. A cut lies where the tokens that
    are run twice for it, and those by which it misses equal parts, are fewest together; a part may be empty.

    Args:
        sequences: (tokens,) uint32 each.

    Returns:
        (sequences,) numbers from 0 to parts - 1; equal sequences have the same.
    """
    keys = [sequence.astype(">u4").tobytes() for sequence in sequences]
    order = sorted(set(keys))
    tokens = [np.frombuffer(key, np.uint32) for key in order]
    # A cut before a sequence runs twice what it shares with the one before it.
    twice = np.zeros(len(tokens) + 1, np.int64)
    twice[1:-1] = [shared(a, b) for a, b in itertools.pairwise(tokens)]
    before = np.concatenate([[0], np.cumsum([len(each) for each in tokens] - twice[:-1])])
    cuts = [int(np.argmin(abs(before - before[-1] * part / parts) + twice)) for part in range(1, parts)]
    part_of = dict(
        zip(order, np.searchsorted(np.sort(cuts), np.arange(len(order)), side="right").tolist(), strict=True)
    )
    return np.array([part_of[key] for key in keys], dtype=np.int64)
