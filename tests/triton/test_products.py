"""The kernels of thin products against PyTorch in float64: sizes that fill no tile, rows that lie apart, one or two."""

from __future__ import annotations

import pytest
import torch

from ..peft_mamba.tiny import relative_rms

# The most that one rounding is off by; the interpreter cuts bfloat16 off.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "columns", "terms"),
    [(130, 200, (70, 8)), (1, 128, (16,)), (257, 48, (3, 130)), (0, 16, (4, 4)), (5, 1, (64, 1))],
)
def test_sum_of_products_is_rounded_once(device, rows, columns, terms, dtype):
    kernels = pytest.importorskip("peft_mamba.kernels.products_triton")
    # Parts of wider tensors, as the parts of a split are.
    addend, *left = (torch.randn(rows, 2 * n + 1, device=device).to(dtype)[:, n + 1 :] for n in (columns, *terms))
    right = [torch.randn(n, columns, device=device).to(dtype) for n in terms]
    before = addend.clone()
    y = kernels.add_products(addend, *zip(left, right, strict=True))
    assert torch.equal(addend, before) and y.dtype == dtype and y.is_contiguous()
    expected = addend.double() + sum(a.double() @ b.double() for a, b in zip(left, right, strict=True))
    assert y.shape == expected.shape
    assert relative_rms(y, expected) < TOLERANCE[dtype] or not rows


def test_factors_that_are_transposed(device):
    kernels = pytest.importorskip("peft_mamba.kernels.products_triton")
    addend, a, b = (torch.randn(n, m, device=device).bfloat16().t() for n, m in ((20, 33), (5, 33), (20, 5)))
    y = kernels.add_products(addend, (a, b))
    assert relative_rms(y, addend.double() + a.double() @ b.double()) < TOLERANCE[torch.bfloat16]
