"""The norms' Triton kernels against PyTorch in float64: outputs and gradients, gated, in groups, of slices."""

from __future__ import annotations

import pytest
import torch

from peft_mamba.kernels import norm

from ..peft_mamba.tiny import relative_rms

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Of values that are the same up to the last bit of some of them.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
# The interpreter truncates to bfloat16, where PyTorch rounds.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("shape", "group", "gated", "residual", "adds"),
    [
        ((5, 48), 48, False, True, False),
        ((3, 7, 48), 48, False, True, True),
        ((2, 3, 64), 32, True, False, False),
        ((17, 130), 130, False, False, False),
        ((0, 16), 16, True, False, False),
    ],
)
def test_against_float64(device, shape, group, gated, residual, adds, dtype):
    kernels = pytest.importorskip("peft_mamba.kernels.norm_triton")
    channels = shape[-1]
    x, dy, dr = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    weight = torch.randn(channels, device=device)
    wide = torch.randn(*shape[:-1], 2 * channels, device=device).to(dtype)  # a part of it, as in_proj gives it
    gate, dr = wide[..., channels:] if gated else None, dr if residual else None
    added = wide[..., channels:] if adds else None
    y, rstd, total = kernels.forward(x, added, weight, gate, 1e-5, group, dtype, 0)
    mine = [y, total, *kernels.backward(dy, total, weight, gate, rstd, group, dr, True, dtype if adds else None)]
    exact = [None if each is None else each.double() for each in (x, added, weight, gate, dy, dr)]
    x, added, weight, gate, dy, dr = exact
    y, rstd, total = norm._forward(x, added, weight, gate, 1e-5, group, torch.float64, 0)
    kind = torch.float64 if adds else None
    expected = [y, total, *norm._backward(dy, total, weight, gate, rstd, group, dr, True, kind)]
    for actual, right in zip(mine, expected, strict=True):
        assert (actual is None) == (right is None)
        if actual is not None and right.any():
            assert relative_rms(actual, right) < TOLERANCE[dtype]


@pytest.mark.parametrize("for_weight", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("x_dtype", "added_dtype"),
    [(torch.float32, HALF), (torch.float32, torch.float32), (HALF, HALF)],
)
def test_the_fused_sum_is_the_sum(device, x_dtype, added_dtype, residual, for_weight):
    kernels = pytest.importorskip("peft_mamba.kernels.norm_triton")
    x, dr = (torch.randn(2, 9, 200, device=device).to(x_dtype) for _ in range(2))
    added = torch.randn(2, 9, 400, device=device).to(added_dtype)[..., 200:]
    weight, dy = torch.randn(200, device=device), torch.randn(2, 9, 200, device=device).to(HALF)
    rest = (weight, None, 1e-5, 200, HALF, 0)
    y, rstd, total = kernels.forward(x, added, *rest)
    y_apart, rstd_apart, total_apart = kernels.forward(x + added, None, *rest)
    assert total.dtype == total_apart.dtype and torch.equal(total, total_apart)
    # The compiler picks for each kernel which product of a sum of squares it rounds.
    assert y.dtype == y_apart.dtype and relative_rms(y, y_apart) < ROUNDING[HALF]
    assert relative_rms(rstd, rstd_apart) < ROUNDING[torch.float32]
    rest = (dy, total, weight, None, rstd, 200, dr if residual else None, for_weight)
    dx, d_added, dw, _ = kernels.backward(*rest, added_dtype)
    expected, none, dw_expected, _ = kernels.backward(*rest, None)
    assert none is None and dx.dtype == x_dtype and relative_rms(dx, expected) < ROUNDING[x_dtype]
    assert d_added.dtype == added_dtype and torch.equal(d_added, dx.to(added_dtype))
    assert relative_rms(dw, dw_expected) < ROUNDING[torch.float32] if for_weight else dw is None
