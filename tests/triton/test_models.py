"""Whole models on the Triton kernels: training on packed and padded rows, and generation, as on PyTorch alone."""

from __future__ import annotations

import pytest
import torch

from peft_mamba import kernels, use_mixers

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
