"""How much memory a step takes, estimated before anything is loaded; the largest batch and the least recomputation
that fit.

What a layer keeps for backward is measured, not modelled: the layers of these models are alike, so two layers with
random weights, run on the run's own device, kernels and precision, tell what all of them keep.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from peft_mamba import use_mixers
from peft_mamba.mixers import LEVELS, recompute
from peft_mamba.mixers.recomputation import kept_for_backward
from peft_mamba.precast import precastable
from peft_mamba.precision import Precision

from .distributed import sharded_launch
from .errors import out_of_memory
from .fused_head import SFT_OUTPUTS, add_fused_lm_head
from .model import with_adapter
from .settings import Settings, SettingsError

CPU_SHARE = 0.8  # of the memory that is free: there is no error to catch where a system swaps, or kills the process
MARGIN = 0.1  # of a GPU's memory that a level below block leaves free: real batches differ from the one that is tried


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes: weights, in fp32 but for those that --precast holds in half precision; gradients and AdamW's two moments
    of what trains; copies of weights in half precision, and what one token leaves for backward.

    The workspace of the loss and the allocator's fragments come on top of it.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: float
    activations_per_token: float

    def total(self, tokens: int) -> float:
        """Bytes of a step over `tokens` tokens at once."""
        static = self.weights + self.gradients + self.optimizer + self.copies
        return static + tokens * self.activations_per_token


def estimate(model: Any, settings: Settings, precision: Precision, device: torch.device) -> MemoryEstimate:
    """For a model with its adapter, which may be on the meta device, and whose weights are not yet precast."""
    parameters = list(model.parameters())
    half = sum(weight.numel() for weight in precastable(model)) if settings.precast and device.type == "cuda" else 0
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    copies, activations = _kept(model.config, settings, precision, device)
    return MemoryEstimate(
        weights=4 * sum(parameter.numel() for parameter in parameters) - 2 * half,
        gradients=4 * trainable,
        optimizer=8 * trainable,
        copies=copies,
        activations_per_token=activations,
    )


def _kept(
    config: PretrainedConfig, settings: Settings, precision: Precision, device: torch.device
) -> tuple[float, float]:
    """Bytes that the backbone keeps for backward: whatever the batch, and a token."""
    layers = config.num_hidden_layers
    (fixed_one, token_one), (fixed_two, token_two) = (
        _kept_by(_with_layers(config, count), settings, precision, device) for count in (1, 2)
    )
    if settings.gradient_checkpointing or settings.recompute == "block":
        # each layer's input, and all of the one that is being recomputed
        return fixed_one, token_one + (layers - 1) * 4 * config.hidden_size
    return fixed_one + (layers - 1) * (fixed_two - fixed_one), token_one + (layers - 1) * (token_two - token_one)


def _with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    return config


def _kept_by(
    config: PretrainedConfig, settings: Settings, precision: Precision, device: torch.device
) -> tuple[float, float]:
    """The same for a whole model of this config, which is built with random weights."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        bare = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        use_mixers(bare)
        model, _ = with_adapter(bare, settings)
    model.train()
    recompute(model, "mixer" if settings.recompute == "mixer" else "none")

    def kept(rows: int) -> int:
        tokens = torch.zeros(rows, settings.max_length, dtype=torch.long, device=device)
        with precision.scope(device):
            return kept_for_backward(
                lambda: bare.base_model(input_ids=tokens, use_cache=False), apart_from=model.parameters()
            )

    one, two = kept(1), kept(2)
    return max(2 * one - two, 0), (two - one) / settings.max_length


