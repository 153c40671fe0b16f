"""The original state-spaces format: converted models against an independent float64 computation.

Also what of that format is refused, by name. Everything is made here from small random weights: no network.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_mamba.checkpoints import (
    AutoMambaForCausalLM,
    load_config,
    original,
)

from .original_checkpoints import MAMBA, MAMBA2, mamba, mamba2, message_of, random_checkpoint, save
from .original_reference import reference_logits

load = AutoMambaForCausalLM.from_pretrained

ORIGINALS = {  # name: (config, length of the input)
    "mamba": (MAMBA, 19),
    "mamba-one-layer-one-token": ({**MAMBA, "n_layer": 1}, 1),
    "mamba-null-ssm_cfg": ({**MAMBA, "ssm_cfg": None}, 5),
    "mamba-named": (mamba(layer="Mamba1", use_fast_path=False), 5),
    "mamba-untied": ({**MAMBA, "tie_embeddings": False}, 11),
    "mamba-unpadded": ({**MAMBA, "vocab_size": 56}, 11),
    "mamba-padded-to-16": ({**MAMBA, "pad_vocab_size_multiple": 16}, 11),
    "mamba-odd-dt_rank": (mamba(dt_rank=3), 11),
    "mamba-width-not-of-16": ({**MAMBA, "d_model": 40}, 11),
    "mamba-biases": (mamba(bias=True, conv_bias=False), 11),
    "mamba-sizes": (
        mamba(d_state=5, d_conv=3, expand=3, dt_rank="auto", dt_min=0.01, dt_init="constant"),
        11,
    ),
    "mamba-epsilon": ({**MAMBA, "norm_epsilon": 1e-3}, 11),
    "mamba2": (MAMBA2, 19),
    "mamba2-defaults": ({**MAMBA2, "ssm_cfg": {"layer": "Mamba2"}}, 11),
    "mamba2-untied": ({**MAMBA2, "tie_embeddings": False}, 8),
    "mamba2-one-token": (MAMBA2, 1),
    "mamba2-biases": (mamba2(bias=True, conv_bias=False), 11),
    "mamba2-dt_limit": (mamba2(dt_limit=[0.3, 0.6]), 11),
    "mamba2-groups": (mamba2(ngroups=2), 11),
    "mamba2-sizes": (mamba2(d_state=5, d_conv=2, expand=3, headdim=8, chunk_size=4), 11),
    "mamba2-stated": (mamba2(d_ssm=64, rmsnorm=True, D_has_hdim=False, norm_before_gate=False), 11),
}


def logits(model: torch.nn.Module, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return ids, model(ids, use_cache=False).logits.double()


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative RMS error; NaN anywhere fails the comparison that follows."""
    assert found.shape == expected.shape
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("name", ORIGINALS)
def test_converted_model_computes_the_original(name, kind, tmp_path):
    config, length = ORIGINALS[name]
    weights = random_checkpoint(config)
    model = load(save(tmp_path, config, weights, kind))
    ids, found = logits(model, length)
    assert error_of(found, reference_logits(config, weights, ids)) < 1e-5
    assert found.shape[-1] == model.config.vocab_size == weights["backbone.embedding.weight"].shape[0]
    assert model.config.layer_norm_epsilon == config.get("norm_epsilon", 1e-5)
    tied = model.lm_head.weight.data_ptr() == model.backbone.embeddings.weight.data_ptr()
    assert tied == config.get("tie_embeddings", True)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(["mamba", "mamba2"]),
    layers=st.integers(1, 3),
    width=st.sampled_from([16, 24, 48]),
    d_state=st.integers(1, 9),
    d_conv=st.integers(2, 4),
    vocab=st.integers(50, 70),
    length=st.integers(1, 20),
    seed=st.integers(0, 999),
)
def test_any_shape_converts(tmp_path_factory, family, layers, width, d_state, d_conv, vocab, length, seed):
    ssm = {"d_state": d_state, "d_conv": d_conv}
    if family == "mamba2":
        ssm |= {"layer": "Mamba2", "headdim": 8, "chunk_size": 4, "ngroups": 2 if width == 16 else 1}
    config = {**MAMBA, "d_model": width, "n_layer": layers, "vocab_size": vocab, "ssm_cfg": ssm}
    weights = random_checkpoint(config, seed)
    model = load(save(tmp_path_factory.mktemp("checkpoint"), config, weights))
    ids, found = logits(model, length)
    assert error_of(found, reference_logits(config, weights, ids)) < 1e-5


