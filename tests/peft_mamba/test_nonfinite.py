"""The first place with a NaN or infinity is found, whether a weight holds it or a layer computes it."""

import pytest
import torch
from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from peft_mamba.nonfinite import first_nonfinite
from peft_mamba.precision import Precision

TOKENS = torch.tensor([[1, 2, 3, 4]])


def mamba() -> nn.Module:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, state_size=4, num_hidden_layers=3)).eval()


def mamba2() -> nn.Module:
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=16,
        hidden_size=8,
        state_size=4,
        num_hidden_layers=3,
        num_heads=4,
        head_dim=4,
        n_groups=1,
        chunk_size=4,
    )
    return Mamba2ForCausalLM(config).eval()


@pytest.mark.parametrize("build", [mamba, mamba2])
def test_finite_model_has_none(build):
    model = build()
    assert first_nonfinite(model, lambda: model(TOKENS)) is None


@pytest.mark.parametrize("build", [mamba, mamba2])
def test_parameter_is_named(build):
    model = build()
    with torch.no_grad():
        model.backbone.layers[1].mixer.in_proj.weight[0, 0] = float("nan")
    where = first_nonfinite(model, lambda: model(TOKENS))
    assert where == "parameter backbone.layers.1.mixer.in_proj.weight holds nan"


@pytest.mark.parametrize("build", [mamba, mamba2])
def test_fp16_overflow_names_the_layer_and_dtype(build):
    model = build()
    with torch.no_grad():  # finite weights, products beyond 65504
        model.backbone.layers[1].mixer.in_proj.weight.mul_(3e5)
    precision = Precision.parse("fp16")
    with precision.scope(torch.device("cpu")):
        where = first_nonfinite(model, lambda: model(TOKENS))
    assert where == "backbone.layers.1.mixer.in_proj (Linear) computed inf in float16"


def test_hooks_are_removed():
    model = mamba()
    first_nonfinite(model, lambda: model(TOKENS))
    assert not any(module._forward_hooks for module in model.modules())
