"""A saved adapter takes effect as a whole or is refused by name."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from peft_mamba.adapter_io import AdapterError, SavedAdapter

TOKENS = torch.arange(1, 13)[None]


def base(tiny) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny["mamba"])


def save(model, directory, **config):
    """Save an adapter whose effect is not zero; returns the adapted model."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **config)).eval()
    adapted.save_pretrained(directory)
    return adapted


@pytest.fixture
def saved(tiny, tmp_path):
    save(base(tiny), tmp_path, target_modules=["in_proj", "x_proj"])
    return tmp_path


@pytest.mark.parametrize("targets", [["in_proj", "x_proj"], ["embeddings", "in_proj"]])
def test_all_of_it_takes_effect(tiny, tmp_path, targets):
    expected = save(base(tiny), tmp_path, target_modules=targets)(TOKENS).logits
    adapted = SavedAdapter.read(str(tmp_path)).apply(base(tiny))
    assert torch.equal(adapted(TOKENS).logits, expected)
    assert not torch.allclose(base(tiny)(TOKENS).logits, expected)
    assert not adapted.training


def test_embeddings_resized_for_added_tokens_come_with_it(tiny, tmp_path):
    model = base(tiny)
    model.resize_token_embeddings(280)
    expected = save(model, tmp_path, target_modules=["in_proj", "embeddings"])(TOKENS).logits
    assert torch.equal(SavedAdapter.read(str(tmp_path)).apply(base(tiny))(TOKENS).logits, expected)


def test_nothing_there(tmp_path):
    with pytest.raises(AdapterError, match=f"peft={tmp_path} is no PEFT adapter.*adapter_config.json"):
        SavedAdapter.read(str(tmp_path))


def test_adapter_of_a_deeper_model_is_refused(tiny, saved):
    weights = load_file(saved / "adapter_model.safetensors")
    deeper = {
        name.replace("layers.1.", "layers.7."): weight.clone()
        for name, weight in weights.items()
        if "layers.1." in name
    }
    save_file(weights | deeper, saved / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"no layer: .*layers.7.* and 3 more. It was made for .*; the model here is"):
        SavedAdapter.read(str(saved)).apply(base(tiny))


def test_adapter_without_weights_for_a_target_is_refused(tiny, saved):
    weights = load_file(saved / "adapter_model.safetensors")
    partial = {name: weight for name, weight in weights.items() if "layers.0" in name}
    save_file(partial, saved / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"lacks weights of layers that it targets: .*layers.1"):
        SavedAdapter.read(str(saved)).apply(base(tiny))


def test_adapter_of_another_width_or_family_is_refused(tiny, saved, tmp_path_factory):
    config = transformers.MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(AdapterError, match="does not fit the model: .*shape"):
        SavedAdapter.read(str(saved)).apply(transformers.MambaForCausalLM(config))
    pythia = transformers.AutoModelForCausalLM.from_pretrained(tiny["gpt_neox"])
    with pytest.raises(AdapterError, match="does not fit the model: Target modules"):
        SavedAdapter.read(str(saved)).apply(pythia)


def test_the_base_model_it_was_made_for_is_named(tiny, saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "owner/some-mamba"}))
    pythia = transformers.AutoModelForCausalLM.from_pretrained(tiny["gpt_neox"])
    with pytest.raises(AdapterError, match="It was made for owner/some-mamba; the model here is .*gpt_neox"):
        SavedAdapter.read(str(saved)).apply(pythia)


def test_truncated_weights_are_refused_before_the_base_model_is_needed(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AdapterError, match="is no PEFT adapter that can be read"):
        SavedAdapter.read(str(saved))


def test_old_pickled_adapters_load(tiny, saved):
    weights = load_file(saved / "adapter_model.safetensors")
    expected = SavedAdapter.read(str(saved)).apply(base(tiny))(TOKENS).logits
    torch.save(weights, saved / "adapter_model.bin")
    shutil.move(saved / "adapter_model.safetensors", saved / "elsewhere")
    assert torch.equal(SavedAdapter.read(str(saved)).apply(base(tiny))(TOKENS).logits, expected)
