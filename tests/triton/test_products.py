"""The kernels of thin products against PyTorch in float64: sizes that fill no tile, rows that lie apart, one or two."""

from __future__ import annotations

import pytest
import torch

from peft_mamba.kernels import fused, products
from peft_mamba.mixers import product
from peft_mamba.mixers.projection import project

from ..peft_mamba.test_projection import IN, OUT, adapted, run
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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [(130, (300, 40), 8), (1, (1,), 1), (600, (48,), 17), (64, (256, 256, 1), 32)],
)
def test_both_products_of_a_gradient(device, rows, columns, rank, dtype, monkeypatch):
    kernels = pytest.importorskip("peft_mamba.kernels.products_triton")
    monkeypatch.setattr(kernels, "ROWS_PER_PROGRAM", 128)
    wide = torch.randn(rows, sum(columns) + 3, device=device).to(dtype)[:, 3:]
    ups, t = (torch.randn(n, rank, device=device).to(dtype) for n in (sum(columns), rows))
    parts = list(zip(wide.split(columns, dim=1), ups.split(columns), strict=True))
    q, d = kernels.from_both_sides(parts, t, 0.5, torch.float32)
    assert q.dtype == dtype and d.dtype == torch.float32
    assert relative_rms(q, wide.double() @ ups.double()) < TOLERANCE[dtype]
    assert relative_rms(d, 0.5 * wide.double().t() @ t.double()) < 1e-5
    again = kernels.from_both_sides(parts, t, 0.5, torch.float32)
    assert all(map(torch.equal, again, (q, d)))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(8, 200, 130), (1, 1, 1), (3, 50, 7), (16, 1024, 64)])
@pytest.mark.parametrize("room", [True, False])
def test_an_adapter_is_cast_by_one_kernel(device, monkeypatch, rank, inputs, outputs, dtype, room):
    kernels = pytest.importorskip("peft_mamba.kernels.products_triton")
    A, B = torch.randn(rank, inputs, device=device), torch.randn(outputs, rank, device=device)
    wide = torch.full((outputs + 1, 5 + rank + 2), 7.0, dtype=dtype, device=device)
    both = torch.full((3 + rank, inputs), 7.0, dtype=dtype, device=device)
    places = {"down": both[2 : 2 + rank], "behind": wide[:outputs, 5 : 5 + rank]} if room else {}
    monkeypatch.setattr(fused, "for_tensor", lambda name, x: kernels)
    down, up = products.cast_adapter(A, B, 0.3, dtype, **places)
    monkeypatch.setattr(fused, "for_tensor", lambda name, x: None)
    a, b = products.cast_adapter(A, B, 0.3, dtype)
    assert down.dtype == up.dtype == dtype and up.is_contiguous()
    assert relative_rms(down, A) < TOLERANCE[dtype] and relative_rms(up, 0.3 * B) < TOLERANCE[dtype]
    if device == "cuda":  # the interpreter cuts bfloat16 off
        assert torch.equal(down, a) and torch.equal(up, b)
    if room:
        assert down.data_ptr() == places["down"].data_ptr() and torch.equal(places["behind"], up)
        for place in places.values():
            place.fill_(7.0)
        assert (wide == 7.0).all() and (both == 7.0).all()


@pytest.fixture
def calls(device, monkeypatch):
    """Names of the kernels' functions that were called, on a CPU as on a GPU."""
    kernels = pytest.importorskip("peft_mamba.kernels.products_triton")
    called = []

    def counted(name, function):
        return lambda *args: called.append(name) or function(*args)

    for name in ("add_products", "from_both_sides"):
        monkeypatch.setattr(kernels, name, counted(name, getattr(kernels, name)))
    monkeypatch.setattr(fused, "for_tensor", lambda name, x: fused.kernels(name))
    monkeypatch.setattr(products, "MIN_ELEMENTS", 6 * OUT)
    return called


@pytest.mark.parametrize("sizes", [None, (16, 16, 8)], ids=["whole", "parts"])
@pytest.mark.parametrize("options", [{}, {"adapters": 2}, {"base": torch.nn.Linear(IN, OUT, bias=False)}])
@pytest.mark.parametrize("half", TOLERANCE)
def test_the_gradients_of_an_adapter(device, calls, half, options, sizes, monkeypatch):
    made, mm = [], product._mm
    monkeypatch.setattr(product, "_mm", lambda *args: made.append(args) or mm(*args))
    layer = adapted(**options).to(device)
    x, dy = torch.randn(2, 70, IN, device=device), torch.randn(2, 70, OUT, device=device)
    _, expected = run(layer.double(), x.double(), dy.double(), ours=False)
    with torch.autocast(device, half):
        _, gradients = run(layer.float(), x, dy, ours=True, sizes=sizes)
    assert calls == ["from_both_sides"] and len(made) == 1  # of the other factor of the adapter
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative_rms(gradient, expected[name]) < 1e-2 and gradient.dtype == torch.float32, name


@pytest.mark.parametrize(
    "kind",
    ["a part that nothing uses", "no adapter", "a rank above the largest", "float32", "B is frozen", "too few rows"],
)
def test_two_products_where_one_kernel_is_not_for_it(device, calls, kind):
    layer = adapted().to(device) if kind != "no adapter" else torch.nn.Linear(IN, OUT, device=device)
    if kind == "a rank above the largest":
        layer.lora_A["default"] = torch.nn.Linear(IN, 33, bias=False, device=device)
        layer.lora_B["default"] = torch.nn.Linear(33, OUT, bias=False, device=device)
    if kind == "B is frozen":
        layer.lora_B.requires_grad_(False)
    x = torch.randn(6 - (kind == "too few rows"), IN, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16, enabled=kind != "float32"):
        first, last = project(layer, x, sizes=(16, 24))
        loss = last.float().square().sum()
        (loss if kind == "a part that nothing uses" else loss + first.float().sum()).backward()
    assert not calls and x.grad.isfinite().all() and x.grad.any()