def fit(
    model: Any, settings: Settings, precision: Precision, device: torch.device, world: int
) -> tuple[int, str | None]:
    """Batch size and level of recomputation, those that were left to us chosen by what memory holds.

    The batch: the largest of `max_length` tokens a device whose multiples make up the effective batch. The level: the
    first of none, mixer and block with which that batch fits, so that no more is made again than must be. On CUDA each
    candidate is tried: forward, backward, and room for AdamW's moments and DDP's buckets; less than block only counts
    if it leaves a tenth of the memory free, since batches differ. On a CPU the estimate is held against the free
    memory. Where FSDP shards the model there is nothing to try, and the level is mixer.

    Raises:
        SettingsError: a batch size is to be found and FSDP shards the model, the processes cannot share the effective
            batch, or nothing fits.
    """
    automatic = settings.batch_size == "auto"
    if sharded_launch():
        if automatic:
            raise SettingsError(
                "--batch-size auto tries a whole model on each device, and FSDP shards it. Give --batch-size and "
                "--gradient-accumulation."
            )
        return int(settings.batch_size), "mixer" if settings.recompute == "auto" else settings.recompute
    sizes = _sizes(settings, world) if automatic else [int(settings.batch_size)]
    levels = LEVELS if settings.recompute == "auto" else (settings.recompute,)
    fits, limit = _test(model, settings, precision, device, world)
    for size in sizes:
        for level in levels:
            if not automatic and level == levels[-1]:
                return size, level  # there is no choice left: if it does not fit, the run says by how much
            if fits(size, level):
                return size, level
    more = ""
    if levels[-1] != "block" and not settings.gradient_checkpointing:
        more = "--gradient-checkpointing, " if levels[-1] is None else "--recompute block, "
    raise SettingsError(
        f"--batch-size auto: not even one sequence of {settings.max_length} tokens fits into {limit}. Try "
        f"{more}a lower --max-length, or another --preset."
    )


def _sizes(settings: Settings, world: int) -> list[int]:
    effective = settings.effective_batch_size
    assert effective is not None
    if effective % world:
        raise SettingsError(f"--effective-batch-size {effective} cannot be shared by {world} processes evenly.")
    share = effective // world
    return [size for size in range(share, 0, -1) if share % size == 0]


def _test(
    model: Any, settings: Settings, precision: Precision, device: torch.device, world: int
) -> tuple[Callable[[int, str | None], bool], str]:
    """Whether a batch fits at a level, and what into, in words."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return _Trial(model, settings, precision, device, world), f"{total / 2**30:.0f} GiB of {device}"
    estimates: dict[str | None, MemoryEstimate] = {}
    available = psutil.virtual_memory().available * CPU_SHARE / world

    def fits(size: int, level: str | None) -> bool:
        tokens = size * settings.max_length
        if settings.batch_size != "auto" and _ceiling(model, tokens) <= available:
            return True
        if level not in estimates:
            estimates[level] = estimate(model, replace(settings, recompute=level), precision, device)
        return estimates[level].total(tokens) - estimates[level].weights <= available  # the weights are there already

    return fits, f"{available / 2**30:.1f} GiB of free memory"


def _ceiling(model: Any, tokens: int) -> float:
    """More bytes than any Mamba takes for a step: spares measuring where memory is plentiful."""
    config, parameters = model.config, sum(parameter.numel() for parameter in model.parameters())
    return 16 * parameters + tokens * 1000 * config.num_hidden_layers * config.hidden_size


class _Trial:
    """Tries a step of a given size on a device and leaves no trace of it."""

    def __init__(self, model: Any, settings: Settings, precision: Precision, device: torch.device, world: int) -> None:
        self._model, self._settings, self._precision = model, settings, precision
        self._device, self._world = device, world

    def __call__(self, size: int, level: str | None) -> bool:
        if level is not None:
            recompute(self._model, level)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        fitted = self._run(size) and (level not in LEVELS[:-1] or self._leaves_room())
        self._model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if self._world > 1:  # the one with the least room decides for all
            flag = torch.tensor(float(fitted), device=self._device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
            fitted = bool(flag)
        return fitted

    def _leaves_room(self) -> bool:
        if self._device.type != "cuda":
            return True
        free, total = torch.cuda.mem_get_info(self._device)
        ours = torch.cuda.memory_reserved(self._device)
        return torch.cuda.max_memory_allocated(self._device) <= ours + free - MARGIN * total

    def _run(self, size: int) -> bool:
        base = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        add_fused_lm_head(base, outputs=SFT_OUTPUTS)  # as the trainer does
        try:
            with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
                self._step(size, base.config.vocab_size)
        except Exception as error:
            if not out_of_memory(error):
                raise
            return False
        finally:
            del base.forward  # the instance's, which add_fused_lm_head has set
        return True

    def _step(self, size: int, vocabulary: int) -> None:
        tokens = torch.randint(vocabulary, (size, self._settings.max_length), device=self._device)
        trainable = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        # AdamW's two moments, and DDP's buckets
        room = [torch.empty_like(each) for each in trainable for _ in range(2 + (self._world > 1))]
        self._model.train()
        with self._precision.scope(self._device):
            loss = self._model(input_ids=tokens, labels=tokens, fused_lm_head=True, use_cache=False).loss
        loss.backward()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        del room
