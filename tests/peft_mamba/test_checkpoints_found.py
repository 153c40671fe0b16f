"""Finding a checkpoint: damaged and dangerous files, embedded names, paths, the hub and tokenizers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from peft_mamba.checkpoints import (
    EMBEDDED,
    AutoMambaForCausalLM,
    describe,
    load_config,
    resolve,
    source,
    tokenizer_source,
)

from .original_checkpoints import MAMBA, message_of, random_checkpoint, save

load = AutoMambaForCausalLM.from_pretrained

# Files


def test_directory_without_config(tmp_path):
    assert "config.json" in message_of(load, str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "`peft=`" in message_of(load, str(tmp_path))


@pytest.mark.parametrize("kind", ["original", "transformers"])
def test_no_weights(kind, tmp_path):
    if kind == "original":
        (tmp_path / "config.json").write_text(json.dumps(MAMBA))
    else:
        transformers.MambaConfig().save_pretrained(tmp_path)
    message = message_of(load, str(tmp_path))
    assert str(tmp_path) in message and "model.safetensors" in message and "pytorch_model.bin" in message


class Calls:
    """Unpickled, it would call os.mkdir."""

    def __init__(self, directory: Path):
        self.directory = str(directory)

    def __reduce__(self):
        return os.mkdir, (self.directory,)


@pytest.mark.parametrize("kind", ["original", "transformers"])
def test_pickle_with_code_is_refused(kind, tmp_path):
    proof = tmp_path / "was-run"
    path = save(tmp_path / "model", MAMBA, {**random_checkpoint(MAMBA), "extra": Calls(proof)})
    if kind == "transformers":
        transformers.GPTNeoXConfig().save_pretrained(path)
    message = message_of(load, path)
    assert "pytorch_model.bin" in message and "mkdir" in message and "safetensors" in message
    assert not proof.exists()


def test_pickle_with_other_values_is_refused(tmp_path):
    path = save(tmp_path, MAMBA, {**random_checkpoint(MAMBA), "epoch": 3})
    assert "epoch (int)" in message_of(load, path)
    torch.save([torch.zeros(1)], tmp_path / "pytorch_model.bin")
    assert "list" in message_of(load, path)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("left", [0.9, 0.0])
def test_truncated_weights(kind, left, tmp_path):
    path = save(tmp_path, MAMBA, random_checkpoint(MAMBA), kind)
    file = next(file for file in tmp_path.iterdir() if file.suffix == f".{kind}")
    file.write_bytes(file.read_bytes()[: int(left * file.stat().st_size)])
    message = message_of(load, path)
    assert str(file) in message and "truncated" in message


def test_git_lfs_pointer(tmp_path):
    path = save(tmp_path, MAMBA, {})
    (tmp_path / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in message_of(load, path)


def test_index_without_shards(tmp_path):
    path = save(tmp_path, MAMBA, random_checkpoint(MAMBA), "sharded-bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    assert "pytorch_model.bin.index.json" in message_of(load, path)


# Names, paths and the hub


def test_embedded_names_are_directories_of_the_package():
    package = Path(source.__file__).parents[1]
    assert [Path(resolve(name)) for name in EMBEDDED] == [package / "embedded" / name for name in EMBEDDED]
    assert [resolve(name) for name in ("./mini", "owner/mini", "mini-3")] == [
        "./mini",
        "owner/mini",
        "mini-3",
    ]


def test_embedded_name_stays_the_name_of_the_model(tmp_path, monkeypatch):
    path = save(tmp_path, MAMBA, random_checkpoint(MAMBA))
    monkeypatch.setattr(source, "resolve", lambda name: path if name == "mini" else name)
    model = load("mini")
    assert describe(model)["source"] == "mini"


def test_local_directory_of_an_embedded_name(tmp_path, monkeypatch):
    save(tmp_path / "mini", {**MAMBA, "d_model": 48}, {})
    monkeypatch.chdir(tmp_path)
    assert load_config("./mini").hidden_size == 48


@pytest.mark.parametrize("path", ["./absent", "../absent", "/absent/model", "~/absent", "a/b/c", "absent/", "a\\b"])
def test_absent_local_path_is_not_looked_up_on_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lookups = []
    monkeypatch.setattr(source, "cached_file", lambda *args, **kwargs: lookups.append(args))
    message = message_of(load, path)
    assert not lookups
    assert f"{path} is a local path" in message and "pretrained=mini" in message


def test_file_is_not_a_directory(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    message = message_of(load, str(file))
    assert f"{file} is a file" in message and "directory" in message


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty-cache"))


@pytest.mark.parametrize("call", [load, load_config, tokenizer_source], ids=["load", "config", "tokenizer"])
def test_hub_id_without_network(call, offline):
    message = message_of(call, "state-spaces/mamba-130m")
    for expected in ("state-spaces/mamba-130m", "HF_HUB_OFFLINE", "pretrained=mini", "pretrained=mini-2"):
        assert expected in message


def test_hub_id_under_a_local_directory_is_said_to_be_one(offline, tmp_path, monkeypatch, caplog):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    message_of(load_config, "runs/last")
    assert "./runs/last" in caplog.text


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (GatedRepoError, "gated"),
        (RepositoryNotFoundError, "no such model"),
        (RevisionNotFoundError, "revision 'v9'"),
        (None, "connection reset"),
    ],
)
def test_hub_says_no(kind, cause, monkeypatch):
    def fail(*args, **kwargs):
        inner = kind("no", response=SimpleNamespace(headers={}, request=None)) if kind else None
        raise OSError("connection reset") from inner

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(source, "cached_file", fail)
    message = message_of(load_config, "owner/model", revision="v9")
    assert "owner/model" in message and cause in message and "pretrained=mini" in message


def test_options_of_the_hub_are_not_swallowed(tmp_path):
    with pytest.raises(TypeError, match="use_auth"):
        load_config(str(tmp_path), use_auth="x")


# The tokenizer


def test_tokenizer_of_the_checkpoint_itself(tmp_path):
    path = save(tmp_path, MAMBA, {})
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer_source(path) == path


def test_tokenizer_of_an_original_checkpoint(tmp_path, monkeypatch):
    path = save(tmp_path, MAMBA, {})
    ask = source.cached_file
    answer = {"EleutherAI/gpt-neox-20b": "somewhere"}
    monkeypatch.setattr(source, "cached_file", lambda name, *a, **k: answer.get(name) or ask(name, *a, **k))
    assert tokenizer_source(path, revision="main") == "EleutherAI/gpt-neox-20b"


def test_tokenizer_out_of_reach(tmp_path, offline):
    message = message_of(tokenizer_source, save(tmp_path, MAMBA, {}))
    assert "EleutherAI/gpt-neox-20b" in message and "`tokenizer=`" in message and "HF_HUB_OFFLINE" in message


def test_transformers_checkpoint_without_tokenizer(tmp_path):
    transformers.MambaConfig().save_pretrained(tmp_path)
    message = message_of(tokenizer_source, str(tmp_path))
    assert str(tmp_path) in message and "`tokenizer=`" in message and "gpt-neox" not in message
