"""The scans and the convolution of both families, and the one place that chooses what runs each of them.

    reference   one step of Python per token, reads like the equations; any device
    torch       PyTorch alone, in chunks of time; any device
    triton      ours, compiled by Triton at first use, with nothing to install; CUDA (in Triton's interpreter: a CPU)
    mamba_ssm   the CUDA and Triton kernels of mamba-ssm and causal-conv1d, where those import; CUDA

`choice.PREFERRED_ON_CUDA` says which of them a CUDA tensor gets, operation by operation; every other device gets torch.
The environment variable PEFT_MAMBA_KERNELS or the context `use` forces one, for all operations or for some:

    PEFT_MAMBA_KERNELS=torch python train.py
    PEFT_MAMBA_KERNELS=selective_scan=mamba_ssm,ssd=triton python train.py

float32 is multiplied without TF32 on every path, unless `torch.backends.cuda.matmul.allow_tf32`.
"""

from __future__ import annotations

import torch

from .choice import (
    ENVIRONMENT_VARIABLE,
    IMPLEMENTATIONS,
    OPERATIONS,
    KernelError,
    Kernels,
    available,
    describe,
    select,
    use,
)

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "IMPLEMENTATIONS",
    "OPERATIONS",
    "KernelError",
    "Kernels",
    "available",
    "causal_conv1d",
    "describe",
    "select",
    "selective_scan",
    "ssd",
    "use",
]

# What torch.compile says where it breaks its graph, which it must not with fullgraph=True.
COMPILED_AROUND = "peft_mamba's scans loop over time or call a foreign extension: torch.compile goes around them"


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
