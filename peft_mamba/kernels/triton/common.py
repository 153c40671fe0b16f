"""What the Triton kernels share."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from ..reference import gathered

Tensor = torch.Tensor


def interpreted() -> bool:
    """Whether Triton interprets its kernels, which then run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# Whether kernels are compiled for NVIDIA's GPUs: not for AMD's, nor run by Triton's interpreter.
BY_PTX = tl.constexpr(torch.version.hip is None and not interpreted())


# On the host, where Triton's own take microseconds a call, as long as a small kernel's launch in all.
def cdiv(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n; 1 for 0."""
    return 1 << max(0, n - 1).bit_length()


def row_strides(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, as a slice of a projection's output is; else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def search_steps(cu_seqlens: Tensor | None) -> int:
    """How often `sequence_of` must halve the sequences of a packed row."""
    return 0 if cu_seqlens is None else max(1, cu_seqlens.shape[0] - 1).bit_length()


def readable(
    initial_state: Tensor | None, initial_index: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Initial states, and where each sequence's is among them where a kernel can read it there: else they are copies.

    Kernels read states of a pool in a packed row and without gradients, which are not summed up over sequences.
    """
    if initial_state is not None and initial_index is not None and cu_seqlens is not None:
        as_they_are = initial_state.dtype == torch.float32 and initial_state.is_contiguous()
        if as_they_are and not torch.is_grad_enabled():
            return initial_state, initial_index.to(torch.int64).contiguous()
    return gathered(initial_state, initial_index), None


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
