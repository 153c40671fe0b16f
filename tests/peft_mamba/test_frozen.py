"""What follows from weights alone is computed once while they stay as they are, and anew as soon as they do not."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from peft_mamba import use_mixers
from peft_mamba.frozen import from_weights, frozen_weights

from .tiny import ADAPTERS, tiny_model, tokens


@pytest.fixture
def double():
    """Twice a weight, and how often that was computed."""
    made = []

    def compute(weight):
        made.append(weight)
        return weight * 2

    return lambda weight: from_weights("double", compute, weight), made


CHANGES = {
    "in place": lambda w: w.add_(1),
    "through a view": lambda w: w[:2].zero_(),
    "other data": lambda w: setattr(w, "data", w.data + 1),
    "an optimizer": lambda w: (setattr(w, "grad", torch.ones_like(w)), torch.optim.SGD([w], 0.1).step()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_changed_is_seen(double, change):
    value, made = double
    weight = nn.Parameter(torch.randn(4))
    with torch.no_grad(), frozen_weights():
        first = value(weight)
        assert value(weight) is first and len(made) == 1
        CHANGES[change](weight)
        assert torch.equal(value(weight), weight * 2) and value(weight) is not first
        assert value(weight) is value(weight) and len(made) == 2


def test_what_follows_from_a_value_goes_with_it(double):
    value, made = double
    weight = nn.Parameter(torch.randn(4))

    def negative():
        return from_weights("negative", torch.neg, value(weight))

    with torch.no_grad(), frozen_weights():
        first = weakref.ref(negative())
        assert negative() is first() and len(made) == 1
        weight.add_(1)
        assert torch.equal(negative(), -2 * weight)
        assert first() is None  # not held until the context ends


def test_nothing_outlives_the_context_and_nothing_is_kept_without_one(double):
    value, made = double
    weight = nn.Parameter(torch.randn(4))
    with torch.no_grad():
        value(weight), value(weight)
        assert len(made) == 2
        with frozen_weights():
            kept = weakref.ref(value(weight))
            assert kept() is not None
            with frozen_weights():
                assert value(weight) is not kept()
            assert value(weight) is kept()
        assert kept() is None


def test_no_more_is_kept_than_may_be(double):
    value, made = double
    weights = [nn.Parameter(torch.randn(4)) for _ in range(3)]
    with torch.no_grad(), frozen_weights(most_bytes=2 * 16 + 15):
        for _ in range(2):
            for weight in weights:
                assert torch.equal(value(weight), 2 * weight)
        assert len(made) == 4  # the third one twice
        weights[0].add_(1)  # what followed from it before makes room
        for _ in range(2):
            for weight in weights:
                value(weight)
        assert len(made) == 7


def test_where_a_gradient_is_wanted_it_is_computed(double):
    value, made = double
    weight = nn.Parameter(torch.randn(4))
    with frozen_weights():
        with torch.no_grad():
            value(weight)
        value(weight).sum().backward()
        assert len(made) == 2 and torch.equal(weight.grad, torch.full((4,), 2.0))


def test_of_what_is_no_weight_nothing_is_kept(double):
    """An activation may be gone, and its id another's, or be written to with no counter to tell."""
    value, made = double
    with torch.no_grad(), frozen_weights():
        activation = torch.randn(4)
        value(activation), value(activation)
    with torch.inference_mode(), frozen_weights():
        weight = nn.Parameter(torch.randn(4))
        first = value(weight)
        weight.add_(1)
        assert not torch.equal(value(weight), first)
    assert len(made) == 4


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_model_gives_the_same_bits_and_follows_its_weights(family, precision, grad_mode, lora):
    model = tiny_model(family)
    model = next(adapter for adapter in ADAPTERS if adapter.family == family).on(model) if lora else model
    use_mixers(model)
    row = tokens(2, 9)

    def forward():
        with grad_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return model(row).logits

    before = forward()
    with frozen_weights():
        assert torch.equal(forward(), before) and torch.equal(forward(), before)
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.add_(0.05 * torch.randn_like(parameter))
            inside = forward()
            with frozen_weights():
                assert torch.equal(inside, forward()), name
    assert not torch.equal(before, forward())
