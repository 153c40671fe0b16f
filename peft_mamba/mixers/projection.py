"""The mixers' linear layers. In training, what is kept for backward is the input, once, and nothing of a weight's size.

A module that is a plain `nn.Linear`, or PEFT's plain LoRA on one, runs here as one function,

    y = x Wᵀ + bias + Σ_i s_i · dropout(x) A_iᵀ B_iᵀ

Run as modules under autocast, the same layers keep the half-precision copy of every frozen weight until backward, a
copy of the input in each adapter's dtype, and make four tensors of the output's size on the way. Where no gradient is
wanted the same products are made without autograd, and copies of weights are kept inside `frozen_weights`.

Whatever is not plain (DoRA and the other variants, quantised layers, hooks, parametrisations, another tuner) is called
as the module it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.func import functional_call
from torch.nn.modules import module as _global

from ..frozen import from_weights
from ..kernels.products import scaled
from ..kernels.room import HALF, GradientPlace, Place, set_gradient_place, useful
from .linear import Linear
from .product import Product, Room, is_narrow, sum_of_products
from .recomputation import runs_again

Tensor = torch.Tensor

# Where a layer whose weight is held in half precision (`peft_mamba.precast`) has what says when that will do.
PRECAST = "_precast"
_COMPUTED_IN = {*HALF, torch.float32, torch.float64}

# Of all modules; torch keeps these dictionaries and changes them in place.
GLOBAL_HOOKS = (
    _global._global_forward_hooks,
    _global._global_forward_pre_hooks,
    _global._global_backward_hooks,
    _global._global_backward_pre_hooks,
)


class Plain(NamedTuple):
    """A linear layer whose modules do nothing but what their weights say."""

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)
    A: Tensor | None  # (r, in): lora_A of every active adapter, one below the other; None: there is none
    B: Tensor | None  # (out, r): lora_B, side by side
    scaling: float
    dropout: float  # of the adapters' input, 0 outside of training


def project(
    linear: nn.Module,
    x: Tensor,
    *,
    sizes: Sequence[int] | None = None,
    bias: bool = True,
    product: bool = True,
    through: bool = False,
) -> Any:
    """`linear(x)`, and its gradient, for a layer that may carry adapters.

    Args:
        x: (..., in).
        sizes: features of each part to split the output into. In training each part is contiguous, and its gradient
            comes back without the parts having to be put together; else they are views of one tensor.
        bias: False leaves the layer's own bias out. To subtract it afterwards would be wrong in half precision: by
            then it has rounded the product away.
        product: False where a checkpointed segment runs again for what its backward needs and this is its last layer,
            whose output nothing reads: of a plain layer it is then left out, and the values are arbitrary.
        through: return x as well, for what else reads it: the gradient from there is added where that of x is made,
            instead of by autograd, which reads both again.

    Returns:
        (..., out), or a tuple of parts; with `through` a pair of these and x.

    Raises:
        PrecastError: the weight is held in a precision that is not the one to compute in here.
    """
    known = plain(linear)
    base = getattr(linear, "base_layer", linear)
    if (held := vars(base).get(PRECAST)) is not None:
        held.check(x.device.type)
    for_backward = runs_for_backward(linear)
    if for_backward and isinstance(base, Linear) and base.by_onednn(x):
        known = None  # a faster product, of float32 on a CPU, where nothing is cast
    dtype = None if known is None else _compute_dtype(known, x)
    if known is None or dtype is None:
        y = linear(x) if bias else _without_bias(linear, x)
        y, same = y if sizes is None else y.split(list(sizes), dim=-1), None
    elif not for_backward:
        y = _infer(x.to(dtype), known, known.bias if bias else None, isinstance(base, Linear))
        y, same = y if sizes is None else y.split(list(sizes), dim=-1), None
    else:
        weight, own_bias, A, B, scaling, dropout = known
        # Of an x without a gradient what was handed through would have one.
        handed = through and x.dtype == dtype and x.requires_grad
        free = Room() if held is None else held.free
        place = None if handed or not x.requires_grad else _gradient_place(known, x, dtype, sizes)
        own_bias = own_bias if bias else None
        *parts, same = Product.apply(
            x.to(dtype), weight, own_bias, A, B, scaling, dropout, sizes, product, handed, free, place
        )
        if place is not None:
            for part, each in enumerate(parts):
                set_gradient_place(each, Place(place, part))
        y = parts[0] if sizes is None else tuple(parts)
    return (y, x if same is None else same) if through else y


def runs_for_backward(linear: nn.Module) -> bool:
    """Whether to run as in training: checkpoints first run without gradients, and must then compute the same."""
    return torch.is_grad_enabled() or linear.training or runs_again()


def plain(linear: nn.Module) -> Plain | None:
    """What `linear` computes, if that is all that calling it would do; else None."""
    if torch.compiler.is_compiling():
        return None
    if is_linear(linear):
        return Plain(linear.weight, linear.bias, None, None, 1.0, 0.0) if is_bare(linear) else None
    if type(linear) is not LoraLinear or hooked(linear) or linear.merged or linear.fan_in_fan_out:
        return None
    base = linear.base_layer
    if not is_linear(base) or not is_bare(base):
        return None
    if linear.disable_adapters:
        return Plain(base.weight, base.bias, None, None, 1.0, 0.0)
    names = [name for name in linear.active_adapters if name in linear.lora_A]
    factors: list[tuple[Tensor, Tensor, float]] = []
    rates: set[float] = set()
    for name in names:
        A, B, dropout = linear.lora_A[name], linear.lora_B[name], linear.lora_dropout[name]
        if name in linear.lora_variant or not (is_linear(A) and is_linear(B)) or B.bias is not None:
            return None
        if not (is_bare(A) and is_bare(B)) or type(dropout) not in (nn.Identity, nn.Dropout) or hooked(dropout):
            return None
        factors.append((A.weight, B.weight, linear.scaling[name]))
        rates.add(dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0)
    if not names:
        return Plain(base.weight, base.bias, None, None, 1.0, 0.0)
    if len(names) == 1:
        return Plain(base.weight, base.bias, *factors[0], rates.pop())
    if rates != {0.0} or len({each.dtype for a, b, _ in factors for each in (a, b)}) > 1:
        return None  # each has a dropout of its own
    scales = tuple(s for _, _, s in factors)
    downs = from_weights("downs", lambda *A: torch.cat(A), *(a for a, _, _ in factors))
    ups = from_weights(
        ("ups", scales),
        lambda *B: torch.cat([b * s for b, s in zip(B, scales, strict=True)], dim=1),
        *(b for _, b, _ in factors),
    )
    return Plain(base.weight, base.bias, downs, ups, 1.0, 0.0)


def columns_for(linear: nn.Module, x: Tensor, dtype: torch.dtype | None) -> int:
    """Columns that `linear`'s input, or its weight, gains by in training if they are free behind it: `kernels.room`.

    Args:
        x: of as many features, on the device.
        dtype: to compute in.
    """
    known = plain(linear) if runs_for_backward(linear) else None
    if known is None or known.A is None:
        return 0
    rank, features = known.A.shape
    return rank if useful(rank, features, x.device, dtype) else 0


def room_for(linear: nn.Module, x: Tensor, dtype: torch.dtype) -> Room:
    """What `linear`'s weight gains by in training if it is free behind it."""
    columns, known = columns_for(linear, x, dtype), plain(linear)
    if not columns or known is None or is_narrow(known.weight, known.A):
        return Room()
    return Room(columns, columns if _gradient_place(known, x, dtype, None) is not None else 0)


