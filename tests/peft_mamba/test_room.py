"""An adapter's product as a part of its layer's, in room behind rows, against the two of them one after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peft_mamba.kernels import room
from peft_mamba.mixers import product, projection
from peft_mamba.mixers.projection import columns_for, project
from peft_mamba.mixers.recomputation import LEVELS, recompute
from peft_mamba.precast import precast_frozen_weights

from .test_precast import assert_same_bits, train, trained
from .test_projection import IN, LAYERS, OUT, OfShape, adapted
from .tiny import relative_rms


@pytest.fixture(autouse=True)
def also_on_a_cpu(monkeypatch):
    monkeypatch.setattr(projection, "useful", lambda *_: True)
    monkeypatch.setattr(product, "FEW_OUTPUTS", 0)


def with_room(x: torch.Tensor, columns: int) -> torch.Tensor:
    copied = room.with_room(x.shape, columns, x.dtype, x.device)
    copied.copy_(x)
    return copied


def run(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor, columns: int, sizes=None):
    """Output and gradients, for an input that is made within autograd, as a norm makes it."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()

    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return with_room(x, columns)

        @staticmethod
        def backward(ctx, dx):
            return dx

    y = project(layer, Made.apply(x), sizes=sizes)
    y = y if sizes is None else torch.cat(y, dim=-1)
    y.backward(dy.to(y.dtype))
    return y, {"x": x.grad} | {name: each.grad for name, each in layer.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("sizes", [None, (16, 16, 8)], ids=["whole", "parts"])
@pytest.mark.parametrize("kind", ["lora", "lora, bias trains", "two adapters"])
def test_equals_the_two_products(kind, sizes):
    torch.manual_seed(0)
    layer, x, dy = LAYERS[kind]().double(), torch.randn(2, 5, IN).double(), torch.randn(2, 5, OUT).double()
    columns = columns_for(layer, x, x.dtype)
    assert columns == (7 if kind == "two adapters" else 4)
    y, gradients = run(layer, x, dy, columns, sizes)
    expected, of_two = run(layer, x, dy, 0, sizes)
    assert relative_rms(y, expected) < 1e-14
    for name in of_two:
        assert relative_rms(gradients[name], of_two[name]) < 1e-14, name


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(0, 3), length=st.integers(0, 4), r=st.integers(1, 9))
def test_any_shape(batch, length, r):
    torch.manual_seed(0)
    layer = adapted().double()
    layer.lora_A["default"].weight = nn.Parameter(torch.randn(r, IN).double())
    layer.lora_B["default"].weight = nn.Parameter(torch.randn(OUT, r).double())
    x, dy = torch.randn(batch, length, IN).double(), torch.randn(batch, length, OUT).double()
    y, gradients = run(layer, x, dy, r)
    expected, of_two = run(layer, x, dy, 0)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients, of_two)


def test_the_large_product_is_the_only_one_of_its_size(monkeypatch):
    """As this is what the room is for: nothing else reads or writes an output."""
    layer, x = adapted(bias=False), torch.randn(10, IN)
    with OfShape(10, OUT) as made:
        project(layer, with_room(x, 4))
    assert made.names == ["mm"]


def test_dropout_drops_for_the_adapter_alone():
    layer, x, dy = adapted(lora_dropout=0.5), torch.randn(40, IN), torch.randn(40, OUT)
    torch.manual_seed(1)
    y, gradients = run(layer, x, dy, 4)
    torch.manual_seed(1)
    expected, of_two = run(layer, x, dy, 0)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients, of_two)


def test_another_forward_before_the_backward_takes_nothing_from_the_first():
    layer, dy = adapted(), torch.randn(6, OUT)
    x, other = torch.randn(6, IN), torch.randn(6, IN)
    _, alone = run(layer, x, dy, 4)
    y = project(layer, with_room(x, 4))
    layer.lora_B["default"].weight.data.add_(0.0)
    project(layer, with_room(other, 4))
    y.backward(dy)
    assert torch.equal(layer.lora_A["default"].weight.grad, alone["lora_A.default.weight"])


def test_a_tensor_of_the_same_memory_has_no_room():
    """A slice of something wider is not followed by what is free."""
    x = with_room(torch.randn(3, IN), 4)
    assert room.with_columns(x, 4) is not None
    for other in (x[:2], x.view_as(x), x + 0, x.detach(), x.clone()):
        assert room.with_columns(other, 4) is None
    assert room.with_columns(x, 3) is None


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_model_trains_the_same_bits_at_every_level_and_with_weights_held_in_half(family, level, monkeypatch):
    """Memory of an input that is made again is not what its room's is kept in."""
    widths = []

    def seen(x, columns):
        found = room.with_columns(x, columns)
        widths.append(found is not None)
        return found

    monkeypatch.setattr(product, "with_columns", seen)
    models = [trained(family, "sll") for _ in range(3)]
    recompute(models[0], "none")
    for model in models[1:]:
        recompute(model, level)
    expected = train(models[0], torch.bfloat16)
    assert any(widths), "no input had room"
    assert_same_bits(train(models[1], torch.bfloat16), expected)
    with precast_frozen_weights(models[2], "bf16"):
        assert {each.stride(0) - each.shape[1] for each in of_in_proj(models[2])} != {0}, "no weight has room"
        assert_same_bits(train(models[2], torch.bfloat16), expected)


def of_in_proj(model):
    return [each for name, each in model.named_parameters() if name.endswith("in_proj.base_layer.weight")]


def test_a_weight_that_was_moved_has_no_room_left():
    """What is behind it in its new place may be anything."""
    model, other = trained("mamba", "sll"), trained("mamba", "sll")
    with precast_frozen_weights(model, "bf16"):
        for weight in of_in_proj(model):
            weight.data = weight.data.contiguous()
        assert_same_bits(train(model, torch.bfloat16), train(other, torch.bfloat16))
