"""The Triton convolution against the float64 reference, on small shapes."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_mamba import kernels

from .cases import compare, conv_case, run_conv

silu = functools.partial(run_conv, activation="silu")


@pytest.fixture(autouse=True)
def short_strips(device, monkeypatch):
    """Several strips of tokens and of channels for small inputs too."""
    from peft_mamba.kernels.triton import causal_conv1d

    if device == "cpu":
        for name, value in {"TOKENS": 4, "SUMMED_TOKENS": 8, "CHANNELS": 16}.items():
            monkeypatch.setattr(causal_conv1d, name, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["whole", "documents", "packed"])
@pytest.mark.parametrize("width", [2, 4])
def test_outputs_and_gradients(device, dtype, kind, width):
    torch.manual_seed(width)
    compare(silu, "causal_conv1d", *conv_case(kind, 2, 21, 20, width), dtype, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [19, 20])
def test_half_precision_by_ones_and_by_twos(device, dtype, channels):
    torch.manual_seed(channels)
    compare(silu, "causal_conv1d", *conv_case("whole", 2, 21, channels, 4), dtype, device)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["whole", "documents", "packed"]),
    batch=st.integers(1, 3),
    length=st.integers(0, 30),
    channels=st.integers(1, 33),
    width=st.integers(1, 9),
    bias=st.booleans(),
    initial=st.booleans(),
    activation=st.sampled_from(["silu", None]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(device, kind, batch, length, channels, width, bias, initial, activation, seed):
    torch.manual_seed(seed)
    inputs, rows = conv_case(kind, batch, length, channels, width, bias=bias, initial=initial)
    compare(functools.partial(run_conv, activation=activation), "causal_conv1d", inputs, rows, torch.float32, device)


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("x",), ("x", "initial_state"), ("weight", "initial_state")])
def test_what_is_frozen_costs_the_rest_nothing(device, frozen):
    torch.manual_seed(0)
    compare(silu, "causal_conv1d", *conv_case("packed", 1, 21, 20, 4), torch.float32, device, frozen=frozen)


def test_same_inputs_same_bits(device):
    torch.manual_seed(0)
    inputs, _ = conv_case("whole", 2, 21, 20, 4)
    given = {name: tensor.to(device, torch.float32).requires_grad_() for name, tensor in inputs.items()}
    first, second = (
        torch.autograd.grad(silu(kernels.select(device, "triton").causal_conv1d, **given)[0].sum(), given.values())
        for _ in range(2)
    )
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_refuses_what_it_does_not_know(device):
    operation = kernels.select(device, "triton").causal_conv1d
    x, weight = torch.zeros(2, 3, 4, device=device), torch.zeros(4, 2, device=device)
    with pytest.raises(ValueError, match="gelu"):
        operation(x, weight, activation="gelu")
    with pytest.raises(ValueError, match="2 rows"):
        operation(x, weight, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32, device=device))
