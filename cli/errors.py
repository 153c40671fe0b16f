"""What went wrong, said to the person at the keyboard: no traceback for what they can mend."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import torch
from accelerate.utils.memory import should_reduce_batch_size

from peft_mamba import GradientError, KernelError, PrecastError, PresetError, TargetError
from peft_mamba.checkpoints import CheckpointError
from peft_mamba.precision import PrecisionError

from .data import DataError
from .distributed import ScaleError
from .outputs import SaveError
from .settings import SettingsError
from .trainer import DivergedError

EXPECTED = (
    CheckpointError,
    DataError,
    DivergedError,
    GradientError,
    KernelError,
    PrecastError,
    PrecisionError,
    PresetError,
    SaveError,
    ScaleError,
    SettingsError,
    TargetError,
)


class OutOfMemoryError(RuntimeError):
    """The device's memory does not hold a step."""


@contextmanager
def explained(options: dict[str, Any]) -> Iterator[None]:
    """Turn errors that have a remedy into one message; let all others through with their traceback."""
    try:
        yield
    except EXPECTED as error:
        raise click.ClickException(str(error)) from error
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise click.ClickException(memory_message(error, options)) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, Exception) and should_reduce_batch_size(error)
    )


def memory_message(error: BaseException, options: dict[str, Any]) -> str:
    """By how much memory was exceeded, and what to change."""
    said = str(error)
    wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", said)
    if wanted:
        missing = wanted[1]
    else:
        size = re.search(r"you tried to allocate (\d+) bytes", said)
        missing = f"{int(size[1]) / 2**30:.2f} GiB" if size else "more than there is"
    free = ""
    if torch.cuda.is_available():
        left, total = torch.cuda.mem_get_info()
        free = f" ({left / 2**30:.1f} of {total / 2**30:.1f} GiB are free on {torch.cuda.get_device_name()})"
    change = []
    batch_size = options.get("batch_size")
    if isinstance(batch_size, int) and batch_size > 1:
        accumulation = (options.get("gradient_accumulation") or 1) * 2
        change.append(
            f"--batch-size {batch_size // 2} --gradient-accumulation {accumulation} (the same effective batch), or "
            "--batch-size auto"
        )
    elif batch_size is None:
        change.append("--batch-size auto")
    if not options.get("gradient_checkpointing") and options.get("recompute") != "block":
        change.append("--recompute block (for Mamba; --gradient-checkpointing for other models)")
    if options.get("preset") == "full":
        change.append("a LoRA (--preset sll)")
    if options.get("precision") == "fp32":
        change.append("--precision bf16")
    change.append(f"a --max-length below {options.get('max_length') or 512}")
    return f"Out of memory: a step needed {missing} more{free}. Try {'; or '.join(change)}."
