"""One table of adapters, common checks: what is named trains, shows on every path, and nothing else moves."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_mamba import report
from peft_mamba.kernels import ENVIRONMENT_VARIABLE

from .tiny import ADAPTERS, PRECISIONS, gradients_reach, relative_rms, tiny_model, tokens

each_adapter = pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)


def logits(model, batch=None, **kwargs):
    model.eval()
    with torch.no_grad():
        return model(tokens() if batch is None else batch, **kwargs).logits


@each_adapter
@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_gradients_reach_all_of_it_and_nothing_else(adapter, implementation, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, implementation)
    model = adapter.on(tiny_model(adapter.family))
    gradients_reach(model, tokens(), adapter.kinds)


@each_adapter
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_gradients_under_autocast(adapter, precision):
    model = adapter.on(tiny_model(adapter.family))
    with torch.autocast("cpu", PRECISIONS[precision]):
        gradients_reach(model, tokens(), adapter.kinds)


@each_adapter
def test_every_factor_moves_and_the_rest_stays(adapter):
    """Ten steps from PEFT's own initialisation, where B is zero: A moves from the second step on."""
    model = adapter.on(tiny_model(adapter.family))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(10):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, name
        assert parameter.requires_grad == (
            "lora_" in name or (adapter.name.endswith("-bias") and name.endswith(".bias"))
        )


@each_adapter
def test_the_first_step_moves_b_alone(adapter):
    """PEFT starts at B = 0 (embeddings: A = 0), so the adapter does nothing and A's gradient is zero, not None."""
    base = tiny_model(adapter.family)
    expected = logits(base)
    model = get_peft_model(base, adapter.config())
    assert relative_rms(logits(model), expected) < 1e-6
    model.train()
    model(tokens(), labels=tokens()).loss.backward()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            assert parameter.grad.any(), name
        elif "lora_A" in name or "lora_embedding_B" in name:
            assert parameter.grad is not None and not parameter.grad.any(), name
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()


@each_adapter
def test_it_matters_and_each_part_of_it_matters(adapter):
    """The adapter of any one module changes the outputs: none is bypassed."""
    model = adapter.on(tiny_model(adapter.family))
    whole = logits(model)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
        assert relative_rms(logits(model), whole) > 1e-6, layer
        layer.enable_adapters(True)
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("adapter", [row for row in ADAPTERS if "dropout" not in row.name], ids=lambda row: row.name)
def test_training_and_scoring_are_one_function(adapter):
    model = adapter.on(tiny_model(adapter.family))
    with torch.no_grad():
        train = model.train()(tokens(), labels=tokens())
        scored = model.eval()(tokens(), labels=tokens())
    assert relative_rms(train.loss, scored.loss) < 1e-6
    assert relative_rms(train.logits, scored.logits) < 1e-6


@each_adapter
def test_scoring_and_generation_are_one_function(adapter):
    """Token by token with a cache, the logits of one forward; dt_proj used to vanish here."""
    model = adapter.on(tiny_model(adapter.family)).eval()
    batch, cache, steps = tokens(2, 8), None, []
    with torch.no_grad():
        for token in batch.split(1, dim=1):
            out = model(token, cache_params=cache, use_cache=True)
            cache = out.cache_params
            steps.append(out.logits)
        assert relative_rms(torch.cat(steps, 1), logits(model, batch)) < 1e-5
        generated = model.generate(input_ids=batch, max_new_tokens=5, do_sample=False, attention_mask=batch > 0)
        assert torch.equal(generated[:, 8], logits(model, batch)[:, -1].argmax(-1))


@each_adapter
def test_equals_the_weights_that_it_stands_for(adapter):
    """Merged by hand into transformers' own model, which knows no adapters: W + scaling·B·A, for DoRA rescaled."""
    model = adapter.on(tiny_model(adapter.family))
    plain = tiny_model(adapter.family, tie_word_embeddings=False)
    plain.load_state_dict(
        {
            name.replace(".base_layer", ""): tensor
            for name, tensor in model.get_base_model().state_dict().items()
            if ".lora_" not in name
        }
    )
    for name, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        weight = plain.get_submodule(name).weight
        with torch.no_grad():
            if layer.lora_embedding_A:
                delta = (layer.lora_embedding_B["default"] @ layer.lora_embedding_A["default"]).T
            else:
                delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            merged = weight + layer.scaling["default"] * delta
            if layer.use_dora["default"]:
                # "DoRA: Weight-Decomposed Low-Rank Adaptation" (2402.09353), eq. 5; of an embedding its transpose.
                axis = 0 if layer.lora_embedding_A else 1
                magnitude = layer.lora_magnitude_vector["default"].weight
                merged = merged * (magnitude / merged.norm(dim=axis)).unsqueeze(axis)
            weight.copy_(merged)
    assert relative_rms(logits(model), logits(plain)) < 1e-5


@each_adapter
def test_disabled_is_the_base_model(adapter):
    base = tiny_model(adapter.family)
    expected = logits(copy.deepcopy(base))
    model = adapter.on(base)
    assert relative_rms(logits(model), expected) > 1e-6
    with model.disable_adapter():
        assert relative_rms(logits(model), expected) < 1e-5


@each_adapter
def test_save_and_load(adapter, tmp_path):
    """The file is an ordinary LoRA adapter with explicit modules; loading it gives the same model."""
    model = adapter.on(tiny_model(adapter.family))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and "preset" not in saved
    assert sorted(saved["target_modules"]) == sorted(adapter.kinds)
    loaded = PeftModel.from_pretrained(tiny_model(adapter.family), tmp_path)
    assert torch.equal(logits(loaded), expected)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    resaved = json.loads((again / "adapter_config.json").read_text())
    for config in (saved, resaved):
        config["target_modules"].sort()  # PEFT writes a set in the order in which it comes
    assert resaved == saved | {"inference_mode": True}


@each_adapter
def test_report_names_what_is_there(adapter):
    model = adapter.on(tiny_model(adapter.family))
    rows = {row.kind: row for row in report(model).rows}
    assert set(rows) == set(adapter.kinds)
    for kind, row in rows.items():
        mine = [p for name, p in model.named_parameters() if f".{kind}." in name and "lora_" in name]
        assert row.trainable == sum(p.numel() for p in mine) and row.tensors == len(mine)
        layers = 1 if kind in ("embeddings", "lm_head") or "one-layer" in adapter.name else 2
        assert row.matched == layers
        assert row.gradient == "none"
    model.train()
    model(tokens(), labels=tokens()).loss.backward()
    assert {row.gradient for row in report(model).rows} == {"all"}
