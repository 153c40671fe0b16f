"""The norms' Triton kernels against PyTorch in float64: outputs and gradients, gated, in groups, of slices."""

from __future__ import annotations

import pytest
import torch

from peft_mamba.kernels import norm

from ..peft_mamba.tiny import relative_rms

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("shape", "group", "gated", "residual"),
    [
        ((5, 48), 48, False, True),
        ((2, 3, 64), 32, True, False),
        ((17, 130), 130, False, False),
        ((0, 16), 16, True, False),
    ],
)
def test_against_float64(device, shape, group, gated, residual, dtype):
    kernels = pytest.importorskip("peft_mamba.kernels.norm_triton")
    channels = shape[-1]
    x, dy, dr = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    weight = torch.randn(channels, device=device)
    wide = torch.randn(*shape[:-1], 2 * channels, device=device).to(dtype)  # a part of it, as in_proj gives it
    gate, dr = wide[..., channels:] if gated else None, dr if residual else None
    y, rstd = kernels.forward(x, weight, gate, 1e-5, group, dtype)
    mine = [y, *kernels.backward(dy, x, weight, gate, rstd, group, dr, True)]
    exact = [None if each is None else each.double() for each in (x, weight, gate, dy, dr)]
    x, weight, gate, dy, dr = exact
    y, rstd = norm._forward(x, weight, gate, 1e-5, group, torch.float64)
    expected = [y, *norm._backward(dy, x, weight, gate, rstd, group, dr, True)]
    for actual, right in zip(mine, expected, strict=True):
        assert (actual is None) == (right is None)
        if actual is not None and right.any():
            assert relative_rms(actual, right) < TOLERANCE[dtype]
