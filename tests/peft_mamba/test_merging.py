"""Merged weights give the adapter's logits, tied embeddings included, and reload in plain transformers."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from .tiny import ADAPTERS, randomise_adapters, relative_rms, tiny_model, tokens

each_adapter = pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)

RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
batch = torch.load(sys.argv[1])
for directory in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        torch.save((model(batch).logits, model.config.tie_word_embeddings), directory + ".pt")
assert "peft_mamba" not in sys.modules
"""


def logits(model):
    with torch.no_grad():
        return model.eval()(tokens()).logits


def ends_share_a_matrix(model):
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@each_adapter
@pytest.mark.parametrize("safe", [False, True])
def test_merged_equals_adapted_and_reloads(adapter, safe, tmp_path):
    model = adapter.on(tiny_model(adapter.family))
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT's about ties, which do not hold here
        merged = model.merge_and_unload(safe_merge=safe)
    assert relative_rms(logits(merged), expected) < 1e-5
    untied = bool({"embeddings", "lm_head"} & set(adapter.kinds))
    assert merged.config.tie_word_embeddings == (not untied) and ends_share_a_matrix(merged) == (not untied)
    merged.tie_weights(recompute_mapping=False)  # as transformers itself calls it: by the record of ties
    assert relative_rms(logits(merged), expected) < 1e-5
    merged.save_pretrained(tmp_path)
    reloaded = type(merged).from_pretrained(tmp_path)
    assert relative_rms(logits(reloaded), expected) < 1e-5
    assert ends_share_a_matrix(reloaded) == (not untied)


def test_reloads_where_this_package_is_not(tmp_path):
    torch.save(tokens(), tmp_path / "tokens.pt")
    merged = {
        str(tmp_path / row.name): row.on(tiny_model(row.family)).merge_and_unload()
        for row in ADAPTERS
        if row.name in ("mamba-sll", "mamba2-sll", "mamba-all")
    }
    for directory, model in merged.items():
        model.save_pretrained(directory)
    arguments = [sys.executable, "-c", RELOAD, str(tmp_path / "tokens.pt"), *merged]
    subprocess.run(arguments, check=True, capture_output=True)
    for directory, model in merged.items():
        reloaded, tied = torch.load(f"{directory}.pt")
        assert relative_rms(reloaded, logits(model)) < 1e-5
        assert tied == model.config.tie_word_embeddings == directory.endswith("all")


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize("targets", [["embeddings"], ["lm_head"], ["embeddings", "lm_head", "in_proj"]])
def test_merging_and_unmerging_in_place(family, targets):
    model = get_peft_model(tiny_model(family), LoraConfig(target_modules=targets, r=2))
    randomise_adapters(model)
    expected = logits(model)
    model.merge_adapter()
    assert relative_rms(logits(model), expected) < 1e-5
    model.unmerge_adapter()
    assert relative_rms(logits(model), expected) < 1e-5


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_tied_adapters_merge_once_into_each_end(family):
    """PEFT's ensure_weight_tying puts one adapter, and its transpose, on both ends."""
    config = LoraConfig(target_modules=["lm_head"], r=2, ensure_weight_tying=True)
    model = get_peft_model(tiny_model(family), config)
    randomise_adapters(model)
    assert sorted(model.base_model.targeted_module_names) == ["backbone.embeddings", "lm_head"]
    expected = logits(model)
    assert relative_rms(logits(model.merge_and_unload()), expected) < 1e-5


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_unloading_gives_the_base_model_back(family):
    base = tiny_model(family)
    expected, names = logits(base), list(base.state_dict())
    model = get_peft_model(base, LoraConfig(target_modules=["embeddings", "out_proj"], r=2))
    randomise_adapters(model)
    unloaded = model.unload()
    assert relative_rms(logits(unloaded), expected) < 1e-6
    assert list(unloaded.state_dict()) == names and unloaded.config.tie_word_embeddings
    assert ends_share_a_matrix(unloaded)


def test_a_merged_model_can_be_adapted_again():
    adapter = next(row for row in ADAPTERS if row.name == "mamba-sll")
    merged = adapter.on(tiny_model("mamba")).merge_and_unload()
    expected = logits(merged)
    again = adapter.on(merged)
    assert relative_rms(logits(again), expected) > 1e-3
    assert relative_rms(logits(again.unload()), expected) < 1e-6
