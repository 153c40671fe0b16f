"""Which implementation of the scans and the convolution runs, chosen in this one place.

    reference   one step of Python per token, reads like the equations; any device
    torch       PyTorch alone, in chunks of time; any device
    mamba_ssm   the CUDA and Triton kernels of mamba-ssm and causal-conv1d; CUDA, where both import

Left alone, a CUDA tensor gets mamba_ssm where that imports and torch otherwise; every other device gets torch. The
environment variable PEFT_MAMBA_KERNELS forces one of the three names for the whole process.

    PEFT_MAMBA_KERNELS=torch python train.py
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "PEFT_MAMBA_KERNELS"
# Name to module beside this file; a module brings selective_scan, ssd and causal_conv1d with reference's signatures.
IMPLEMENTATIONS = {"reference": "reference", "torch": "chunked", "mamba_ssm": "mamba_ssm"}
# What torch.compile says where it breaks its graph, which it must not with fullgraph=True.
COMPILED_AROUND = "peft_mamba's scans loop over time or call a foreign extension: torch.compile goes around them"
_CUDA_ONLY = {"mamba_ssm"}
_PREFERRED_ON_CUDA = ("mamba_ssm",)


class KernelError(RuntimeError):
    """The implementation that was asked for by name cannot run here; the message says why."""


@dataclass(frozen=True)
class Kernels:
    """One implementation of the three operations, and why it is the one."""

    name: str
    reason: str
    selective_scan: Callable
    ssd: Callable
    causal_conv1d: Callable
    # Operation to the implementation that runs it, where that is not the one it is named for.
    paths: dict[str, str]


@cache
def _load(name: str) -> tuple[Any, str]:
    """(module, "") or (None, why it does not import). A broken installation is logged once, a missing one is not."""
    try:
        return importlib.import_module(f"{__name__}.{IMPLEMENTATIONS[name]}"), ""
    except Exception as error:  # a compiled extension can fail to load in any way
        reason = f"{type(error).__name__}: {error}"
        missing = isinstance(error, ModuleNotFoundError) and error.name == "mamba_ssm"
        if not missing:
            logger.warning("The %s kernels are installed but do not import: %s", name, reason)
        return None, "mamba-ssm is not installed" if missing else reason


def available(device: str = "cuda") -> dict[str, str]:
    """Name of each implementation to "" where it can run on this kind of device, else to why it cannot."""
    return {name: _unusable(name, device) for name in IMPLEMENTATIONS}


def _unusable(name: str, device: str) -> str:
    if name in _CUDA_ONLY and device != "cuda":
        return f"runs on cuda, not on {device}"
    return _load(name)[1]


def select(device: str, name: str | None = None) -> Kernels:
    """The kernels for tensors on a kind of device ("cpu", "cuda", …).

    Args:
        name: one of IMPLEMENTATIONS; default: the environment variable, else the best that runs on the device.

    Raises:
        KernelError: the name is unknown, or that implementation cannot run on this device.
    """
    return _select(device, name or os.environ.get(ENVIRONMENT_VARIABLE) or None)


def describe(device: str) -> dict[str, str]:
    """What `select` gives on a kind of device, in words, for logs, reports and results: kernels, reason, each path.

    Does not raise: where forced kernels cannot run, the reason says so.
    """
    try:
        chosen = select(device)
    except KernelError as error:
        return {"kernels": "none", "reason": str(error)}
    return {"kernels": chosen.name, "reason": chosen.reason, **chosen.paths}


@cache
def _select(device: str, forced: str | None) -> Kernels:
    if forced is not None:
        if forced not in IMPLEMENTATIONS:
            raise KernelError(f"No kernels named {forced!r}; {ENVIRONMENT_VARIABLE} is one of {list(IMPLEMENTATIONS)}.")
        if problem := _unusable(forced, device):
            raise KernelError(f"The kernels {forced!r} were asked for by name but cannot run: {problem}.")
        return _kernels(forced, "asked for by name")
    passed_over = []
    for name in _PREFERRED_ON_CUDA if device == "cuda" else ():
        if not (problem := _unusable(name, device)):
            return _kernels(name, f"the fastest here for {device}")
        passed_over.append(f"{name}: {problem}")
    return _kernels("torch", "; ".join(passed_over) or f"the fastest here for {device}")


def _kernels(name: str, reason: str) -> Kernels:
    module = _load(name)[0]
    paths = module.paths() if hasattr(module, "paths") else {}
    return Kernels(name, reason, module.selective_scan, module.ssd, module.causal_conv1d, paths)


@torch.compiler.disable(reason=COMPILED_AROUND)
def selective_scan(u: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`reference.selective_scan` by the implementation chosen for u's device."""
    return select(u.device.type).selective_scan(u, *args, **kwargs)


@torch.compiler.disable(reason=COMPILED_AROUND)
def ssd(x: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`reference.ssd` by the implementation chosen for x's device."""
    return select(x.device.type).ssd(x, *args, **kwargs)


@torch.compiler.disable(reason=COMPILED_AROUND)
def causal_conv1d(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """`reference.causal_conv1d` by the implementation chosen for x's device."""
    return select(x.device.type).causal_conv1d(x, *args, **kwargs)