def _gradient_place(layer: Plain, x: Tensor, dtype: torch.dtype, sizes: Sequence[int] | None) -> GradientPlace | None:
    """For the gradients of its outputs, of these sizes; None where it gains nothing by that."""
    if layer.A is None or layer.dropout:
        return None
    rank, sizes = len(layer.A), [len(layer.weight)] if sizes is None else sizes
    return GradientPlace(sizes, rank) if all(useful(rank, size, x.device, dtype) for size in sizes) else None


def is_adapted(module: nn.Module) -> bool:
    """Whether it is a layer of a tuner of PEFT's, around the one that it adapts."""
    return isinstance(module, BaseTunerLayer)


def draws(linear: nn.Module) -> bool:
    """Whether running `linear` draws random numbers: a dropout that is on, or anything that we do not know."""
    known = plain(linear)
    return known is None or known.dropout > 0


def is_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether it is nn.Linear, of that very class, or what takes its place on a CPU."""
    return type(module) in (nn.Linear, Linear)


def is_bare(linear: nn.Linear) -> bool:
    """No hook, no forward of its own, no parametrisation, weights that are plain tensors."""
    weights = vars(linear)["_parameters"]
    return (
        not hooked(linear)
        and type(weights.get("weight")) is nn.Parameter
        and type(weights.get("bias")) in (nn.Parameter, type(None))
    )


def hooked(module: nn.Module, apart_from: Sequence[Callable] = ()) -> bool:
    """Whether calling the module does more than its class' forward: hooks, its own or for all, or another forward.

    Args:
        apart_from: hooks in front of a forward that do not count.
    """
    own = (module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    before = [hook for hook in module._forward_pre_hooks.values() if hook not in apart_from]
    return any(own) or any(GLOBAL_HOOKS) or bool(before) or "forward" in vars(module)


def _compute_dtype(layer: Plain, x: Tensor) -> torch.dtype | None:
    """The dtype that autocast and PEFT would compute all of it in; None where they would use several."""
    device = x.device.type
    dtypes = {each.dtype for each in (x, layer.weight, layer.bias, layer.A, layer.B) if each is not None}
    if not dtypes <= _COMPUTED_IN:
        return None
    if layer.weight.device != x.device or x.device.type == "meta":
        return None
    if torch.is_autocast_enabled(device) and torch.float64 not in dtypes:
        return torch.get_autocast_dtype(device)
    return x.dtype if len(dtypes) == 1 else None


def _infer(x: Tensor, layer: Plain, bias: Tensor | None, fast: bool) -> Tensor:
    """What the layer computes outside of training, in x's dtype, with this bias in place of its own.

    Args:
        fast: whether larger products on a CPU are for oneDNN.
    """
    product = Linear.product if fast else F.linear
    weight, bias = _cast(layer.weight, x.dtype), None if bias is None else _cast(bias, x.dtype)
    rows = x.reshape(-1, x.shape[-1])  # with a bias, three dimensions would become a product and then a sum
    if layer.A is None or layer.B is None:
        y = product(rows, weight, bias)
    else:
        t = product(rows, _cast(layer.A, x.dtype), None)
        up = _cast(layer.B, x.dtype, layer.scaling)
        if fast:
            y = product(rows, weight, bias).addmm_(t, up.t())
        else:
            y = sum_of_products(rows, weight, bias, t, up)
    return y.view(*x.shape[:-1], y.shape[-1])


def _cast(weight: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    if weight.dtype == dtype and scaling == 1.0:
        return weight
    return from_weights((dtype, scaling), lambda w: scaled(w, scaling, dtype), weight)


def _without_bias(linear: nn.Module, x: Tensor) -> Tensor:
    """The module as it is, with zeros in place of its bias, so that every adapter does what it always does."""
    zeros = {
        name: torch.zeros(parameter.shape, dtype=parameter.dtype, device=x.device)
        for name, parameter in linear.named_parameters()
        if name.rpartition(".")[2] == "bias" and "lora_" not in name
    }
    return functional_call(linear, zeros, (x,), tie_weights=False)
