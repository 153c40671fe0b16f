"""Products with one side so short, as those of adapters are, that passes over the other take all of the time.

In half precision, on a GPU with Triton, kernels make one pass of several; else PyTorch alone.
"""

from __future__ import annotations

from types import ModuleType

import torch

from . import fused
from .reference import Tensor

HALF = (torch.float16, torch.bfloat16)
# Above it the sums that programs leave to each other cost more than to read the large factor twice.
MAX_RANK = 32
# Elements of the large factor below which a second reading takes less time than it takes to launch these kernels.
MIN_ELEMENTS = 2**23
# From here on Triton has the tensor cores, without which these kernels have neither registers nor shared memory enough.
CAPABILITY = (8, 0)


def _kernels(x: Tensor) -> ModuleType | None:
    """The Triton kernels where they take x; None: PyTorch alone."""
    if x.dtype not in HALF or (x.is_cuda and torch.cuda.get_device_capability(x.device) < CAPABILITY):
        return None
    return fused.for_tensor("products_triton", x)


def add_products(addend: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """addend + Σ a b over one or two pairs, a new tensor; by the kernel summed in float32 and rounded once.

    torch.addmm would copy the addend first, and then read and write the result once for every pair.

    Args:
        addend: (M, N).
        pairs: (M, K) and (K, N) of the addend's dtype, each with a K of its own.
    """
    kernels = _kernels(addend)
    if kernels is not None:
        return kernels.add_products(addend, *pairs)
    y = torch.addmm(addend, *pairs[0])
    for a, b in pairs[1:]:
        y.addmm_(a, b)
    return y


def from_both_sides(
    parts: list[tuple[Tensor, Tensor]], t: Tensor, scaling: float, dtype: torch.dtype, out: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """q = Σ g up over the parts, and d = scaling · gᵀ t of each part below the other, reading every g once.

    Sums in float32 and in a fixed order. None where no kernel does that, or it would not pay: two products
    do it.

    Args:
        parts: g (M, N), up (N, r) for each part.
        t: (M, r), of the dtype of all parts.
        dtype: of d.
        out: where q goes, (M, r) of t's dtype, in rows that may lie apart; None: to memory of its own.

    Returns:
        q (M, r) in t's dtype, d (Σ N, r).
    """
    kernels = _kernels(t)
    if kernels is None or t.shape[1] > MAX_RANK or sum(g.numel() for g, _ in parts) < MIN_ELEMENTS:
        return None
    return kernels.from_both_sides(parts, t, scaling, dtype, out)
