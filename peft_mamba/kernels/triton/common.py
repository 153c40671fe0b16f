"""What the Triton kernels share."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor


def interpreted() -> bool:
    """Whether Triton interprets its kernels, which then run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# Whether kernels are compiled for NVIDIA's GPUs: not for AMD's, nor run by Triton's interpreter.
BY_PTX = tl.constexpr(torch.version.hip is None and not interpreted())


def row_strides(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, as a slice of a projection's output is; else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def search_steps(cu_seqlens: Tensor | None) -> int:
    """How often `sequence_of` must halve the sequences of a packed row."""
    return 0 if cu_seqlens is None else max(1, len(cu_seqlens) - 1).bit_length()


@triton.jit
def sequence_of(token, cu_seqlens, sequences, steps):
    """The sequence that each token of a packed row lies in: the first s with cu_seqlens[s+1] > token."""
    low = token * 0
    high = low + sequences - 1
    for _ in range(steps):
        middle = (low + high) // 2
        beyond = tl.load(cu_seqlens + middle + 1) <= token
        low = tl.where(beyond, tl.minimum(middle + 1, high), low)
        high = tl.where(beyond, high, middle)
    return low
