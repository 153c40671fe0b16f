"""Kernels that write a gradient to where a layer wants it: the same bits as elsewhere, and nothing beside them."""

from __future__ import annotations

import pytest
import torch

from peft_mamba.kernels import norm, room

from ..peft_mamba.tiny import relative_rms
from .scan_cases import Case, draw

ROWS, SIZE, BESIDE = 10, 48, 16
UNWRITTEN = 77.0


class Poisoned(room.GradientPlace):
    """Memory that is not written to can be told."""

    def take(self, *args):
        new = self._whole is None
        memory = super().take(*args)
        if new:
            self._whole.fill_(UNWRITTEN)
        return memory


@pytest.fixture
def places():
    return [Poisoned([BESIDE, SIZE], 32) for _ in range(2)]


def gradients(run, inputs, named, places):
    """Of every input that wants one, with those that `named` names in places or, without any, not."""
    inputs = {
        name: None if each is None else each.detach().clone().requires_grad_(each.requires_grad)
        for name, each in inputs.items()
    }
    for name, place in zip(named, places, strict=False):
        room.set_gradient_place(inputs[name], room.Place(place, 1))
    y = run(**inputs)
    torch.manual_seed(3)
    dy = torch.randn(y.shape, device=y.device).to(y.dtype)
    wanted = [name for name, each in inputs.items() if each is not None and each.requires_grad]
    return dict(zip(wanted, torch.autograd.grad(y, [inputs[name] for name in wanted], dy), strict=True))


def compare(run, inputs, named, places):
    """With places and without."""
    expected = gradients(run, inputs, named, [])
    for name, gradient in gradients(run, inputs, named, places).items():
        assert torch.equal(gradient, expected[name]), name
    for name, place in zip(named, places, strict=False):
        whole = place._whole
        assert torch.equal(whole[:, BESIDE : BESIDE + SIZE].view(expected[name].shape), expected[name])
        assert (whole[:, :BESIDE] == UNWRITTEN).all() and (whole[:, BESIDE + SIZE :] == UNWRITTEN).all()


@pytest.mark.parametrize("trains", [False, True])
def test_the_convolution(device, trains, places):
    triton = pytest.importorskip("peft_mamba.kernels.triton.causal_conv1d")
    inputs = {
        "x": torch.randn(2, 5, SIZE, device=device).half().requires_grad_(),
        "weight": torch.randn(SIZE, 4, device=device).requires_grad_(trains),
        "bias": torch.randn(SIZE, device=device).requires_grad_(trains),
    }
    compare(lambda x, weight, bias: triton.causal_conv1d(x, weight, bias, activation="silu"), inputs, ["x"], places)


@pytest.mark.parametrize("rows", ["plain", "packed"])
def test_the_scan(device, rows, places):
    triton = pytest.importorskip("peft_mamba.kernels.triton.selective_scan")
    tensors, more = draw(Case(batch=2, length=5, channels=SIZE, states=4, dtype=torch.float16, rows=rows), device)
    inputs = {name: each.to(device).requires_grad_() for name, each in tensors.items() if each is not None}
    inputs = {name: each for name, each in inputs.items() if name != "initial_state"}
    more = {name: each.to(device) for name, each in more.items()}
    compare(lambda **inputs: triton.selective_scan(**inputs, **more)[0], inputs, ["u", "z"], places)


@pytest.mark.parametrize("gated", [False, True])
def test_the_norms(device, gated, places, monkeypatch):
    kernels = pytest.importorskip("peft_mamba.kernels.norm_triton")
    monkeypatch.setattr(norm.fused, "for_tensor", lambda *_: kernels)
    weight = torch.randn(SIZE, device=device)
    x = torch.randn(2, 5, SIZE, device=device, dtype=torch.float32).requires_grad_()
    other = torch.randn(2, 5, SIZE, device=device).half().requires_grad_()
    if gated:
        compare(lambda x, gate: norm.rms_norm(x, weight, 1e-5, gate=gate), {"x": x, "gate": other}, ["gate"], places)
    else:

        def run(x, added):
            return sum(norm.rms_norm_residual(x, weight, 1e-5, added=added))

        compare(run, {"x": x, "added": other}, ["added"], places)


def test_both_products_of_a_gradient(device):
    kernels = pytest.importorskip("peft_mamba.kernels.products_triton")
    g, up, t = (torch.randn(*shape, device=device).half() for shape in ((130, 70), (70, 12), (130, 12)))
    whole = torch.full((130, 20), UNWRITTEN, device=device).half()
    expected, d = kernels.from_both_sides([(g, up)], t, 0.5, torch.float32)
    q, same = kernels.from_both_sides([(g, up)], t, 0.5, torch.float32, whole[:, 5:17])
    assert torch.equal(q, expected) and torch.equal(d, same) and q.data_ptr() == whole[:, 5:].data_ptr()
    assert relative_rms(q, g.double() @ up.double()) < 2**-11
    assert (whole[:, :5] == UNWRITTEN).all() and (whole[:, 17:] == UNWRITTEN).all()
