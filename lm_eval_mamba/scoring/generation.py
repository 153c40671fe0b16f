"""Greedy decoding of many prompts at once: shared beginnings are read once, then each goes on from its own state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from peft_mamba.frozen import frozen_weights
from peft_mamba.kernels.host import to_device
from peft_mamba.mixers import PackedSequences, StatePool

from .budget import Budget, fork_cost
from .runner import SequenceRunner, sequences_of
from .schedule import batches
from .scorer import NaNScore
from .tree import PrefixTree

logger = logging.getLogger(f"lm_eval.{__name__}")

# Prompts that are decoded side by side.
MOST_ROWS = {"cuda": 512, "cpu": 64}
# Tokens between two looks at what was written; each waits for the device.
LOOK_EVERY = {"cuda": 8, "cpu": 1}


class GreedyGenerator:
    """Writes on from prompts with a Mamba causal LM, always the most likely token.

    Args:
        model: as for SequenceRunner.
        budget: halved in place when memory runs out.
        ends: token ids that end a text.
        stopped: for texts written so far, as token ids, whether each can end here.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        budget: Budget,
        ends: set[int],
        stopped: Callable[[list[list[int]]], list[bool]],
    ) -> None:
        self.model, self.device, self.budget = model, device, budget
        self.runner = SequenceRunner(model, device)
        self.ends, self.stopped = ends, stopped
        self.look_every = LOOK_EVERY.get(device.type, LOOK_EVERY["cpu"])
        self.tokens_run = 0

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Iterator[tuple[int, list[int]]]:
        """The number of each prompt and its new tokens, at most `max_new_tokens`, with the one that ends it.

        Raises:
            NaNScore: a logit is NaN.
        """
        waiting: dict[tuple[int, ...], list[int]] = {}
        for number, prompt in enumerate(prompts):
            waiting.setdefault(tuple(prompt), []).append(number)
        while waiting:
            # Neighbours share most; a state for each, and some for what they share.
            rows = MOST_ROWS.get(self.device.type, MOST_ROWS["cpu"])
            block = sorted(waiting)[: max(1, min(rows, self.budget.most_states(self.model) // 2, self.budget.tokens))]
            try:
                with frozen_weights(self.budget.copy_bytes):
                    written = self._block(block, max_new_tokens)
            except Exception as error:
                if not should_reduce_batch_size(error) or not self.budget.halve():
                    raise
                logger.warning("Out of memory while generating: going on with half as many prompts at a time.")
                written = None
            if written is None:
                clear_device_cache(garbage_collection=True)
                continue
            for prompt, tokens in zip(block, written, strict=True):
                for number in waiting.pop(prompt):
                    yield number, tokens

    def _block(self, prompts: list[tuple[int, ...]], max_new_tokens: int) -> list[list[int]]:
        most = max(0, self.budget.most_states(self.model) - len(prompts))
        tree = PrefixTree.of(prompts, fork_cost(self.model), most, every_end=True)
        slots = min(most, self.budget.slots(self.model, tree, 0))
        pool = StatePool(self.model, slots + len(prompts))
        own_slot = np.zeros(len(tree.start), dtype=np.int64)
        own_slot[tree.segment_of] = slots + 1 + np.arange(len(prompts))
        first = torch.empty(len(prompts), dtype=torch.int64, device=self.device)
        bad = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        for batch in batches(tree, self.budget.tokens, slots):
            pieces = [tree.tokens(segment) for segment in batch.segments]
            ends = np.flatnonzero(own_slot[batch.segments])
            bounds = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
            self.tokens_run += int(bounds[-1])
            numbers = [np.concatenate(pieces), bounds[1:][ends] - 1, tree.leaf[batch.segments[ends]]]
            tokens_, last_, leaf_ = to_device(self.device, np.int64, numbers)
            target = batch.target + own_slot[batch.segments]
            packed = sequences_of(pieces, batch, pool, self.device, target)
            hidden = self.runner.hidden_states(tokens_, packed)
            logits = self.runner.logits(hidden.index_select(0, last_))
            first[leaf_], bad[leaf_] = logits.argmax(-1), logits.isnan().any(-1)
        return self._decode(prompts, first, bad, pool, slots, max_new_tokens)

    def _decode(
        self,
        prompts: list[tuple[int, ...]],
        words: torch.Tensor,
        bad: torch.Tensor,
        pool: StatePool,
        before: int,
        max_new_tokens: int,
    ) -> list[list[int]]:
        """Each prompt's new tokens, from its first one and its state, which is in slot `before` + 1 + its number."""
        written: list[list[int]] = [[] for _ in prompts]
        active = np.arange(len(prompts))
        packed = self._single_tokens(pool, active + before + 1)
        unseen: list[torch.Tensor] = []
        for count in range(1, max_new_tokens + 1):
            unseen.append(words)
            if len(unseen) == self.look_every or count == max_new_tokens:
                *new, nan = torch.stack([*unseen, bad]).cpu().numpy()
                if nan.any():
                    row = active[nan.argmax()]
                    raise NaNScore([*prompts[row], *written[row]])
                unseen = []
                going_on = self._look(written, active, np.stack(new, axis=1))
                if not going_on.any() or count == max_new_tokens:
                    break
                if not going_on.all():
                    active = active[going_on]
                    (keep,) = to_device(self.device, np.int64, [np.flatnonzero(going_on)])
                    words, bad = words[keep], bad[keep]
                    packed = self._single_tokens(pool, active + before + 1)
            self.tokens_run += len(active)
            logits = self.runner.logits(self.runner.hidden_states(words, packed))
            bad = bad | logits.isnan().any(-1)
            words = logits.argmax(-1)
        return written

    def _single_tokens(self, pool: StatePool, slots: np.ndarray) -> PackedSequences:
        """A token of each of these texts, which goes on from its slot and leaves its state there."""
        return PackedSequences.of(np.ones(len(slots), dtype=np.int64), pool, slots, slots)

    def _look(self, written: list[list[int]], active: np.ndarray, new: np.ndarray) -> np.ndarray:
        """Add `new` (rows, tokens) to what the active rows wrote; which of them go on."""
        ended = np.zeros(len(active), dtype=bool)
        for i, row in enumerate(active):
            tokens = new[i].tolist()
            end = next((j for j, token in enumerate(tokens) if token in self.ends), None)
            written[row] += tokens if end is None else tokens[: end + 1]
            ended[i] = end is not None
        return ~(ended | np.array(self.stopped([written[row] for row in active]), dtype=bool))
