"""How much memory scoring may take: copies of weights, states that wait for their branches, tokens of a batch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from peft_mamba.mixers import StatePool

from .tree import PrefixTree

UNITS = {"": 1, "B": 1, **{f"{p}iB": 2 ** (10 * i) for i, p in enumerate("KMGT", 1)}}
UNITS |= {f"{p}B": 10 ** (3 * i) for i, p in enumerate("KMGT", 1)}

# More tokens in a batch gain nothing any more: a GPU is busy, a CPU's caches are full.
MOST_TOKENS = {"cuda": 32768, "cpu": 4096}
# Shares of the free memory that are taken without having been asked for; of copies it is the most.
COPIES_SHARE, STATES_SHARE, TOKENS_SHARE = 1 / 8, 1 / 16, 1 / 8
# float32 values that a token takes at once in a layer, in units of hidden_size, on the generous side.
VALUES_PER_TOKEN = 32
# float32 values that a token's layer reads and writes, in units of hidden_size, or could in the time of its products.
# On a CPU, where states are copied, fewer.
VALUES_MOVED = {"cuda": 24, "cpu": 8}
# Below this a batch is not made smaller for lack of memory.
FEWEST_TOKENS = 64


def parse_bytes(amount: str | int | float) -> int:
    """Bytes that `amount` means: a number, or one with a unit, such as 2GiB, 500MB or 1.5 GiB.

    Raises:
        ValueError: it is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(amount))
    unit = next((u for u in UNITS if match and u.lower() == match[2].lower()), None)
    if match is None or unit is None:
        raise ValueError(f"{amount!r} is no amount of memory. Give bytes, or a number with one of {list(UNITS)[1:]}.")
    return int(float(match[1]) * UNITS[unit])


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still take on `device`; on CUDA including what torch keeps for later use."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available


@dataclass
class Budget:
    """What may be taken at once.

    Attributes:
        state_bytes: memory for states: of all layers what is kept from batch to batch, and of one layer those that the
            sequences of a batch go on from.
        tokens: of a batch.
        copy_bytes: memory for what is kept of weights from batch to batch, such as their half-precision copies. Beyond
            it they are copied in each batch. None: no limit.
        halved: how often memory ran out.
    """

    state_bytes: int
    tokens: int
    copy_bytes: int | None = None
    halved: int = 0

    @classmethod
    def find(
        cls, model: Any, device: torch.device, state_bytes: int | None = None, tokens: int | None = None
    ) -> Budget:
        """From the device's free memory, where not given."""
        free = free_memory(device)
        # Half-precision copies and what else is kept are smaller than all the weights together.
        copies = min(sum(weight.nbytes for weight in model.parameters()), int(free * COPIES_SHARE))
        free -= copies
        if state_bytes is None:
            state_bytes = int(free * STATES_SHARE)
        if tokens is None:
            fits = int(free * TOKENS_SHARE) // (4 * VALUES_PER_TOKEN * model.config.hidden_size)
            tokens = max(FEWEST_TOKENS, min(fits, MOST_TOKENS.get(device.type, MOST_TOKENS["cpu"])))
        return cls(state_bytes, tokens, copies)

    def halve(self) -> bool:
        """Take half as much from here on; False if that is no use any more."""
        if self.tokens <= FEWEST_TOKENS:
            return False
        self.halved += 1
        self.state_bytes //= 2
        self.copy_bytes = None if self.copy_bytes is None else self.copy_bytes // 2
        self.tokens = max(FEWEST_TOKENS, self.tokens // 2)
        return True

    def most_states(self, model: Any) -> int:
        """Of all layers."""
        return self.state_bytes // StatePool.bytes_per_state(model)

    def slots(self, model: Any, tree: PrefixTree, within: int) -> int:
        """States to keep room for: as many as two full batches leave, the tree has, or memory holds.

        Args:
            within: as for `schedule.batches`.
        """
        height = int(tree.height.max(initial=0))
        forks = tree.height > (1 if within else 0)
        if not forks.any():
            return height
        length = (tree.stop - tree.start)[forks].mean()
        useful = min(math.ceil(2 * self.tokens / length), int(forks.sum())) + height
        left = self.state_bytes - within * bytes_in_a_layer(model)
        return max(height, min(useful, left // StatePool.bytes_per_state(model)))

    def within(self, model: Any, device: torch.device) -> int:
        """Prefixes that run in one batch with their branches: states of one layer that half of the memory holds.

        On a CPU none: there states in slots cost less than a scan that has to go over the batch in two parts.
        """
        return 0 if device.type == "cpu" else self.state_bytes // 2 // bytes_in_a_layer(model)


def bytes_in_a_layer(model: Any) -> int:
    """Bytes of a state in one of the layers."""
    return StatePool.bytes_per_state(model) // model.config.num_hidden_layers


def fork_cost(model: Any) -> float:
    """What leaving a state costs, or going on from one, in tokens: its values by those that a token's layer moves."""
    moved = VALUES_MOVED.get(next(model.parameters()).device.type, VALUES_MOVED["cpu"])
    return bytes_in_a_layer(model) / 4 / (moved * model.config.hidden_size)
