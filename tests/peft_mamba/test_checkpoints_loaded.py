"""Checkpoints in transformers format, of any family, load exactly or not at all; and `describe`."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from peft_mamba.checkpoints import (
    AutoMambaForCausalLM,
    describe,
    load_config,
)

from .original_checkpoints import MAMBA, MAMBA2, message_of, random_checkpoint, save

load = AutoMambaForCausalLM.from_pretrained

TINY = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
ATTENTION = {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
CAUSAL = {
    "mamba": transformers.MambaConfig(**TINY, state_size=4),
    "mamba-untied": transformers.MambaConfig(**TINY, state_size=4, tie_word_embeddings=False),
    "mamba2": transformers.Mamba2Config(**TINY, state_size=8, num_heads=4, head_dim=16, n_groups=2, chunk_size=8),
    "mamba2-tied": transformers.Mamba2Config(
        **TINY, state_size=8, num_heads=4, head_dim=16, chunk_size=8, n_groups=1, tie_word_embeddings=True
    ),
    "pythia": transformers.GPTNeoXConfig(**TINY, **ATTENTION),
    "gpt2": transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4),
    "olmo": transformers.OlmoConfig(**TINY, **ATTENTION, pad_token_id=1, eos_token_id=2),
}


def logits(model: torch.nn.Module, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return ids, model(ids, use_cache=False).logits.double()


def save_transformers(directory: Path, name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CAUSAL[name]).eval()
    model.save_pretrained(directory, **options)
    return model


def edit_weights(directory: Path, edit) -> None:
    file = directory / "model.safetensors"
    weights = read_weights(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in load_file(file).items()}


@pytest.mark.parametrize("name", CAUSAL)
def test_transformers_format(name, tmp_path):
    expected = save_transformers(tmp_path, name)
    model = load(str(tmp_path), revision="main", trust_remote_code=False, gguf_file=None, quantization_config=None)
    assert type(model) is type(expected)
    assert torch.equal(logits(model)[1], logits(expected)[1])
    assert model.config._name_or_path == model.name_or_path == str(tmp_path)
    assert describe(model)["format"] == "transformers"
    assert load_config(str(tmp_path)).model_type == expected.config.model_type


@pytest.mark.parametrize("name", ["mamba", "mamba2", "pythia"])
def test_missing_weights_are_not_drawn(name, tmp_path):
    save_transformers(tmp_path, name)
    removed = [key for key in read_weights(tmp_path / "model.safetensors") if ".0." in key]
    edit_weights(tmp_path, lambda weights: [weights.pop(key) for key in removed])
    message = message_of(load, str(tmp_path))
    assert f"{len(removed)} missing" in message and sorted(removed)[0] in message and str(tmp_path) in message


def test_missing_untied_head(tmp_path):
    save_transformers(tmp_path, "mamba-untied")
    edit_weights(tmp_path, lambda weights: weights.pop("lm_head.weight"))
    assert "1 missing (lm_head.weight)" in message_of(load, str(tmp_path))


@pytest.mark.parametrize("name", ["mamba", "pythia"])
def test_wrong_shape(name, tmp_path):
    model = save_transformers(tmp_path, name)
    key = next(
        key for key, value in model.state_dict().items() if key.endswith("embeddings.weight") or "embed_in" in key
    )
    edit_weights(tmp_path, lambda weights: weights.update({key: torch.zeros(48, 32)}))
    assert f"{key} is (48, 32), expected (50, 32)" in message_of(load, str(tmp_path))


def test_wrong_shape_is_found_before_the_model_is_made(tmp_path, monkeypatch):
    save_transformers(tmp_path, "mamba")
    edit_weights(tmp_path, lambda weights: weights.update({"backbone.norm_f.weight": torch.zeros(31)}))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    assert "backbone.norm_f.weight is (31,), expected (32,)" in message_of(load, str(tmp_path))


def test_unexpected_weights(tmp_path):
    save_transformers(tmp_path, "pythia")
    edit_weights(tmp_path, lambda weights: weights.update({"value_head.weight": torch.zeros(1, 32)}))
    assert "value_head.weight" in message_of(load, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "layer", "buffers"),
    [
        ("pythia", "gpt_neox.layers.0.attention", ["bias", "masked_bias", "rotary_emb.inv_freq"]),
        ("gpt2", "transformer.h.0.attn", ["bias", "masked_bias"]),
    ],
)
def test_buffers_of_older_checkpoints_are_harmless(name, layer, buffers, tmp_path):
    expected = save_transformers(tmp_path, name)
    stored = {f"{layer}.{buffer}": torch.ones(4) for buffer in buffers}
    edit_weights(tmp_path, lambda weights: weights.update(stored))
    assert torch.equal(logits(load(str(tmp_path)))[1], logits(expected)[1])


NOT_CAUSAL = {
    "t5": transformers.T5Config(architectures=["T5ForConditionalGeneration"]),
    "vit": transformers.ViTConfig(architectures=["ViTForImageClassification"]),
    "bert": transformers.BertConfig(architectures=["BertForMaskedLM"]),
    "bart": transformers.BartConfig(architectures=["BartForConditionalGeneration"]),
}


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_what_is_no_causal_lm_is_refused(name, tmp_path):
    NOT_CAUSAL[name].save_pretrained(tmp_path)
    message = message_of(load, str(tmp_path))
    assert name in message and NOT_CAUSAL[name].architectures[0] in message and "causal" in message


@pytest.mark.parametrize(
    ("contents", "names"),
    [
        ('{"model_type": "mamba9"}', ["mamba9", transformers.__version__]),
        ('{"model_type": "mamba9", "auto_map": {"AutoConfig": "c.C"}}', ["mamba9", "trust_remote_code=True"]),
        ('{"hidden_size": 32}', ["model_type", "d_model"]),
        ('{"model_type": "mamba", "hidden_size": "wide"}', ["hidden_size", "wide"]),
        ('{"model_type": ', ["config.json", "JSON"]),
        ("[1]", ["config.json", "list"]),
    ],
)
def test_config_that_cannot_be_used(contents, names, tmp_path):
    (tmp_path / "config.json").write_text(contents)
    message = message_of(load_config, str(tmp_path))
    for expected in [str(tmp_path), *names]:
        assert expected in message


def test_describe(tmp_path):
    path = save(tmp_path, MAMBA2, random_checkpoint(MAMBA2))
    model = load(path, revision="main")
    parameters = sum(p.numel() for p in model.parameters())
    expected = {"class": "Mamba2ForCausalLM", "family": "mamba2", "format": "state-spaces", "source": path}
    expected |= {"revision": None, "commit": None, "parameters": parameters}
    assert describe(model) == expected
    assert describe(peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj"]))) == expected
    json.dumps(expected)


def test_describe_a_model_from_elsewhere():
    model = transformers.AutoModelForCausalLM.from_config(CAUSAL["mamba"])
    described = describe(model)
    assert (described["class"], described["family"], described["format"]) == (
        "MambaForCausalLM",
        "mamba",
        None,
    )
    assert described["parameters"] == model.num_parameters()


def test_describe_names_the_commit_of_a_hub_snapshot(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    (tmp_path / "snapshots").mkdir()
    model = load(save(tmp_path / "snapshots" / commit, MAMBA, random_checkpoint(MAMBA)))
    assert describe(model)["commit"] == commit