@pytest.mark.parametrize("config", [MAMBA, MAMBA2], ids=["mamba", "mamba2"])
def test_half_precision_file_is_computed_in_float32(config, tmp_path):
    weights = random_checkpoint(config, dtype=torch.float16)
    path = save(tmp_path, config, weights)
    ids, found = logits(load(path))
    assert error_of(found, reference_logits(config, weights, ids)) < 1e-5
    assert load(path, dtype="auto").dtype == torch.float16
    assert load(path, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["sharded-bin", "sharded-safetensors"])
def test_shards(kind, tmp_path):
    weights = random_checkpoint(MAMBA)
    path = save(tmp_path, MAMBA, weights, kind)
    ids, found = logits(load(path))
    assert error_of(found, reference_logits(MAMBA, weights, ids)) < 1e-5
    shard = next(tmp_path.glob("*-00002-of-*"))
    shard.unlink()
    assert shard.name in message_of(load, path)


def test_file_of_an_early_torch(tmp_path):
    weights = random_checkpoint(MAMBA)
    path = save(tmp_path, MAMBA, weights)
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    ids, found = logits(load(path))
    assert error_of(found, reference_logits(MAMBA, weights, ids)) < 1e-5


def test_tied_head_may_be_left_out(tmp_path):
    weights = random_checkpoint(MAMBA)
    without = {name: value for name, value in weights.items() if name != "lm_head.weight"}
    ids, found = logits(load(save(tmp_path, MAMBA, without, "safetensors")))
    assert error_of(found, reference_logits(MAMBA, weights, ids)) < 1e-5


def test_tied_head_that_differs_is_refused(tmp_path):
    weights = random_checkpoint({**MAMBA, "tie_embeddings": False})
    message = message_of(load, save(tmp_path, MAMBA, weights))
    assert "lm_head.weight" in message and "tie_embeddings" in message


def test_subfolder_and_device_map(tmp_path):
    weights = random_checkpoint(MAMBA)
    save(tmp_path / "step-10", MAMBA, weights)
    model = load(str(tmp_path), subfolder="step-10", device_map={"": "cpu"}, max_memory=None, token=None)
    ids, found = logits(model)
    assert error_of(found, reference_logits(MAMBA, weights, ids)) < 1e-5


def test_original_weights_are_not_drawn_first(tmp_path, monkeypatch):
    drawn = []
    for name in ("normal_", "uniform_"):
        fill = getattr(torch.Tensor, name)

        def record(tensor, *args, _fill=fill, **kwargs):
            drawn.extend([] if tensor.is_meta else [tensor.shape])
            return _fill(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, record)
    load(save(tmp_path, MAMBA2, random_checkpoint(MAMBA2)))
    assert drawn == []


def test_generation_uses_the_tokens_of_the_published_tokenizer(tmp_path):
    model = load(save(tmp_path, MAMBA2, random_checkpoint(MAMBA2)))
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 0, 0)
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3).shape == (1, 6)


