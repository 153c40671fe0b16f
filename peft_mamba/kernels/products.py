"""Products with one side so short, as those of adapters are, that passes over the other take all of the time.

In half precision, on a GPU with Triton, kernels make one pass of several; else PyTorch alone.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch.torch_version import TorchVersion

from . import fused
from .reference import Tensor

HALF = (torch.float16, torch.bfloat16)
# Above it the sums that programs leave to each other cost more than to read the large factor twice.
MAX_RANK = 32
# Elements of the large factor below which a second reading takes less time than it takes to launch these kernels.
MIN_ELEMENTS = 2**23
# torch.mm(…, out_dtype=torch.float32), on CUDA alone
_MM_OUT_DTYPE = TorchVersion(torch.__version__) >= TorchVersion("2.8")
# From here on Triton has the tensor cores, without which these kernels have neither registers nor shared memory enough.
CAPABILITY = (8, 0)


def _kernels(x: Tensor) -> ModuleType | None:
    """The Triton kernels where they take x; None: PyTorch alone."""
    if x.dtype not in HALF or (x.is_cuda and torch.cuda.get_device_capability(x.device) < CAPABILITY):
        return None
    return fused.for_tensor("products_triton", x)


def mm_in_float32(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, in float32 where it is in half precision on a GPU and torch can do that, else rounded to that before.

    Args:
        out: where it goes, in float32, or in float64 as the factors; None: to memory of its own.
    """
    if _MM_OUT_DTYPE and a.is_cuda and a.dtype in HALF and a.numel():
        if out is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    product = a @ b
    if out is not None:
        return out.copy_(product)
    return product.to(torch.promote_types(a.dtype, torch.float32))


def scaled(weight: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """scaling · weight in `dtype`, in one operation: a step launches thousands."""
    if scaling == 1.0:
        return weight.to(dtype)
    return torch.mul(weight, scaling, out=torch.empty_like(weight, dtype=dtype))


def cast_adapter(
    A: Tensor,
    B: Tensor,
    scaling: float,
    dtype: torch.dtype,
    *,
    down: Tensor | None = None,
    behind: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """An adapter's A, (r, in), and scaling · B, (out, r), in `dtype`; by one kernel where both are float32 on a GPU.

    Args:
        down: where A goes, contiguous; None: to memory of its own, or nowhere if it is in `dtype`.
        behind: (out, r), in rows that may lie apart, where scaling · B goes as well.
    """
    plain = A.dtype == B.dtype == torch.float32 and A.is_contiguous() and B.is_contiguous()
    kernels = fused.for_tensor("products_triton", A) if plain and dtype in HALF else None
    if kernels is not None:
        return kernels.cast_adapter(A, B, scaling, dtype, down, behind)
    up = scaled(B, scaling, dtype)
    if behind is not None:
        behind.copy_(up)
    return A.to(dtype) if down is None else down.copy_(A), up


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
