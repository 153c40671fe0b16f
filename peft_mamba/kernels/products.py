"""Products with so few terms that reading and writing the result takes the time: sums of them in one pass.

On a GPU with Triton, in half precision, each function is one kernel; else PyTorch alone.
"""

from __future__ import annotations

import torch

from . import fused
from .reference import Tensor

HALF = (torch.float16, torch.bfloat16)


def add_products(addend: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """addend + Σ a b over one or two pairs, a new tensor; by the kernel summed in float32 and rounded once.

    torch.addmm would copy the addend first, and then read and write the result once for every pair.

    Args:
        addend: (M, N).
        pairs: (M, K) and (K, N) of the addend's dtype, each with a K of its own.
    """
    kernels = fused.for_tensor("products_triton", addend) if addend.dtype in HALF else None
    if kernels is not None:
        return kernels.add_products(addend, *pairs)
    y = torch.addmm(addend, *pairs[0])
    for a, b in pairs[1:]:
        y.addmm_(a, b)
    return y
