"""Where a checkpoint is: an embedded one, a local directory, or a model on the Hugging Face hub.

Every file of a checkpoint is found through `Source`, so that an unreachable hub, a mistyped path and a
missing file each have one message, and `mini` means the same thing to the config, the weights and the
tokenizer.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers.utils import cached_file

logger = logging.getLogger(__name__)

EMBEDDED = ("mini", "mini-2")
HUB_OPTIONS = frozenset({"cache_dir", "force_download", "local_files_only", "proxies", "token"})
# The published state-spaces checkpoints carry no tokenizer: this is the one that they were trained with
# (github.com/state-spaces/mamba, "Evaluations").
ORIGINAL_TOKENIZER = "EleutherAI/gpt-neox-20b"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# In the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
NEEDS_NO_NETWORK = "`pretrained=mini` (Mamba) and `pretrained=mini-2` (Mamba-2) need no network."


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read or turned into a causal language model.

    The one exception of this package's loading code, for files as well as for values; the error of the
    library underneath, if there was one, is its `__cause__`.
    """


def resolve(pretrained: str) -> str:
    """Turns an embedded name (`mini`, `mini-2`) into its directory; anything else is returned as it is.

    A local directory that has such a name is `./mini`.
    """
    if pretrained in EMBEDDED:
        return str(resources.files("peft_mamba") / "embedded" / pretrained)
    return pretrained


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether the contents of a config.json are those of the original state-spaces format."""
    return "model_type" not in config and "d_model" in config and "n_layer" in config


@dataclass(frozen=True)
class Source:
    """A checkpoint's place. Made by `Source.open`, which refuses what cannot be one.

    name: as the user gave it. path: a local directory, or a hub id. hub: options of the hub's client.
    """

    name: str
    path: str
    revision: str | None = None
    subfolder: str = ""
    hub: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, pretrained: str, *, revision: str | None, subfolder: str | None, hub: Mapping[str, Any]) -> Source:
        """Raises CheckpointError for a local path that does not exist, TypeError for an unknown option."""
        if unknown := sorted(hub.keys() - HUB_OPTIONS):
            raise TypeError(f"unknown option {unknown[0]!r}; the hub's are {', '.join(sorted(HUB_OPTIONS))}")
        path = resolve(pretrained)
        if os.path.isfile(path):
            raise CheckpointError(f"{pretrained} is a file: name the directory that holds config.json and the weights")
        if not os.path.isdir(path):
            if _is_path(path):
                raise CheckpointError(
                    f"{pretrained} is a local path, and no such directory exists here (current directory: "
                    f"{os.getcwd()}). Name an existing directory, or a hub id of the form owner/name. "
                    + NEEDS_NO_NETWORK
                )
            parent = path.split("/")[0]
            if "/" in path and os.path.isdir(parent):
                logger.warning(
                    "%s is no directory here although %s is one: taking it for a model on the hub. "
                    "Write ./%s for a local directory.",
                    *(path, parent, path),
                )
        return cls(pretrained, path, revision, subfolder or "", hub)

    @property
    def is_local(self) -> bool:
        return os.path.isdir(self.path)

    def file(self, filename: str) -> str | None:
        """The local path of an optional file (downloaded if need be), None where the checkpoint has none."""
        return self._cached(filename, _raise_exceptions_for_missing_entries=False)

    def config(self) -> dict[str, Any]:
        """The contents of config.json. Raises CheckpointError if there is none or it is no JSON object."""
        path = self._cached("config.json")
        if path is None:
            hint = ""
            if self.file("adapter_config.json"):
                hint = " It holds a PEFT adapter: pass it as `peft=`, and its base model as `pretrained=`."
            raise CheckpointError(f"{self.where()} has no config.json: that is no checkpoint of a model.{hint}")
        return _read_json(path)

    def weight_files(self) -> list[str]:
        """The local paths of the weights: one file, or every shard that the index file names.

        Raises CheckpointError if there are none, or if a shard is missing.
        """
        for name in WEIGHT_FILES:
            path = self.file(name)
            if path is None:
                continue
            if not name.endswith(".index.json"):
                return [path]
            shards = sorted(set(_read_json(path).get("weight_map", {}).values()))
            if not shards:
                raise CheckpointError(f"{path} names no weight files. Copy or download it again.")
            paths = [self.file(shard) for shard in shards]
            missing = [shard for shard, found in zip(shards, paths, strict=True) if found is None]
            if missing:
                raise CheckpointError(
                    f"{self.where()} lacks {len(missing)} of the {len(shards)} shards that {name} names: "
                    f"{first_few(missing)}. Copy or download them again."
                )
            return [found for found in paths if found is not None]
        raise CheckpointError(f"{self.where()} has no weights: looked for {', '.join(WEIGHT_FILES)}")

    def where(self) -> str:
        """The checkpoint as a message names it."""
        return os.path.join(self.name, self.subfolder) if self.subfolder else self.name

    def _cached(self, filename: str, **options: Any) -> str | None:
        try:
            return cached_file(
                self.path, filename, revision=self.revision, subfolder=self.subfolder, **self.hub, **options
            )
        except Exception as error:  # the client raises its own, its HTTP library's and plain OSErrors
            raise CheckpointError(
                f"{self.name} is neither a local directory nor a model that the hub gave us: "
                f"{hub_failure(error, self.path, self.revision)}. {NEEDS_NO_NETWORK}"
            ) from error


def tokenizer_source(pretrained: str, revision: str | None = None, *, subfolder: str | None = "", **hub: Any) -> str:
    """What to give to `AutoTokenizer.from_pretrained`: the checkpoint itself, if it has a tokenizer.

    A checkpoint in the original state-spaces format seldom has one: for it this is `EleutherAI/gpt-neox-20b`,
    to which `revision` does not apply. Raises CheckpointError, which says to pass `tokenizer=`, if that one
    is out of reach or if a checkpoint in transformers format has no tokenizer.
    """
    source = Source.open(pretrained, revision=revision, subfolder=subfolder, hub=hub)
    config = source.config()
    if any(source.file(name) for name in TOKENIZER_FILES):
        return source.path
    if not is_original(config):
        raise CheckpointError(
            f"{source.where()} has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}): pass `tokenizer=` "
            "with the hub id or directory of the one that it was trained with"
        )
    try:
        cached_file(ORIGINAL_TOKENIZER, "tokenizer.json", **hub)
    except Exception as error:  # as in Source._cached
        raise CheckpointError(
            f"{source.where()} has no tokenizer, and {ORIGINAL_TOKENIZER}, which the published checkpoints "
            "in this format were trained with, is out of reach: "
            f"{hub_failure(error, ORIGINAL_TOKENIZER, None)}. Pass `tokenizer=` with a local directory that "
            "holds the right tokenizer."
        ) from error
    return ORIGINAL_TOKENIZER


def hub_failure(error: BaseException, model_id: str, revision: str | None) -> str:
    """Why the hub did not give a file, in one clause, from the error of its client (or that error's
    causes)."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    if any(isinstance(link, GatedRepoError) for link in chain):
        return f"it is gated: accept its terms at https://huggingface.co/{model_id}, then `hf auth login`"
    if any(isinstance(link, RepositoryNotFoundError) for link in chain):
        return "the hub has no such model, or it is private and `hf auth login` has not been run"
    if any(isinstance(link, RevisionNotFoundError) for link in chain):
        return f"it has no revision {revision!r}"
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set and the local cache does not have it"
    return f"the hub cannot be reached or refused ({' '.join(str(error).split())[:200]})"


def first_few(names: list[str], count: int = 3) -> str:
    """The first names of a list, and an ellipsis if there are more."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as stream:
            contents = json.load(stream)
    except ValueError as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}. Copy or download it again.") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} holds a {type(contents).__name__}, expected a JSON object")
    return contents


def _is_path(text: str) -> bool:
    """Whether it can only be a local path: a hub id is `name` or `owner/name`."""
    return (
        os.path.isabs(text) or text.startswith((".", "~")) or "\\" in text or text.count("/") > 1 or text.endswith("/")
    )
