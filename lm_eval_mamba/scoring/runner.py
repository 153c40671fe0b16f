"""One batch of sequences through a model: from states to states, and the log-probabilities that are asked for.

All that the device needs to know of a batch goes there at once; nothing waits for the device but `Pending.get`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from peft_mamba.kernels.host import to_device
from peft_mamba.mixers import PackedSequences, StatePool
from peft_mamba.mixers.packing import last_hidden_state
from peft_mamba.mixers.projection import project

from .schedule import Batch

# Bytes of one float32 (positions, vocabulary) tensor of the language-model head; about three exist at a time.
HEAD_BYTES = {"cuda": 2**28, "cpu": 2**24}


class Pending:
    """Numbers on their way from the device."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)
        self._ready = None
        if values.is_cuda:
            self._ready = torch.cuda.Event()
            self._ready.record()

    def get(self) -> np.ndarray:
        if self._ready is not None:
            self._ready.synchronize()
        return self._values.numpy()


def sequences_of(
    pieces: list[np.ndarray],
    batch: Batch,
    pool: StatePool | None,
    device: torch.device,
    target: np.ndarray | None = None,
) -> PackedSequences:
    """What the mixers need to know of a batch; `target` in place of its own."""
    lengths = [len(piece) for piece in pieces]
    target = batch.target if target is None else target
    return PackedSequences.of(lengths, pool, batch.source, target, batch.parent, device)


class SequenceRunner:
    """A Mamba causal LM that runs sequences laid end to end, with states in a pool.

    Args:
        model: MambaForCausalLM or Mamba2ForCausalLM with this project's mixers, with or without adapters inside; all
            of it on one device.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.head = model.get_output_embeddings()
        vocabulary = self.head.weight.shape[0]
        self.positions_at_once = max(1, HEAD_BYTES.get(device.type, HEAD_BYTES["cpu"]) // (4 * vocabulary))

    def hidden_states(self, tokens: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        """(L, hidden_size) for tokens (L,) of these sequences."""
        return last_hidden_state(self.model.backbone, tokens[None], packed)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 (positions, vocabulary), as the model's own forward computes them."""
        return project(self.head, hidden.to(self.head.weight.dtype)).float()

    def score(
        self,
        pieces: list[np.ndarray],
        batch: Batch,
        positions: np.ndarray,
        words: np.ndarray,
        pool: StatePool | None,
    ) -> Pending:
        """Run sequences and score words after some of their tokens.

        Args:
            pieces: the tokens of each sequence.
            batch: what each goes on from, and where its state goes.
            positions, words: (P,) the word's log-probability after the token at this position of all, in order.

        Returns:
            (2, P) float32: log-probabilities, and 1 where no word is more likely, else 0.
        """
        new = np.diff(positions, prepend=-1) != 0
        unique, row = positions[new], np.cumsum(new) - 1
        tokens_, unique_, row_, words_ = to_device(self.device, np.int64, [np.concatenate(pieces), unique, row, words])
        packed = sequences_of(pieces, batch, pool, self.device)
        hidden = self.hidden_states(tokens_, packed)
        scored = torch.empty(2, len(words), dtype=torch.float32, device=self.device)
        hidden = hidden.index_select(0, unique_)
        for start in range(0, len(unique), self.positions_at_once):
            stop = min(start + self.positions_at_once, len(unique))
            logits = self.logits(hidden[start:stop])
            first, last = np.searchsorted(row, [start, stop])
            rows, word = row_[first:last] - start, words_[first:last]
            scored[0, first:last] = F.log_softmax(logits, dim=-1)[rows, word]
            scored[1, first:last] = logits.argmax(-1)[rows] == word
        return Pending(scored)
