"""Which implementation runs each operation, and why: the tables, what forces one, and what can run here."""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "PEFT_MAMBA_KERNELS"
OPERATIONS = ("selective_scan", "ssd", "causal_conv1d")
# Name to the module of each operation that it brings; a function of that name there has the signature of reference's.
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "reference": dict.fromkeys(OPERATIONS, "reference"),
    "torch": dict.fromkeys(OPERATIONS, "chunked"),
    "triton": {operation: f"triton.{operation}" for operation in OPERATIONS},
    "mamba_ssm": {"selective_scan": "mamba_ssm", "ssd": "mamba_ssm", "causal_conv1d": "mamba_ssm_conv1d"},
}
# The fastest first, as benchmarks/ measures them; torch comes after, and is what every other device gets. Of the
# convolutions causal-conv1d's is the faster forward (1.3x), ours the faster forward and backward (1.1x to 1.7x), and
# packed sequences with states, as in scoring, are ours in any case.
PREFERRED_ON_CUDA: dict[str, tuple[str, ...]] = {
    "selective_scan": ("triton", "mamba_ssm"),
    "ssd": ("triton", "mamba_ssm"),
    "causal_conv1d": ("triton", "mamba_ssm"),
}
_CUDA_ONLY = {"triton", "mamba_ssm"}
# Module that is missing to the distribution that brings it.
_DISTRIBUTIONS = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d", "triton": "triton"}

_in_use: str | None = None


class KernelError(RuntimeError):
    """The implementation that was asked for by name cannot run here; the message says why."""


@dataclass(frozen=True)
class Kernels:
    """The implementation of each operation, and why it is the one.

    Attributes:
        name: of the implementation, or `operation=name,…` where operations differ; either may be asked for.
        reason: why, over all operations.
        paths: operation to the name of what runs it, with the reason where that is not the reason for all.
    """

    name: str
    reason: str
    selective_scan: Callable
    ssd: Callable
    causal_conv1d: Callable
    paths: dict[str, str]


def select(device: str, name: str | None = None) -> Kernels:
    """The kernels for tensors on a kind of device ("cpu", "cuda", …).

    Args:
        name: one of IMPLEMENTATIONS for all operations, `operation=name` for one, or several of these separated by
            commas or "+"; default: what `use` says, else the environment variable, else the best that runs on the
            device. An operation that an implementation does not bring at all goes to the best of the others.

    Raises:
        KernelError: a name is unknown, or that implementation cannot run on this device.
    """
    return _select(device, name or _in_use or os.environ.get(ENVIRONMENT_VARIABLE) or None)


@contextmanager
def use(name: str | None) -> Iterator[None]:
    """Force kernels as `select` takes them while the context lasts; None leaves the choice as it is.

    Holds for the whole process, since backward runs in threads of its own.

    Raises:
        KernelError: the name is unknown. Whether it can run shows on the device, in `select`.
    """
    global _in_use
    if name is not None:
        _parse(name)
    before = _in_use
    _in_use = name or before
    try:
        yield
    finally:
        _in_use = before


def describe(device: str) -> dict[str, str]:
    """What `select` gives on a kind of device, for logs, reports and results: kernels, reason, each operation.

    Does not raise: where forced kernels cannot run, the reason says so.
    """
    try:
        chosen = select(device)
    except KernelError as error:
        return {"kernels": "none", "reason": str(error)}
    return {"kernels": chosen.name, "reason": chosen.reason, **chosen.paths}


def available(device: str = "cuda") -> dict[str, str]:
    """Name of each implementation to "" where all that it brings runs on this kind of device, else to why not."""
    return {
        name: next(filter(None, (_unusable(name, operation, device) for operation in operations)), "")
        for name, operations in IMPLEMENTATIONS.items()
    }


def ours(operation: str) -> Callable:
    """What foreign kernels for CUDA hand over that they cannot do: our Triton kernel, else PyTorch alone."""
    return _load("triton", operation)[0] or _load("torch", operation)[0]  # type: ignore[return-value]


