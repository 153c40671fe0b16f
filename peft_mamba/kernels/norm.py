"""RMS normalisation of both families, gated or not, that keeps its input for backward and nothing else of that size.

    x̂ = x / sqrt(mean(x²) + eps), y = w · x̂                      (Mamba and Mamba-2, in front of a mixer)
    x̂ from x · silu(gate), the mean over each group of channels   (Mamba-2, inside the mixer)

Statistics in float32 (float64 for float64 inputs). On a GPU with Triton each direction is one kernel, on other devices
PyTorch alone; PEFT_MAMBA_KERNELS=torch or reference forces the latter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import fused
from .reference import Tensor, accumulator_dtype
from .room import gradient_place, with_room

KERNELS = "norm_triton"


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    gate: Tensor | None = None,
    group_size: int | None = None,
    out_dtype: torch.dtype | None = None,
    columns: int = 0,
) -> Tensor:
    """`weight` times `x` (times silu(gate)) over the root of its mean square; (..., D).

    As transformers does it, the normalised value is rounded to x's dtype before it meets the weight.

    Args:
        weight: (D,).
        gate: (..., D) or None.
        group_size: channels that share a mean; D if None.
        out_dtype: the result is rounded to it; default: what weight and x promote to.
        columns: that the result has free behind each row, see `room`.
    """
    out_dtype = out_dtype or torch.promote_types(weight.dtype, x.dtype)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        kernels = fused.for_tensor(KERNELS, x)
        return _run(kernels, x, None, weight, gate, eps, group_size or x.shape[-1], out_dtype, columns)[0]
    return _RMSNorm.apply(x, None, weight, gate, eps, group_size or x.shape[-1], out_dtype, columns, False)[0]


def rms_norm_residual(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    added: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    columns: int = 0,
) -> tuple[Tensor, Tensor]:
    """(`rms_norm(x)`, x): the second is the residual, whose gradient is added where that of x is made anyway.

    With `added` it is a fused add and norm: x + added takes the place of x, in the dtype that the two promote to. The
    sum is the same bit for bit; what comes of it, and the gradients, differ by no more than a rounding of float32.

    Args:
        weight: (D,).
        added: of x's shape, (..., D).
        out_dtype: of the normalised value; default: what weight and x promote to.
        columns: that it has free behind each row, see `room`.
    """
    if added is not None:
        x = x.to(torch.promote_types(x.dtype, added.dtype))
    out_dtype = out_dtype or torch.promote_types(weight.dtype, x.dtype)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        kernels = fused.for_tensor(KERNELS, x)
        y, _, residual = _run(kernels, x, added, weight, None, eps, x.shape[-1], out_dtype, columns)
        return y, residual
    return _RMSNorm.apply(x, added, weight, None, eps, x.shape[-1], out_dtype, columns, True)


def _run(kernels, *arguments):
    return (_forward if kernels is None else kernels.forward)(*arguments)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, added, weight, gate, eps, group_size, out_dtype, columns, residual):
        ctx.group_size, ctx.kernels = group_size, fused.for_tensor(KERNELS, x)
        y, rstd, x = _run(ctx.kernels, x, added, weight, gate, eps, group_size, out_dtype, columns)
        ctx.save_for_backward(x, weight, gate, rstd)
        ctx.set_materialize_grads(False)
        ctx.added = added.dtype if ctx.needs_input_grad[1] else None
        ctx.places = gradient_place(added), gradient_place(gate)
        return (y, x) if residual else (y, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_residual):  # type: ignore[override]  # mypy sees the decorator, not the method
        if dy is None:
            d_added = None if d_residual is None or ctx.added is None else d_residual.to(ctx.added)
            return d_residual, d_added, *[None] * 7
        x, weight, gate, rstd = ctx.saved_tensors
        for_weight = ctx.needs_input_grad[2]
        given = dy, x, weight, gate, rstd, ctx.group_size, d_residual, for_weight, ctx.added
        gradients = _backward(*given) if ctx.kernels is None else ctx.kernels.backward(*given, *ctx.places)
        return *gradients, *[None] * 5


def _forward(x, added, weight, gate, eps, group_size, out_dtype, columns):
    x = x if added is None else x + added
    h = _gated(x, gate)
    groups = h.unflatten(-1, (-1, group_size))
    rstd = torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + eps)
    normed = (groups * rstd).flatten(-2).to(x.dtype)
    # In place where nothing else reads it: on a CPU fresh memory takes longer than the product.
    fits = normed.dtype == torch.promote_types(weight.dtype, x.dtype) and not torch.is_grad_enabled()
    y = torch.mul(weight, normed, out=normed if fits else None).to(out_dtype)
    return with_room(y.shape, columns, y.dtype, y.device).copy_(y) if columns else y, rstd, x


def _gated(x, gate):
    h = x.to(accumulator_dtype(x))
    return h if gate is None else h * F.silu(gate.to(h.dtype))


def _backward(dy, x, weight, gate, rstd, group_size, d_residual, for_weight, added):
    h = _gated(x, gate)
    dy = dy.to(h.dtype)
    normed = (h.unflatten(-1, (-1, group_size)) * rstd).flatten(-2)
    dw = (dy * normed.to(x.dtype)).flatten(0, -2).sum(0).to(weight.dtype) if for_weight else None
    g, normed = (each.unflatten(-1, (-1, group_size)) for each in (dy * weight.to(h.dtype), normed))
    dh = ((g - normed * (g * normed).mean(-1, keepdim=True)) * rstd).flatten(-2)
    d_gate = None
    if gate is not None:
        z = gate.to(h.dtype)
        sigmoid = torch.sigmoid(z)
        d_gate = (dh * x.to(h.dtype) * sigmoid * (1 + z * (1 - sigmoid))).to(gate.dtype)
        dh = dh * (z * sigmoid)
    if d_residual is not None:
        dh = dh + d_residual.to(h.dtype)
    dx = dh.to(x.dtype)
    return dx, None if added is None else dx.to(added), dw, d_gate