# name: (family, d_model, n_layer, number of parameters)
PUBLISHED = {
    "mamba-130m": ("mamba", 768, 24, 129_135_360),
    "mamba-370m": ("mamba", 1024, 48, 371_516_416),
    "mamba-790m": ("mamba", 1536, 48, 793_204_224),
    "mamba-1.4b": ("mamba", 2048, 48, 1_372_178_432),
    "mamba-2.8b": ("mamba", 2560, 64, 2_768_345_600),
    "mamba2-130m": ("mamba2", 768, 24, 128_989_632),
    "mamba2-370m": ("mamba2", 1024, 48, 368_346_624),
    "mamba2-780m": ("mamba2", 1536, 48, 780_161_280),
    "mamba2-1.3b": ("mamba2", 2048, 48, 1_343_757_312),
    "mamba2-2.7b": ("mamba2", 2560, 64, 2_702_599_680),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name, tmp_path):
    family, d_model, n_layer, parameters = PUBLISHED[name]
    contents = {"d_model": d_model, "n_layer": n_layer, "vocab_size": 50277, "rms_norm": True}
    contents |= {
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "ssm_cfg": {},
        "pad_vocab_size_multiple": 8,
    }
    if family == "mamba2":
        contents |= {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "tie_embeddings": True}
        contents |= {"ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16}
    (tmp_path / "config.json").write_text(json.dumps(contents))
    config = load_config(str(tmp_path))
    assert config.model_type == family
    assert config.vocab_size == {"mamba": 50280, "mamba2": 50288}[family]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == parameters


def test_defaults_are_the_original_ones(tmp_path):
    (tmp_path / "config.json").write_text('{"d_model": 128, "n_layer": 1, "ssm_cfg": {"layer": "Mamba2"}}')
    config = load_config(str(tmp_path))
    assert (config.n_groups, config.state_size, config.head_dim, config.num_heads) == (1, 128, 64, 4)
    assert (config.expand, config.conv_kernel, config.chunk_size) == (2, 4, 256)
    assert (config.use_bias, config.use_conv_bias, config.layer_norm_epsilon) == (False, True, 1e-5)
    assert config.time_step_limit == (0.0, float("inf"))
    assert config.tie_word_embeddings and config.residual_in_fp32
    assert config.vocab_size == 50280  # 50277, to the next multiple of 8


REFUSED = {  # name: (config, what the message names)
    "hybrid": ({**MAMBA2, "attn_layer_idx": [1]}, ["attn_layer_idx", "[1]", "attention"]),
    "mlp": ({**MAMBA2, "d_intermediate": 64}, ["d_intermediate", "64", "MLP"]),
    "layer-norm": ({**MAMBA, "rms_norm": False}, ["rms_norm", "False", "LayerNorm"]),
    "layer": (mamba(layer="Mamba3"), ["ssm_cfg.layer", "Mamba3", "Mamba2"]),
    "no-gated-norm": (mamba2(rmsnorm=False), ["ssm_cfg.rmsnorm", "False"]),
    "norm-before-gate": (mamba2(norm_before_gate=True), ["ssm_cfg.norm_before_gate", "True"]),
    "D-per-channel": (mamba2(D_has_hdim=True), ["ssm_cfg.D_has_hdim", "True"]),
    "initial-states": (mamba2(learnable_init_states=True), ["ssm_cfg.learnable_init_states"]),
    "d_ssm": (mamba2(d_ssm=48), ["ssm_cfg.d_ssm", "48", "16 of its 64"]),
    "headdim": (mamba2(headdim=24), ["ssm_cfg.headdim", "24", "64"]),
    "ngroups": (mamba2(ngroups=3), ["ssm_cfg.ngroups", "3", "4 heads"]),
    "epsilon": ({**MAMBA2, "norm_epsilon": 1e-6}, ["norm_epsilon", "1e-06", "1e-05"]),
    "unknown": ({**MAMBA, "bidirectional": True}, ["bidirectional"]),
    "unknown-ssm": (mamba(dt_limit=[0.0, 1.0]), ["ssm_cfg.dt_limit"]),
    "expand": (mamba(expand=1.5), ["ssm_cfg.expand", "1.5"]),
    "size": ({**MAMBA, "d_model": 0}, ["d_model", "0"]),
    "kind": ({**MAMBA, "n_layer": "2"}, ["n_layer", "'2'"]),
    "field": (mamba(d_state="16"), ["state_size", "16"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_is_refused_by_name(name, tmp_path):
    config, names = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = message_of(load_config, str(tmp_path))
    assert str(tmp_path) in message
    for expected in names:
        assert expected in message


def test_groups_need_a_grouped_norm(tmp_path, monkeypatch):
    class Ungrouped(torch.nn.Module):
        def __init__(self, hidden_size, eps=1e-6):
            super().__init__()

    monkeypatch.setattr(original, "MambaRMSNormGated", Ungrouped)
    (tmp_path / "config.json").write_text(json.dumps(mamba2(ngroups=2)))
    assert "ssm_cfg.ngroups is 2" in message_of(load_config, str(tmp_path))


@pytest.mark.parametrize("config", [MAMBA, MAMBA2], ids=["mamba", "mamba2"])
def test_original_weights_that_do_not_fit(config, tmp_path):
    weights = random_checkpoint(config)
    weights["backbone.layers.0.norm.bias"] = weights.pop("backbone.layers.1.norm.weight")
    weights["backbone.layers.1.mixer.D"] = torch.zeros(7)
    message = message_of(load, save(tmp_path, config, weights))
    assert "1 missing (backbone.layers.1.norm.weight)" in message
    assert "backbone.layers.0.norm.bias" in message and "backbone.layers.1.mixer.D is (7,), expected (" in message


def test_original_vocabulary_that_is_not_padded_as_stated(tmp_path):
    weights = random_checkpoint({**MAMBA, "pad_vocab_size_multiple": 1})
    assert "backbone.embeddings.weight is (50, 32), expected (56, 32)" in message_of(
        load, save(tmp_path, MAMBA, weights)
    )
