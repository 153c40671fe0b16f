"""Log-likelihoods of continuations by prefix tree: requests in, each with its answer out as soon as it is known."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from peft_mamba.frozen import frozen_weights
from peft_mamba.mixers import StatePool

from .budget import Budget, bytes_in_a_layer, fork_cost
from .runner import Pending, SequenceRunner
from .schedule import batches
from .tree import PrefixTree

logger = logging.getLogger(f"lm_eval.{__name__}")

Answer = tuple[float, bool]
# Batches that are under way while the results of earlier ones are looked at.
AHEAD = 2


class NaNScore(FloatingPointError):
    """A log-probability is NaN. `tokens` are an input that gave one."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__("a log-probability is NaN")
        self.tokens = tokens


@dataclass
class Work:
    """What a call of `score` did, in tokens: `asked` with every request run by itself. `state_bytes` is the most."""

    asked: int = 0
    run: int = 0
    batches: int = 0
    state_bytes: int = 0


class Plan:
    """Requests as a tree, and for each segment which words are scored in it and which requests end there.

    Args:
        requests: the tokens of each, and how many of them, at the end, are its continuation; at least one of either.
    """

    def __init__(self, requests: Sequence[tuple[Sequence[int], int]], cost: float, most_states: int) -> None:
        self.tree = PrefixTree.of([tokens[:-1] for tokens, _ in requests], cost, most_states)
        counts = np.array([count for _, count in requests], dtype=np.int64)
        ends = np.array([len(tokens) for tokens, _ in requests], dtype=np.int64)
        self.bounds = np.concatenate([[0], np.cumsum(counts)])
        total = int(self.bounds[-1])
        depth = np.arange(total) - np.repeat(self.bounds[1:] - ends + 1, counts)
        ends_with = chain.from_iterable(tokens[-count:] for tokens, count in requests)
        words = np.fromiter(ends_with, np.int64, total)
        segment = self.tree.segments_at(np.repeat(self.tree.leaf_of, counts), depth)
        # Of requests that score the same word in the same place, one scores for all.
        most = (len(self.tree.start), int(depth.max()) + 1, int(words.max()) + 1)
        unique, self.pair = np.unique(np.ravel_multi_index((segment, depth, words), most), return_inverse=True)
        self.segment, self.depth, self.words = np.unravel_index(unique, most)
        self.pairs_of = np.searchsorted(self.segment, np.arange(len(self.tree.start) + 1))
        last = segment[self.bounds[1:] - 1]
        self._ending = np.argsort(last, kind="stable")
        self._ending_of = np.searchsorted(last[self._ending], np.arange(len(self.tree.start) + 1))

    def ending(self, segments: np.ndarray) -> np.ndarray:
        """Requests whose last word is scored in one of these segments; their other words are in segments before it."""
        return np.concatenate([self._ending[self._ending_of[s] : self._ending_of[s + 1]] for s in segments])


@dataclass
class _Results:
    logprob: np.ndarray
    greedy: np.ndarray
    under_way: deque[tuple[np.ndarray, np.ndarray, Pending]] = field(default_factory=deque)


class PrefixScorer:
    """Scores requests with a Mamba causal LM.

    Args:
        model: as for SequenceRunner.
        budget: halved in place when memory runs out.
    """

    def __init__(self, model: Any, device: torch.device, budget: Budget) -> None:
        self.model, self.device, self.budget = model, device, budget
        self.runner = SequenceRunner(model, device)
        self.work = Work()

    def score(
        self,
        requests: Sequence[tuple[Sequence[int], int]],
        answered: Callable[[int, Answer], None],
    ) -> None:
        """Call `answered` with the number of each request and its answer, once.

        Args:
            requests: (tokens, how many of them at the end are the continuation).

        Raises:
            NaNScore: a log-probability is NaN.
        """
        self.work = Work(asked=sum(len(tokens) - 1 for tokens, _ in requests))
        left = dict.fromkeys(range(len(requests)))
        while left:
            pending = list(left)
            try:
                with frozen_weights(self.budget.copy_bytes):
                    for number, answer in self._pass([requests[i] for i in pending]):
                        del left[pending[number]]
                        answered(pending[number], answer)
            except Exception as error:
                if not should_reduce_batch_size(error) or not self.budget.halve():
                    raise
                logger.warning(
                    "Out of memory: going on with the %d requests that are left, at %d tokens a batch and %.1f MiB of "
                    "states.",
                    len(left),
                    self.budget.tokens,
                    self.budget.state_bytes / 2**20,
                )
            if left:
                clear_device_cache(garbage_collection=True)
        logger.debug(
            "prefix tree: %d tokens asked, %d run in %d batches of at most %d tokens; states took %.1f MiB of %.1f MiB",
            self.work.asked,
            self.work.run,
            self.work.batches,
            self.budget.tokens,
            self.work.state_bytes / 2**20,
            self.budget.state_bytes / 2**20,
        )

    def _pass(self, requests: list[tuple[Sequence[int], int]]) -> Iterator[tuple[int, Answer]]:
        """Answers until all are there or memory runs out; what was under way then is lost, and yielded by none."""
        plan = Plan(requests, fork_cost(self.model), self.budget.most_states(self.model))
        tree = plan.tree
        within = self.budget.within(self.model, self.device)
        slots = self.budget.slots(self.model, tree, within)
        results = _Results(np.empty(len(plan.words), np.float32), np.empty(len(plan.words), bool))
        pool = StatePool(self.model, slots) if slots else None
        kept_bytes, layer_bytes = slots * StatePool.bytes_per_state(self.model), bytes_in_a_layer(self.model)
        for batch in batches(tree, self.budget.tokens, slots, within):
            lengths = tree.stop[batch.segments] - tree.start[batch.segments]
            offsets = np.cumsum(lengths) - lengths - tree.start[batch.segments]
            sizes = plan.pairs_of[batch.segments + 1] - plan.pairs_of[batch.segments]
            pairs = np.repeat(plan.pairs_of[batch.segments] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
            scored = self.runner.score(
                [tree.tokens(segment) for segment in batch.segments],
                batch,
                np.repeat(offsets, sizes) + plan.depth[pairs],
                plan.words[pairs],
                pool,
            )
            self.work.run += int(lengths.sum())
            self.work.batches += 1
            state_bytes = kept_bytes + len(np.unique(batch.parent[batch.parent >= 0])) * layer_bytes
            self.work.state_bytes = max(self.work.state_bytes, state_bytes)
            results.under_way.append((batch.segments, pairs, scored))
            if len(results.under_way) > AHEAD:
                yield from self._collect(plan, results)
        while results.under_way:
            yield from self._collect(plan, results)

    def _collect(self, plan: Plan, results: _Results) -> Iterator[tuple[int, Answer]]:
        segments, pairs, scored = results.under_way.popleft()
        logprob, greedy = scored.get()
        results.logprob[pairs], results.greedy[pairs] = logprob, greedy
        if np.isnan(logprob).any():
            segment = plan.segment[pairs[np.isnan(logprob).argmax()]]
            raise NaNScore(plan.tree.leaves[plan.tree.leaf[segment]][: plan.tree.stop[segment]].tolist())
        for request in plan.ending(segments):
            own = plan.pair[plan.bounds[request] : plan.bounds[request + 1]]
            yield int(request), (float(results.logprob[own].sum(dtype=np.float64)), bool(results.greedy[own].all()))
