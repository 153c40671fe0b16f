"""Presets and MambaLoraConfig: the table, what it refuses, and what reaches disk."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_mamba import MambaLoraConfig, PresetError, preset_modules
from peft_mamba.presets import MODULES, PRESETS

from .tiny import ALL, NOT_W, SLL, W, tiny_model

PYTHIA = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize("preset, expected", [("all", ALL), ("sll", SLL), ("w", W), ("not-w", NOT_W)])
def test_mamba_presets(family, preset, expected):
    assert preset_modules(tiny_model(family), preset) == sorted(expected[family])


def test_pythia_presets():
    pythia = tiny_model("gpt_neox")
    assert preset_modules(pythia, "all") == sorted(PYTHIA)
    assert preset_modules(pythia, "sll") == sorted((*PYTHIA, "embed_in"))


@pytest.mark.parametrize("family", MODULES)
def test_all_is_every_linear_layer_of_the_model_but_its_head(family):
    """The table against the modules themselves, so that a layer added upstream is missed here first."""
    model = tiny_model(family)
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }
    assert set(preset_modules(model, "all")) == linear
    if "w" in MODULES[family]:
        w, others = (set(preset_modules(model, preset)) for preset in ("w", "not-w"))
        assert w | others == linear and not w & others
    for preset in MODULES[family]:
        names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        assert set(preset_modules(model, preset)) <= names


def test_other_families_have_all_with_full_names():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2)
    modules = preset_modules(LlamaForCausalLM(config), "all")
    assert len(modules) == 7 and "model.layers.0.mlp.down_proj" in modules
    model = get_peft_model(LlamaForCausalLM(config), MambaLoraConfig(preset="all"))
    assert sorted(model.base_model.targeted_module_names) == modules
    with pytest.raises(PresetError, match="llama has no preset 'sll'.*mamba, mamba2, gpt_neox"):
        get_peft_model(LlamaForCausalLM(config), MambaLoraConfig(preset="sll"))


def test_a_preset_that_the_family_lacks_is_refused():
    with pytest.raises(PresetError, match="gpt_neox has no preset 'w'; it has all, sll"):
        get_peft_model(tiny_model("gpt_neox"), MambaLoraConfig(preset="w"))


def test_there_is_no_other_preset():
    with pytest.raises(PresetError, match="no preset 'ssl'; there are all, sll, w, not-w"):
        MambaLoraConfig(preset="ssl")
    assert set(PRESETS) == {preset for presets in MODULES.values() for preset in presets}


def test_one_way_of_naming_targets():
    with pytest.raises(ValueError, match="preset='sll'.*target_modules="):
        MambaLoraConfig(preset="sll", target_modules=["in_proj"])
    with pytest.raises(ValueError, match="preset .*or target_modules"):
        MambaLoraConfig(r=8)
    assert MambaLoraConfig(target_modules=["in_proj"]).target_modules == {"in_proj"}


def test_it_is_a_lora_config():
    config = MambaLoraConfig(preset="sll", r=4, use_rslora=True)
    assert isinstance(config, LoraConfig) and config.peft_type == "LORA" and config.task_type == "CAUSAL_LM"
    assert MambaLoraConfig(preset="sll", task_type="FEATURE_EXTRACTION").task_type == "FEATURE_EXTRACTION"


def test_what_is_saved_is_a_plain_lora_config(tmp_path):
    config = MambaLoraConfig(preset="sll", r=4, lora_alpha=3, rank_pattern={"in_proj": 2}, use_dora=True)
    with pytest.raises(ValueError, match="preset='sll' becomes target modules on a model"):
        config.save_pretrained(tmp_path)
    model = get_peft_model(tiny_model("mamba"), config)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    explicit = LoraConfig(
        r=4,
        lora_alpha=3,
        rank_pattern={"in_proj": 2},
        use_dora=True,
        target_modules=list(SLL["mamba"]),
        task_type="CAUSAL_LM",
    )
    get_peft_model(tiny_model("mamba"), explicit).save_pretrained(tmp_path / "explicit")
    expected = json.loads((tmp_path / "explicit" / "adapter_config.json").read_text())
    for attributes in (saved, expected):
        attributes["target_modules"].sort()
    assert saved == expected
    MambaLoraConfig(target_modules=["in_proj"]).save_pretrained(tmp_path / "alone")
    assert type(PeftConfig.from_pretrained(tmp_path / "alone")) is LoraConfig
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is LoraConfig and loaded.target_modules == set(SLL["mamba"])


def test_one_config_serves_several_models():
    config = MambaLoraConfig(preset="all", r=2)
    assert len(get_peft_model(tiny_model("mamba"), config).base_model.targeted_module_names) == 8
    assert len(get_peft_model(tiny_model("mamba2"), replace(config, r=1)).base_model.targeted_module_names) == 4
    assert config.preset == "all" and config.target_modules is None


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_w_has_the_parameters_that_follow_from_one_shared_left_factor(family):
    """A LoRA U V on W = [W_Δ; W_B; W_C] adapts all three, row i of each by U_i V, with one V of r rows for the three.

    So it has r·(in + Δ + B + C) parameters a layer; adapters on three separate matrices would have 2·r·in more.
    """
    rank = 3
    model = get_peft_model(tiny_model(family), MambaLoraConfig(preset="w", r=rank, lora_alpha=5))
    mixer = model.get_base_model().backbone.layers[0].mixer
    if family == "mamba":
        inputs, rows = mixer.intermediate_size, {"Δ": mixer.time_step_rank, "B": mixer.ssm_state_size}
        rows["C"], layer = rows["B"], mixer.x_proj
        outputs = sum(rows.values())
        first = 0
    else:
        inputs, layer = mixer.hidden_size, mixer.in_proj
        group = mixer.n_groups * mixer.ssm_state_size
        outputs = 2 * mixer.intermediate_size + 2 * group + mixer.num_heads
        first, rows = 2 * mixer.intermediate_size, {"B": group, "C": group, "Δ": mixer.num_heads}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 2 * rank * (inputs + outputs)

    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    delta = layer.get_delta_weight("default").double()
    shared = layer.lora_A["default"].weight.double()  # V: every row of the adaptation is a combination of its rows
    for name, count in rows.items():
        block = delta[first : first + count]
        coefficients = 5 / rank * layer.lora_B["default"].weight.double()[first : first + count]
        torch.testing.assert_close(block, coefficients @ shared, rtol=1e-5, atol=1e-7, msg=name)
        first += count
    assert torch.linalg.matrix_rank(delta, rtol=1e-5) == rank  # of all three stacked: no block brings rows of its own
