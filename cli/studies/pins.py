"""What a name stood for when a study began: the commit on the hub, or a hash of the files here.

A branch moves and a directory changes; a study's runs are all of what was pinned. Pins of hub names are looked up once
and kept in the study's directory; those of local files are taken again each time, so that a changed checkpoint is
another one.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Any

import yaml

from .models import EMBEDDED, Model, local_path

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.py")


class PinError(RuntimeError):
    """Nothing tells what a name stands for; the message says why, and what to do."""


class Pins:
    """Pins by name and revision; looked up when first asked for, if `online`.

    Args:
        known: those of an earlier time, as `stored` gave them.
        online: whether to ask the hub for those that are not known.
    """

    def __init__(self, known: dict[str, str] | None = None, online: bool = False) -> None:
        self.stored = dict(known or {})
        self._online = online

    @property
    def complete(self) -> bool:
        """Whether nothing that was asked for is left open."""
        return all(value != "" for value in self.stored.values())

    def model(self, model: Model) -> str:
        """Of a checkpoint: commit:…, sha256:… of its files, or nothing if it is not known yet."""
        if model.source in EMBEDDED:
            return embedded_pin(model.source)
        return self._pin("model", model.source, model.revision)

    def adapter(self, source: str) -> str:
        """Of a PEFT adapter, likewise."""
        return self._pin("model", source, None)

    def data(self, source: str, revision: str | None) -> str:
        """Of training data or text, likewise."""
        if source == "embedded":
            return embedded_pin(source)
        return self._pin("dataset", source, revision)

    def commit(self, kind: str, source: str, revision: str | None) -> str | None:
        """The revision to load: the pinned commit of a hub name, and what was given for anything else."""
        pin = self.stored.get(f"{kind} {source}@{revision or 'main'}", "")
        return pin.removeprefix("commit:") if pin.startswith("commit:") else revision

    def _pin(self, kind: str, source: str, revision: str | None) -> str:
        if local_path(source):
            return content_pin(Path(source), _MODEL_FILES if kind == "model" else ("*",))
        name = f"{kind} {source}@{revision or 'main'}"
        if not self.stored.get(name):
            given = revision and _COMMIT.fullmatch(revision)
            self.stored[name] = f"commit:{revision}" if given else ""
            if not given and self._online:
                self.stored[name] = f"commit:{_commit_on_hub(kind, source, revision)}"
        return self.stored[name]


def _commit_on_hub(kind: str, source: str, revision: str | None) -> str:
    import huggingface_hub
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    try:
        if kind == "model":
            # Through the cache, so that a machine without network can go on with what it has. An adapter has another
            # config.
            path = None
            for file in ("config.json", "adapter_config.json"):
                path = path or cached_file(source, file, revision=revision, _raise_exceptions_for_missing_entries=False)
            commit = extract_commit_hash(path, None)
        else:
            commit = huggingface_hub.HfApi().dataset_info(source, revision=revision).sha
    except Exception as error:  # the client raises its own, its HTTP library's and plain OSErrors
        raise PinError(
            f"the hub does not say which commit of the {kind} {source} is {revision or 'main'} "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). A study begins with network; or give the commit "
            "itself as its revision."
        ) from error
    if commit is None:
        raise PinError(f"{source} on the hub is no {kind}: it has neither config.json nor adapter_config.json.")
    return commit


def content_pin(path: Path, patterns: tuple[str, ...]) -> str:
    """A hash of a file, or of the files of a directory; their names count, the directory's does not."""
    if path.is_file():
        return f"sha256:{_file_hash(path, path.stat().st_mtime_ns)[:16]}"
    recursive = patterns == ("*",)
    files = {file for pattern in patterns for file in (path.rglob(pattern) if recursive else path.glob(pattern))}
    digest = hashlib.sha256()
    for file in sorted(each for each in files if each.is_file()):
        digest.update(f"{file.relative_to(path)} {_file_hash(file, file.stat().st_mtime_ns)}\n".encode())
    return f"sha256:{digest.hexdigest()[:16]}"


@functools.cache
def _file_hash(path: Path, changed: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


@functools.cache
def embedded_pin(name: str) -> str:
    """Of an embedded checkpoint, or of the embedded instruction set."""
    from importlib import resources

    if name == "embedded":
        folder = Path(str(resources.files("lm_eval_mamba.tasks") / "icl_gap_mini" / "data"))
        return content_pin(folder, ("instructions.*.jsonl",))
    return content_pin(Path(str(resources.files("peft_mamba") / "embedded" / name)), _MODEL_FILES)


@functools.cache
def own_groups() -> dict[str, Path]:
    """Name to definition of the task groups that come with this package."""
    from importlib import resources

    root = Path(str(resources.files("lm_eval_mamba.tasks")))
    files = [file for file in sorted(root.glob("*/*.yaml")) if _plain(file).get("class")]
    return {str(_plain(file)["task"]): file for file in files}


def is_divergence(task: str) -> bool:
    """Whether it is a group of ours whose tasks are scored in precisions of their own."""
    groups = own_groups()
    return task in groups and "DivergenceGroup" in _plain(groups[task])["class"]


def task_pin(task: str) -> str:
    """A hash of what this package defines of a group, comments apart; nothing for lm-eval's own tasks, whose version is
    in the results."""
    file = own_groups().get(task)
    if file is None:
        return ""
    digest = hashlib.sha256(repr(_plain(file)).encode())
    benchmarks = _plain(file)["benchmarks"]
    for path in sorted(benchmarks.values()) if isinstance(benchmarks, dict) else ():
        local = (file.parent / path).resolve()
        if local.is_file():
            digest.update(repr(_plain(local)).encode())
            for data in sorted((local.parent / "data").glob(f"{local.stem}.*")):
                digest.update(_file_hash(data, data.stat().st_mtime_ns).encode())
    return f"sha256:{digest.hexdigest()[:16]}"


class _Plain(yaml.SafeLoader):
    """Reads `!function name` as its name."""


_Plain.add_multi_constructor("!", lambda loader, suffix, node: loader.construct_scalar(node))


def _plain(file: Path) -> dict[str, Any]:
    return yaml.load(file.read_text(encoding="utf-8"), _Plain)
