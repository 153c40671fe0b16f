"""Linear layers on a CPU, whose float32 products PyTorch gives to MKL, also where another library is faster.

MKL keeps AVX-512 to Intel's processors. On an AMD one oneDNN, which PyTorch brings along for convolutions, multiplies
float32 at more than twice the rate (benchmarks/RESULTS.md). Its product is an operator that torch.compile uses too, but
without a public name; where it is missing, or on other processors, a layer does what nn.Linear does.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .. import kernels

Tensor = torch.Tensor

# Multiplications below which the 10 µs that an oneDNN call takes to begin outweigh its rate.
SMALL_PRODUCT = 2**20


@functools.cache
def onednn_is_faster() -> bool:
    """Whether float32 products here belong to oneDNN: PyTorch has both libraries, and the processor is not Intel's."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False  # not Linux: not measured
    vendors = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}
    return vendors == {"AuthenticAMD"} and torch.backends.cpu.get_cpu_capability() == "AVX512"


def use_fast_linears(model: nn.Module) -> int:
    """Let every nn.Linear in `model`, of that very class, be a `Linear`, where that can gain anything; how many are."""
    if not onednn_is_faster():
        return 0
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return sum(isinstance(module, Linear) for module in model.modules())


class Linear(nn.Linear):
    """nn.Linear with its larger float32 products on a CPU by oneDNN, forward and backward, and all others as ever."""

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.weight, self.bias)

    def by_onednn(self, input: Tensor) -> bool:
        """Whether the product with this input is one for oneDNN."""
        return _by_onednn(input, self.weight)

    @staticmethod
    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x weightᵀ + bias by the faster library."""
        if not _by_onednn(x, weight):
            return F.linear(x, weight, bias)
        return _Product.apply(x, weight, bias) if torch.is_grad_enabled() else _multiply(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    # The exact types: a DTensor or another wrapper of tensors is not for an operator that it does not know.
    return (
        type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= SMALL_PRODUCT
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and kernels.select("cpu").name == "torch"
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """x Wᵀ + b for x (..., I) and W (O, I), in float32. No gradient is computed that is not wanted."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dW = db = None
        dy_rows = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[0]:
            dx = _Product.apply(dy, weight.t(), None)
        if ctx.needs_input_grad[1]:
            dW = _Product.apply(dy_rows.t(), x.reshape(-1, x.shape[-1]).t(), None)
        if ctx.needs_input_grad[2]:
            db = dy_rows.sum(0)
        return dx, dW, db
