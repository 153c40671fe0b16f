"""What a precision's name means, in words and in the dtypes that a model really computes in."""

import json

import pytest
import torch

from peft_mamba.precision import Precision, PrecisionError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("spelling", "name", "autocast", "loss_scaling"),
    [
        (None, "fp32", None, False),
        ("fp32", "fp32", None, False),
        ("float32", "fp32", None, False),
        ("float", "fp32", None, False),
        (torch.float32, "fp32", None, False),
        ("FP16", "fp16", torch.float16, True),
        ("half", "fp16", torch.float16, True),
        ("torch.float16", "fp16", torch.float16, True),
        ("bf16", "bf16", torch.bfloat16, False),
        (torch.bfloat16, "bf16", torch.bfloat16, False),
    ],
)
def test_spellings(spelling, name, autocast, loss_scaling):
    precision = Precision.parse(spelling)
    assert (precision.name, precision.autocast, precision.loss_scaling) == (name, autocast, loss_scaling)
    assert precision.weights is precision.softmax is torch.float32
    assert precision.reasons.keys() == {"weights", "autocast", "softmax", "loss_scaling"}


@pytest.mark.parametrize("spelling", ["auto", "fp8", "int8", "", 16, torch.float64])
def test_unknown_spelling_is_named_with_the_choices(spelling):
    with pytest.raises(PrecisionError, match="is not a precision. Choose one of fp32 .* fp16 .* bf16") as error:
        Precision.parse(spelling)
    assert f"dtype={spelling}" in str(error.value)


def test_cast_weights_are_another_precision():
    precision = Precision.parse(weights_dtype="bfloat16")
    assert (precision.name, precision.weights, precision.autocast) == ("bf16-weights", torch.bfloat16, None)
    assert Precision.parse("bf16", "bfloat16") == precision
    assert Precision.parse(weights_dtype="fp32").name == "fp32"
    with pytest.raises(PrecisionError, match="dtype=fp16 .* weights_dtype=bf16"):
        Precision.parse("fp16", "bf16")


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_scope_computes_products_in_that_dtype_and_keeps_weights(name):
    precision = Precision.parse(name)
    linear = torch.nn.Linear(4, 4)
    with precision.scope(CPU):
        assert linear(torch.ones(2, 4)).dtype is (precision.autocast or torch.float32)
    assert linear.weight.dtype is torch.float32
    assert linear(torch.ones(2, 4)).dtype is torch.float32


def test_device_without_autocast_is_refused():
    with pytest.raises(PrecisionError, match="no autocast on meta"):
        Precision.parse("bf16").check_device(torch.device("meta"))
    Precision.parse("fp32").check_device(torch.device("meta"))


def test_record_is_json_and_says_why():
    record = json.loads(json.dumps(Precision.parse("fp16").as_dict()))
    assert record["autocast"] == "torch.float16"
    assert "dtype=fp16" in record["reasons"]["autocast"]
    assert "fp16: weights float32 (" in str(Precision.parse("fp16"))
