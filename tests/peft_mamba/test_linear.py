"""Linear layers by oneDNN: the same numbers as nn.Linear's, and nn.Linear itself wherever oneDNN is not for them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig

from peft_mamba import kernels, use_mixers
from peft_mamba.mixers import linear
from peft_mamba.mixers.linear import Linear

from .tiny import relative_rms

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this PyTorch has no oneDNN product",
)


@pytest.fixture
def products(monkeypatch):
    """oneDNN for products of every size, as on a processor where it is faster; a list that grows with each of them."""
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(linear, "SMALL_PRODUCT", 1)
    monkeypatch.delenv(kernels.ENVIRONMENT_VARIABLE, raising=False)
    shapes, multiply = [], linear._multiply
    monkeypatch.setattr(linear, "_multiply", lambda x, *rest: (shapes.append(tuple(x.shape)), multiply(x, *rest))[1])
    return shapes


@pytest.mark.parametrize("shape", [(3, 5, 6), (7, 6), (6,), (2, 0, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(products, shape, bias):
    torch.manual_seed(0)
    layer = Linear(6, 4, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    exact = copy.deepcopy(layer).double()
    exact.__class__ = nn.Linear
    results = []
    for module, x_in in ((layer, x), (exact, x.detach().double().requires_grad_())):
        y = module(x_in)
        results.append([y, *torch.autograd.grad((y * y).sum() + y.sum(), [x_in, *module.parameters()])])
    assert products[:1] == ([shape] if x.numel() else [])
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        assert not expected.any() and not actual.any() or relative_rms(actual, expected) < 1e-6


def test_columns_of_a_wider_tensor_and_second_derivatives(products):
    torch.manual_seed(0)
    layer = Linear(6, 4)
    wide = torch.randn(5, 20)
    assert relative_rms(layer(wide[:, 3:9]), nn.functional.linear(wide[:, 3:9], layer.weight, layer.bias)) < 1e-6
    x = torch.randn(5, 6, requires_grad=True)
    found = []
    for y in (layer(x), nn.functional.linear(x, layer.weight, layer.bias)):
        (dx,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad((dx**2).sum(), layer.weight)[0])
    assert relative_rms(*found) < 1e-5


def test_a_frozen_weight_costs_no_product(products):
    layer = Linear(6, 4).requires_grad_(False)
    layer(torch.randn(5, 6, requires_grad=True)).sum().backward()
    assert products == [(5, 6), (5, 4)]


def test_what_oneDNN_is_not_for(products, monkeypatch):
    layer, x = Linear(6, 4), torch.randn(5, 6)
    layer.double()(x.double())
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    monkeypatch.setattr(linear, "SMALL_PRODUCT", 5 * 6 * 4 + 1)
    layer(x)
    monkeypatch.setattr(linear, "SMALL_PRODUCT", 1)
    monkeypatch.setenv(kernels.ENVIRONMENT_VARIABLE, "reference")
    layer(x)
    assert products == []
    monkeypatch.delenv(kernels.ENVIRONMENT_VARIABLE)
    layer(x)
    assert products == [(5, 6)]


def test_use_mixers_brings_it_to_every_plain_layer(products):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(0, 40, (2, 9))
    with torch.inference_mode():
        expected = model(tokens).logits
        use_mixers(model)
        assert relative_rms(model(tokens).logits, expected) < 1e-5
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 9 and {type(module) for module in layers} == {Linear}
    assert len(products) == 9


def test_a_model_stays_as_it_is_where_there_is_nothing_to_gain(monkeypatch):
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: False)
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1))
    use_mixers(model)
    assert not any(isinstance(module, Linear) for module in model.modules())
