"""How much memory a step takes, estimated before anything is loaded, and the largest batch that fits.

What a layer keeps for backward is measured, not modelled: the layers of these models are alike, so two layers with
random weights, run on the run's own device, kernels and precision, tell what all of them keep.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from trl.trainer.utils import add_fused_lm_head

from peft_mamba import use_mixers
from peft_mamba.precision import Precision

from .distributed import sharded_launch
from .errors import out_of_memory
from .model import with_adapter
from .settings import Settings, SettingsError

CPU_SHARE = 0.8  # of the memory that is free: there is no error to catch where a system swaps, or kills the process


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes: fp32 weights, gradients and AdamW's two moments of what trains, copies of weights in half precision, and
    what one token leaves for backward.

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
    """For a model with its adapter, which may be on the meta device."""
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    copies, activations = _kept(model.config, settings, precision, device)
    return MemoryEstimate(
        weights=4 * sum(parameter.numel() for parameter in parameters),
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
    if settings.gradient_checkpointing:  # each layer's input, and all of the one that is being recomputed
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
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def kept(rows: int) -> int:
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage  # held, so that no other gets its address
            return tensor

        tokens = torch.zeros(rows, settings.max_length, dtype=torch.long, device=device)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), precision.scope(device):
            bare.base_model(input_ids=tokens, use_cache=False)
        return sum(storage.nbytes() for storage in storages.values())

    one, two = kept(1), kept(2)
    return max(2 * one - two, 0), (two - one) / settings.max_length


def fit_batch(model: Any, settings: Settings, precision: Precision, device: torch.device, world: int) -> int:
    """The largest batch of `max_length` tokens a device whose multiples make up the effective batch.

    On CUDA each candidate is tried: forward, backward, and room for AdamW's moments and DDP's buckets. On a CPU the
    estimate is held against the free memory.

    Raises:
        SettingsError: FSDP shards the model, the processes cannot share the effective batch, or nothing fits.
    """
    if sharded_launch():
        raise SettingsError(
            "--batch-size auto tries a whole model on each device, and FSDP shards it. Give --batch-size and "
            "--gradient-accumulation."
        )
    effective = settings.effective_batch_size
    assert effective is not None
    if effective % world:
        raise SettingsError(f"--effective-batch-size {effective} cannot be shared by {world} processes evenly.")
    share = effective // world
    fits: Callable[[int], bool]
    if device.type == "cuda":
        fits = _Trial(model, settings, precision, device, world)
        limit = f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB of {device}"
    else:
        needs = estimate(model, settings, precision, device)
        # The weights are there already.
        available = psutil.virtual_memory().available * CPU_SHARE / world + needs.weights
        fits = lambda size: needs.total(size * settings.max_length) <= available  # noqa: E731
        limit = f"{available / 2**30:.1f} GiB of free memory"
    for size in range(share, 0, -1):
        if share % size == 0 and fits(size):
            return size
    raise SettingsError(
        f"--batch-size auto: not even one sequence of {settings.max_length} tokens fits into {limit}. Try "
        "--gradient-checkpointing, a lower --max-length, or another --preset."
    )


class _Trial:
    """Tries a step of a given size on a device and leaves no trace of it."""

    def __init__(self, model: Any, settings: Settings, precision: Precision, device: torch.device, world: int) -> None:
        self._model, self._settings, self._precision = model, settings, precision
        self._device, self._world = device, world

    def __call__(self, size: int) -> bool:
        fitted = self._run(size)
        self._model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if self._world > 1:  # the one with the least room decides for all
            flag = torch.tensor(float(fitted), device=self._device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
            fitted = bool(flag)
        return fitted

    def _run(self, size: int) -> bool:
        base = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))  # as SFTTrainer does
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
