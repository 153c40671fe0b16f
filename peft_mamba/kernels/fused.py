"""Which of our small Triton kernels there are beside the scans and the convolution, and for what.

They make one pass over memory of what PyTorch makes several of. On other devices, and where PEFT_MAMBA_KERNELS is torch
or reference, PyTorch alone does the same.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from types import ModuleType

import torch

from .choice import ENVIRONMENT_VARIABLE

logger = logging.getLogger(__name__)

PYTORCH_ONLY = ("torch", "reference")


@functools.cache
def kernels(name: str) -> ModuleType | None:
    """The Triton kernels of the module `name` beside this one, or None where Triton is not there."""
    try:
        return importlib.import_module(f"{__package__}.{name}")
    except ImportError as error:
        if getattr(error, "name", None) != "triton":
            logger.warning("Triton is installed but the kernels of %s do not import: %s", name, error)
        return None


def for_tensor(name: str, x: torch.Tensor) -> ModuleType | None:
    """`kernels(name)` where they are what takes x; None: PyTorch alone."""
    if torch.compiler.is_compiling() or not x.is_cuda or x.dtype == torch.float64:
        return None
    return None if os.environ.get(ENVIRONMENT_VARIABLE) in PYTORCH_ONLY else kernels(name)
