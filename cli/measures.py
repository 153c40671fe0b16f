"""What a run costs: tokens, seconds, memory; and the figures that the papers report.

ATPS, average tokens per second: tokens trained on over the training time.
MMPT, maximum memory per token: peak memory of the run over the tokens of one mini-batch.
(2406.00209, section on fine-tuning throughput and memory.) Both count real tokens; padding is reported apart.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

FILE = "tally_{rank}.json"


def count_tokens(inputs: dict[str, Any]) -> tuple[torch.Tensor | int, int]:
    """Real tokens of a batch, and all of its positions. Without a mask every position is a token."""
    positions = inputs["input_ids"].numel()
    mask = inputs.get("attention_mask")
    return (positions if mask is None else mask.sum()), positions


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch had allocated on a CUDA device, the largest resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class Tally:
    """Running counts of one process, kept in every checkpoint so that a resumed run goes on counting.

    Attributes:
        seconds: spent training, without evaluation and saving.
        first_step_seconds: of the first step of each process, in which kernels are compiled and tuned.
        tokens, positions: of all batches; positions include padding.
        largest: (tokens, positions) of the mini-batch with the most positions.
        skipped: steps that the loss scaler left out because gradients overflowed.
        peak_bytes: highest over the run.
    """

    seconds: float = 0.0
    first_step_seconds: float = 0.0
    first_step_tokens: int = 0
    tokens: int = 0
    positions: int = 0
    largest_tokens: int = 0
    largest_positions: int = 0
    skipped: int = 0
    peak_bytes: int = 0

    def save(self, checkpoint: Path, rank: int) -> None:
        """Write the counts of a process beside the rest of a checkpoint."""
        (checkpoint / FILE.format(rank=rank)).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, checkpoint: Path, rank: int) -> Tally:
        """Read what `save` wrote."""
        return cls(**json.loads((checkpoint / FILE.format(rank=rank)).read_text(encoding="utf-8")))


class Meter:
    """Counts and times the training of one process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tally = Tally()
        self._started: float | None = None
        self._steps = 0
        self._before = Tally()  # what a resumed run had counted before this process
        self._pending: list[tuple[torch.Tensor | int, int]] = []

    def adopt(self, tally: Tally) -> None:
        """Go on from the counts of a checkpoint."""
        self.tally, self._before = tally, replace(tally)

    def start(self) -> None:
        """The training begins, or goes on after a pause."""
        if self.device.type == "cuda" and not self._steps:
            torch.cuda.reset_peak_memory_stats(self.device)
        self._started = time.perf_counter()

    def stop(self) -> None:
        """The training pauses or ends."""
        if self._started is not None:
            self._collect()
            self.tally.seconds += time.perf_counter() - self._started
            self._started = None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is not training: evaluating, saving."""
        running = self._started is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()

    def batch(self, inputs: dict[str, Any], filler: int = 0) -> None:
        """Count one mini-batch, `filler` of its tokens no one's; its mask is read when the device is waited for."""
        tokens, positions = count_tokens(inputs)
        self._pending.append((tokens - filler, positions))

    def step(self) -> None:
        """An optimizer step was made."""
        self._steps += 1
        if self._steps == 1 and self._started is not None:
            seconds, tokens = self.now()
            self.tally.first_step_seconds += seconds - self._before.seconds
            self.tally.first_step_tokens += tokens - self._before.tokens

    def _collect(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for tokens, positions in self._pending:
            real = int(tokens)
            self.tally.tokens += real
            self.tally.positions += positions
            if positions > self.tally.largest_positions:
                self.tally.largest_tokens, self.tally.largest_positions = real, positions
        self._pending.clear()
        self.tally.peak_bytes = max(self.tally.peak_bytes, peak_memory(self.device))

    def now(self) -> tuple[float, int]:
        """Training seconds and real tokens so far."""
        self._collect()
        running = time.perf_counter() - self._started if self._started is not None else 0.0
        return self.tally.seconds + running, self.tally.tokens


def figures(tallies: list[Tally]) -> dict[str, Any]:
    """A run's figures from its processes' tallies: tokens add up; time is the slowest's, memory the largest."""
    seconds = max(tally.seconds for tally in tallies)
    tokens = sum(tally.tokens for tally in tallies)
    positions = sum(tally.positions for tally in tallies)
    steady = max(tally.seconds - tally.first_step_seconds for tally in tallies)
    steady_tokens = tokens - sum(tally.first_step_tokens for tally in tallies)
    largest = max(tallies, key=lambda tally: tally.largest_positions)
    peak = max(tally.peak_bytes for tally in tallies)
    return {
        "atps": tokens / seconds if seconds else None,
        "atps_after_first_step": steady_tokens / steady if steady > 0 and steady_tokens else None,
        "mmpt_bytes": peak / largest.largest_tokens if largest.largest_tokens else None,
        "mmpt_bytes_with_padding": peak / largest.largest_positions if largest.largest_positions else None,
        "peak_memory_bytes": peak,
        "training_seconds": seconds,
        "tokens": tokens,
        "padding_tokens": positions - tokens,
        "largest_mini_batch_tokens": largest.largest_tokens,
        "skipped_steps": tallies[0].skipped,
    }
