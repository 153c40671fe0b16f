"""Whole models on the Triton kernels: training on packed and padded rows, and generation, as on PyTorch alone."""

from __future__ import annotations

import pytest
import torch

from peft_mamba import kernels, use_mixers
from peft_mamba.frozen import frozen_weights
from peft_mamba.mixers import PackedSequences, StatePool

from ..peft_mamba.tiny import relative_rms, tiny_model, tokens


@pytest.fixture(params=["mamba", "mamba2"])
def model(request, device):
    model = tiny_model(request.param).to(device)
    use_mixers(model)
    return model


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_training(model, device, rows):
    ids = tokens(2, 19).to(device)
    arguments = {"attention_mask": (torch.arange(19) >= torch.tensor([[0], [4]])).long().to(device)}
    if rows == "packed":
        arguments = {"position_ids": torch.cat([torch.arange(12), torch.arange(7)]).expand(2, -1).to(device)}
    results = {}
    for name in ("torch", "triton"):
        with kernels.use(name):
            output = model(ids, labels=ids, **arguments)
            gradients = torch.autograd.grad(output.loss, list(model.parameters()))
        results[name] = [output.loss, *gradients]
    for ours, exact in zip(results["triton"], results["torch"], strict=True):
        assert relative_rms(ours, exact) < 1e-4


def test_generation(model, device):
    ids = tokens(2, 7).to(device)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    generated = {}
    for name in ("torch", "triton"):
        with kernels.use(name):
            generated[name] = model.generate(
                ids, attention_mask=mask, max_new_tokens=4, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
    assert torch.equal(generated["torch"].sequences, generated["triton"].sequences)
    for pair in zip(generated["torch"].logits, generated["triton"].logits, strict=True):
        assert relative_rms(*pair) < 1e-4


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sequences_with_states_of_their_own(family, device, precision):
    """Without gradients, which is without autograd, with what follows from weights kept from forward to forward."""
    layers = 2 if precision == "fp32" else 1  # the interpreter is slow
    model = tiny_model(family, num_hidden_layers=layers).to(device)
    use_mixers(model)
    row = tokens(1, 24).to(device)
    results = {}
    for name in ("torch", "triton"):
        pool = StatePool(model, 4)
        half = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
        with kernels.use(name), torch.no_grad(), half, frozen_weights():
            steps = [
                PackedSequences.of([11, 6, 7], pool, target=[2, 1, 3]),
                PackedSequences.of([11, 2, 1, 10], pool, [1, 0, 2, 1], [0, 4, 2, 3]),
                PackedSequences.of([4, 20], pool, [2, 4]),
                PackedSequences.of([5, 2, 3, 9, 5], pool, [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [-1, -1, 1, 1, 1]),
            ]
            outputs = [model(row, attention_mask=packed, use_cache=False).logits for packed in steps]
            results[name] = [*outputs, pool.conv(layers - 1), pool.ssm(layers - 1)]
    for ours, exact in zip(results["triton"], results["torch"], strict=True):
        assert relative_rms(ours, exact) < (1e-4 if precision == "fp32" else 3e-2)
