"""The norms against transformers' own modules and float64: outputs, gradients, and that the input alone is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.mamba.modeling_mamba import MambaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import Mamba2RMSNorm, MambaRMSNormGated

from peft_mamba.kernels.norm import rms_norm, rms_norm_residual
from peft_mamba.mixers.block import PARTS
from peft_mamba.mixers.recomputation import kept_for_backward

from .tiny import relative_rms

KINDS = {
    "mamba": lambda: MambaRMSNorm(24, eps=1e-5),
    "mamba2": lambda: Mamba2RMSNorm(24, eps=1e-6),
    "gated": lambda: MambaRMSNormGated(24, group_size=24, eps=1e-5),
    "gated, groups": lambda: MambaRMSNormGated(24, group_size=8, eps=1e-5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers_and_its_gradient_in_float64(kind, dtype):
    theirs = KINDS[kind]()
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(24))
    ours = copy.deepcopy(theirs)
    ours.__class__ = PARTS[type(theirs)]
    inputs = [torch.randn(2, 5, 24).to(dtype) for _ in range(2 if "gated" in kind else 1)]
    assert torch.equal(ours(*inputs), theirs(*inputs)) and ours(*inputs).dtype == theirs(*inputs).dtype
    dy = torch.randn(2, 5, 24)

    def gradients(module, inputs):
        inputs = [each.clone().requires_grad_() for each in inputs]
        y = formula(module, *inputs) if module.weight.dtype == torch.float64 else module(*inputs)
        return torch.autograd.grad(y, [*inputs, module.weight], dy.to(y.dtype))

    expected = gradients(copy.deepcopy(theirs).double(), [each.double() for each in inputs])
    for mine, wanted in zip(gradients(ours, inputs), expected, strict=True):
        assert relative_rms(mine, wanted) < (1e-6 if dtype == torch.float32 else 1e-2)


def formula(module, x, gate=None):
    x = x if gate is None else x * torch.nn.functional.silu(gate)
    groups = x.unflatten(-1, (-1, getattr(module, "group_size", x.shape[-1])))
    return module.weight * (groups / (groups.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()).flatten(
        -2
    )


def test_the_residuals_gradient_is_added():
    x, weight = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.randn(8, dtype=torch.float64)
    dy, dr = torch.randn(3, 8).double(), torch.randn(3, 8).double()
    y, residual = rms_norm_residual(x, weight, 1e-5)
    assert torch.equal(residual, x) and torch.equal(y, rms_norm(x, weight, 1e-5))
    (both,) = torch.autograd.grad([y, residual], x, [dy, dr])
    (alone,) = torch.autograd.grad(rms_norm(x, weight, 1e-5), x, dy)
    assert relative_rms(both, alone + dr) < 1e-14
    (through,) = torch.autograd.grad(rms_norm_residual(x, weight, 1e-5)[1], x, dr)
    assert torch.equal(through, dr)


@pytest.mark.parametrize("for_weight", [False, True])
@pytest.mark.parametrize("wanted", ["both", "x", "added"])
@pytest.mark.parametrize(
    ("x_dtype", "added_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_the_fused_sum_is_the_sum_bit_for_bit(x_dtype, added_dtype, wanted, for_weight):
    inputs = [torch.randn(4, 6, 24).to(x_dtype), torch.randn(4, 6, 24).to(added_dtype), torch.randn(24)]
    gradients = (wanted != "added", wanted != "x", for_weight)

    def run(normalise, *used):
        x, added, weight = (a.clone().requires_grad_(b) for a, b in zip(inputs, gradients, strict=True))
        outputs = normalise(x, added, weight)
        torch.manual_seed(1)
        along = [torch.randn_like(outputs[i]) for i in used]
        leaves = [each for each in (x, added, weight) if each.requires_grad]
        return [*outputs, *torch.autograd.grad([outputs[i] for i in used], leaves, along, allow_unused=True)]

    def fused(x, added, weight):
        return rms_norm_residual(x, weight, 1e-5, added=added, out_dtype=torch.bfloat16)

    def apart(x, added, weight):
        return rms_norm_residual(x + added, weight, 1e-5, out_dtype=torch.bfloat16)

    for used in ((0, 1), (0,), (1,)):
        for mine, theirs in zip(run(fused, *used), run(apart, *used), strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))
    with torch.no_grad():
        assert all(map(torch.equal, fused(*inputs), apart(*inputs)))
    x, added, weight = inputs
    y, residual = rms_norm_residual(x, weight.bfloat16(), 1e-5, added=added)
    assert y.dtype == residual.dtype == torch.promote_types(x_dtype, added_dtype)


def test_the_fused_sum_keeps_the_sum_alone():
    x, added = torch.randn(50, 64, requires_grad=True), torch.randn(50, 64, requires_grad=True)
    weight = torch.randn(64)
    kept = kept_for_backward(lambda: rms_norm_residual(x, weight, 1e-5, added=added), [weight])
    assert kept == 4 * (x.numel() + len(x))


@pytest.mark.parametrize("gated", [False, True])
def test_gradcheck(gated):
    x, weight, gate = (torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True) for _ in range(3))
    inputs = (x, weight[0, 0].detach().requires_grad_(), *((gate,) if gated else ()))
    assert torch.autograd.gradcheck(
        lambda x, weight, gate=None: rms_norm(x, weight, 1e-3, gate=gate, group_size=4), inputs
    )


def test_keeps_its_input_and_rounds_where_asked():
    x, weight = torch.randn(50, 64, requires_grad=True), torch.randn(64)
    assert rms_norm(x, weight, 1e-5, out_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(rms_norm(x, weight, 1e-5, out_dtype=torch.bfloat16), rms_norm(x, weight, 1e-5).bfloat16())
    assert kept_for_backward(lambda: rms_norm(x, weight, 1e-5), [weight]) == 4 * (x.numel() + len(x))
