"""Training on several processes: what Mamba needs beyond what accelerate and transformers do for DDP and FSDP2.

`MambaTrainer` calls `prepare` once its accelerator exists, saves inside `gathered`, passes what it saves through
`without_tied`, and loads the optimizer's state inside `past_scaler`. The code path is the same on GPUs and on CPU
processes (gloo).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from peft_mamba.mixers import mixers_of

SUPPORTED = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP}


class ScaleError(ValueError):
    """A distributed set-up that would train something else than what was asked for; the message says what to type."""


def prepare(accelerator: Accelerator, model: nn.Module) -> bool:
    """Make `accelerator` train `model` on all its processes; call it before the accelerator prepares anything.

    Returns:
        Whether FSDP shards the model: the trainer's `is_fsdp_enabled`.

    Raises:
        ScaleError: a launcher, plugin or option that is not DDP or FSDP2, or that would cast the weights or split a
            mixer.
    """
    _check_launch(accelerator)
    if accelerator.distributed_type == DistributedType.MULTI_CPU and sharded_launch():
        _shard_on_cpu(accelerator)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded:
        plugin = accelerator.state.fsdp_plugin
        _check_plugin(plugin)
        _wrap_blocks(plugin, model)
        # FSDP2 takes from every process the shard of what that process has, so weights that differ, such as those of
        # adapters drawn from different seeds, would become a mixture. With this all shards come from the first
        # process, as under DDP. (It is also accelerate's own default at launch, and spares GPUs the whole model.)
        plugin.cpu_ram_efficient_loading = True
    return sharded


@contextmanager
def gathered(accelerator: Accelerator) -> Iterator[None]:
    """Save whole weights in here: every process must enter.

    `Trainer.save_model` writes no weights at all, and says nothing, when FSDP's state dict type is SHARDED_STATE_DICT,
    which is FSDP2's default. Whole, they are an ordinary checkpoint or adapter, which one process can load.
    What a checkpoint keeps to resume from is not written here, and stays sharded or whole as the user chose.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        yield
        return
    chosen, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = chosen


def without_tied(model: nn.Module, state_dict: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
    """`state_dict` less the names of tied weights, as transformers itself saves a model.

    Gathering from FSDP makes two tensors of the matrix that is both embedding and output head; transformers
    recognises ties by shared memory, and would store it twice.
    """
    if state_dict is None:
        return None
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in state_dict.items() if tied.get(name) not in state_dict}


@contextmanager
def past_scaler(optimizer: AcceleratedOptimizer) -> Iterator[None]:
    """Load the optimizer's state in here, when a run resumes.

    torch gives FSDP2's optimizer a state to load into by a step with gradients of zero, and the loss scaler refuses a
    step before it has scaled a loss.
    """
    scaler, optimizer.scaler = optimizer.scaler, None
    try:
        yield
    finally:
        optimizer.scaler = scaler


def sharded_launch() -> bool:
    """Whether the launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _check_launch(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type
    if kind not in SUPPORTED:
        raise ScaleError(
            f"{kind.value} is not tested with Mamba. Launch with DDP (accelerate launch --multi_gpu) or FSDP2 "
            "(accelerate launch --use_fsdp --fsdp_version 2)."
        )
    if kind == DistributedType.NO and sharded_launch():
        raise ScaleError("FSDP was asked for, but there is one process to shard over. Give --num_processes 2 or more.")
    if accelerator.mixed_precision != "no":
        # accelerate would run autocast of its own on top, and have FSDP cast the weights: A_log, D and dt_bias too.
        raise ScaleError(
            f"accelerate launch says mixed_precision={accelerator.mixed_precision}, which casts weights that must stay "
            "fp32. Launch with --mixed_precision no and give the precision to mamba-ft: --precision "
            f"{accelerator.mixed_precision}."
        )
    parallel = accelerator.parallelism_config
    if parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled):
        # A state runs through the whole sequence, and a mixer reads its weights whole.
        raise ScaleError("Tensor, context and sequence parallelism cannot split a Mamba. Use DDP or FSDP2.")


def _shard_on_cpu(accelerator: Accelerator) -> None:
    """Switch FSDP on for CPU processes, as accelerate does for GPUs.

    accelerate (1.15, `AcceleratorState.__init__`) reads a request for FSDP on accelerators alone, and on CPU processes
    runs DDP without a word; torch's `fully_shard` works on both.
    """
    state = accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    # Every new AcceleratorState(), such as the optimizer's, copies this over its own.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def _check_plugin(plugin: FullyShardedDataParallelPlugin) -> None:
    if plugin.fsdp_version != 2:
        # It flattens parameters, so those in another process' shard have no gradient here: the check that all
        # adapters learn cannot tell them from dead ones.
        raise ScaleError("FSDP1 flattens the adapters. Use FSDP2: accelerate launch --use_fsdp --fsdp_version 2.")
    policy = plugin.mixed_precision_policy
    if policy is not None and (policy.param_dtype is not None or policy.output_dtype is not None):
        raise ScaleError(
            f"FSDP's mixed precision policy ({policy}) casts weights that must stay fp32. Leave it out and give the "
            "precision to mamba-ft: --precision."
        )


def _wrap_blocks(plugin: FullyShardedDataParallelPlugin, model: nn.Module) -> None:
    """Make each block of the model one unit of FSDP, unless the user named its classes.

    Without a policy, accelerate's default, all layers are gathered at once, and nothing is saved. The mixers read
    weights of their children (conv1d, dt_proj) directly, so a mixer is the smallest unit there can be.
    """
    mixers = mixers_of(model)
    blocks = {type(model.get_submodule(name.rpartition(".")[0])).__name__ for name, _ in mixers}
    if not blocks:
        return  # another family: its own _no_split_modules say
    policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)
    known = blocks | {type(mixer).__name__ for _, mixer in mixers}
    named = set(plugin.transformer_cls_names_to_wrap or ())
    if policy not in (None, transformer_auto_wrap_policy) or not named <= known:
        raise ScaleError(
            f"FSDP cannot wrap a Mamba by {', '.join(sorted(named - known)) or 'size'}: the parts of a mixer must be "
            f"gathered together. Leave --fsdp_auto_wrap_policy out, or wrap by class: {', '.join(sorted(blocks))}."
        )
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted(named or blocks)