@cache
def _load(name: str, operation: str) -> tuple[Callable | None, str]:
    """(function, "") or (None, why there is none). A broken installation is logged, a missing one is not."""
    module = IMPLEMENTATIONS[name].get(operation)
    if module is None:
        return None, f"has no {operation}"
    try:
        return getattr(importlib.import_module(f"{__package__}.{module}"), operation), ""
    except Exception as error:  # a compiled extension can fail to load in any way
        if isinstance(error, ModuleNotFoundError) and error.name in _DISTRIBUTIONS:
            return None, f"{_DISTRIBUTIONS[error.name]} is not installed"
        reason = f"{type(error).__name__}: {error}"
        _warn(name, reason)
        return None, reason


@cache
def _warn(name: str, reason: str) -> None:
    logger.warning("The %s kernels are installed but do not import: %s", name, reason)


def _unusable(name: str, operation: str, device: str) -> str:
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch
    if name in _CUDA_ONLY and device != "cuda" and not interpreted:
        return f"runs on cuda, not on {device}"
    return _load(name, operation)[1]


@cache
def _parse(asked: str) -> dict[str, str]:
    """Operation to the implementation that was asked for; an operation's own name goes before one for all."""
    for_all: dict[str, str] = {}
    for_one: dict[str, str] = {}
    for part in filter(None, re.split(r"[,+\s]+", asked)):
        operation, _, name = part.rpartition("=")
        if name not in IMPLEMENTATIONS:
            raise KernelError(
                f"No kernels named {name!r}; there are {list(IMPLEMENTATIONS)}, for all operations or for one, as in "
                "selective_scan=torch."
            )
        if operation and operation not in OPERATIONS:
            raise KernelError(f"Kernels have no operation {operation!r} (in {part!r}); there are {list(OPERATIONS)}.")
        if operation and operation not in IMPLEMENTATIONS[name]:
            raise KernelError(f"The kernels {name!r} have no {operation} (in {part!r}).")
        if operation in for_one or (for_all and not operation):
            raise KernelError(f"{asked!r} names kernels for {operation or 'all operations'} twice.")
        if operation:
            for_one[operation] = name
        else:
            for_all = dict.fromkeys(OPERATIONS, name)
    return for_all | for_one


@cache
def _select(device: str, asked: str | None) -> Kernels:
    forced = _parse(asked) if asked else {}
    chosen = {operation: _choose(operation, device, forced.get(operation)) for operation in OPERATIONS}
    names = {operation: name for operation, (name, _) in chosen.items()}
    reasons = {operation: reason for operation, (_, reason) in chosen.items()}
    same = len(set(names.values())) == 1
    return Kernels(
        name=names["ssd"] if same else ",".join(f"{operation}={name}" for operation, name in names.items()),
        reason="; ".join(dict.fromkeys(reasons.values())),
        paths={
            operation: name if len(set(reasons.values())) == 1 else f"{name} ({reasons[operation]})"
            for operation, name in names.items()
        },
        **{operation: _load(name, operation)[0] for operation, name in names.items()},  # type: ignore[arg-type]
    )


def _choose(operation: str, device: str, forced: str | None) -> tuple[str, str]:
    """(implementation, reason) of one operation."""
    if forced is not None and operation in IMPLEMENTATIONS[forced]:
        if problem := _unusable(forced, operation, device):
            raise KernelError(
                f"The kernels {forced!r} were asked for by name but cannot run {operation}: {problem}. Others can "
                f"be asked for by operation: {operation}=torch."
            )
        return forced, "asked for by name"
    passed_over = [] if forced is None else [f"{forced} has no {operation}"]
    for name in PREFERRED_ON_CUDA[operation] if device == "cuda" else ():
        if name == forced or operation not in IMPLEMENTATIONS[name]:
            continue
        if not (problem := _unusable(name, operation, device)):
            return name, "; ".join(passed_over) or f"the fastest here for {device}"
        passed_over.append(f"{name}: {problem}")
    return "torch", "; ".join(passed_over) or f"the fastest here for {device}"
