"""What `report` says, and the error that a training run gets when an adapter cannot learn."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from peft import get_peft_model
from transformers.models.mamba import modeling_mamba

from peft_mamba import GradientError, MambaLoraConfig, report, use_mixers

from .tiny import tiny_model, tokens


def adapted(family="mamba", **options):
    model = get_peft_model(tiny_model(family), MambaLoraConfig(**{"preset": "sll", "r": 2} | options))
    return model.train()


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def backward(model):
    model(tokens(), labels=tokens()).loss.backward()


def test_table_and_dictionary():
    model = adapted(rank_pattern={"layers.0.mixer.in_proj": 5})
    backward(model)
    found = report(model)
    lines = str(found).splitlines()
    assert lines[0].split() == ["module", "matched", "rank", "trainable", "gradient"]
    assert lines[1].split() == ["embeddings", "1", "2", "192", "all"]
    assert lines[2].split() == ["in_proj", "2", "2/5", "1,120", "all"]
    assert f"trainable: {found.trainable:,} of {found.parameters:,}" in lines[-2]
    operations = "selective_scan: torch; ssd: torch; causal_conv1d: torch"
    assert lines[-1] == f"mixers: 2; kernels: torch; reason: the fastest here for cpu; {operations}; recompute: mixer"
    values = json.loads(json.dumps(found.as_dict()))
    assert values["adapters"][1]["ranks"] == [2, 5] and values["adapters"][0]["gradient"] == "all"
    assert values["kernels"]["kernels"] == "torch" and values["mixers"] == 2
    assert values["recompute"] == "mixer"
    assert values["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_model_without_adapters():
    model = tiny_model("mamba2")
    assert "transformers' own, past any adapter" in str(report(model)) and report(model).rows == ()
    use_mixers(model)
    assert report(model).kernels["kernels"] == "torch"
    assert report(tiny_model("gpt_neox")).mixers == 0


def test_frozen_adapters_say_so():
    model = adapted()
    model.requires_grad_(False)
    assert {row.gradient for row in report(model).rows} == {"frozen"}


def test_no_gradient_in_the_first_step_is_an_error_that_names_it():
    """Here the fault is transformers' own mixer, put back in: on its way, dt_proj is read past its adapter."""
    model = adapted(preset="all")
    for layer in model.get_base_model().backbone.layers:
        layer.mixer.__class__ = modeling_mamba.MambaMixer
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = optimizer_of(model)
    backward(model)
    assert {row.kind: row.gradient for row in report(model).rows}["dt_proj"] == "none"
    with pytest.raises(GradientError, match=r"4 of 16 .*layers\.0\.mixer\.dt_proj\.lora_A\.default\.weight"):
        optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_sound_model_is_checked_once():
    model = adapted()
    optimizer = optimizer_of(model)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # nothing has a gradient; the first step has passed


def test_only_the_optimizer_that_has_the_adapters_counts():
    model = adapted()
    other = torch.nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters()).step()
    with pytest.raises(GradientError, match="14 of 14"):
        optimizer_of(model).step()


def test_models_under_watch_are_not_kept_alive():
    model = adapted()
    reference = weakref.ref(model.get_base_model())
    del model
    gc.collect()
    assert reference() is None


def test_an_adapter_loaded_for_inference_is_not_watched(tmp_path):
    from peft import PeftModel

    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model("mamba"), tmp_path)
    model.requires_grad_(True)
    torch.optim.SGD(model.parameters()).step()
