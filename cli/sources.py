"""Where training rows come from: the embedded set, a local file or directory, or a dataset on the Hugging Face hub.

Whatever the source, the result is splits by name, and one way to take a part of them (`take`), so that "train[:5%]"
means the same for a file as for the hub.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pandas
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    ReadInstruction,
    Value,
    concatenate_datasets,
    config,
    load_dataset,
    load_from_disk,
)
from datasets.data_files import DataFilesDict, get_data_patterns
from huggingface_hub.errors import GatedRepoError
from lm_eval_mamba.tasks.icl_gap_mini import instructions

logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
# A file's suffix to the builder of `datasets` that reads it.
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
NEEDS_NO_NETWORK = "The embedded instruction set (no dataset named) needs no network."


class DataError(ValueError):
    """Training data that cannot be found, read, recognised or used; the message says what to do.

    The error of the library underneath, if there was one, is its `__cause__`.
    """


def open_splits(source: str | None, *, name: str | None = None, revision: str | None = None) -> DatasetDict:
    """The splits of `source` (see `data.load_data`) by name; rows that come without a split are "train".

    Raises DataError for a source that does not exist or cannot be read, and for `name` or `revision` where there is
    no choice between configurations or revisions.
    """
    if source is None or source == EMBEDDED:
        _refuse_options("the embedded instruction set", name=name, revision=revision)
        return DatasetDict({split: Dataset.from_list(instructions.read(split)) for split in instructions.SPLITS})
    path = Path(source).expanduser()
    if path.is_dir():
        _refuse_options(f"{source}, a local directory,", revision=revision)
        return _nonempty(_from_directory(source, path, name), source)
    if path.is_file():
        _refuse_options(f"{source}, a local file,", name=name, revision=revision)
        if path.suffix.lower() not in BUILDERS:
            raise DataError(f"{source} has the suffix {path.suffix!r}; expected a file in {_formats()}, or a directory")
        return DatasetDict(train=_read(BUILDERS[path.suffix.lower()], [str(path)], source))
    if _is_path(source):
        raise DataError(
            f"{source} is a local path, and nothing is there (current directory: {os.getcwd()}). Name an existing "
            f"file in {_formats()}, a directory, or a hub id of the form owner/name. {NEEDS_NO_NETWORK}"
        )
    return _from_hub(source, name, revision)


def take(splits: DatasetDict, split: str, source: str) -> tuple[Dataset, list[tuple[str, range]]]:
    """The rows that `split` names ("test", "train[:5%]", "train+test", as `datasets` writes them), and which those
    are: names of splits with indices in them.

    Raises DataError for a split that does not exist, naming those that do, and for a part that has no rows.
    """
    lengths = {name: len(rows) for name, rows in splits.items()}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        there = ", ".join(f"{name} ({length:,} rows)" for name, length in lengths.items())
        raise DataError(
            f"{source} has no split {split!r}; it has {there}. A part of one is written as in `train[:5%]`."
        ) from error
    ranges = [(part.splitname, range(lengths[part.splitname])[part.from_ : part.to]) for part in parts]
    if not any(indices for _, indices in ranges):
        raise DataError(f"the split {split!r} of {source} has no rows")
    return concatenate_datasets([splits[name].select(indices) for name, indices in ranges if indices]), ranges


def _from_directory(source: str, path: Path, name: str | None) -> DatasetDict:
    """What `save_to_disk` wrote, a clone of a hub dataset (its README.md lists configurations), or data files."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        _refuse_options(f"{source}, written by `save_to_disk`,", name=name)
        try:
            saved = load_from_disk(str(path))
        except Exception as error:  # Arrow's, the file system's and the JSON reader's own
            raise DataError(
                f"{source} cannot be read: {_reason(error)}. Write it again with `save_to_disk`."
            ) from error
        return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
    if name is not None or (path / "README.md").exists():
        try:
            return load_dataset(str(path), name=name)
        except Exception as error:
            raise DataError(f"{source} cannot be read as a clone of a hub dataset: {_reason(error)}") from error
    path = Path(os.path.abspath(path))  # as `datasets` names the files
    files = [str(file) for file in path.rglob("*") if file.suffix.lower() in BUILDERS]
    if not files:
        raise DataError(f"{source} holds no data: expected files in {_formats()}, or what `save_to_disk` writes")
    splits: dict[str, list[str]] = {
        split: sorted(str(file) for file in found if Path(file).suffix.lower() in BUILDERS)
        for split, found in DataFilesDict.from_patterns(get_data_patterns(str(path)), base_path=str(path)).items()
    }
    if unused := sorted(set(files) - {file for found in splits.values() for file in found}):
        logger.warning("%s: not used, for want of a split in their names: %s", source, ", ".join(unused))
    return DatasetDict({split: _read_all(found, source) for split, found in splits.items() if found})


def _read_all(files: list[str], source: str) -> Dataset:
    """The rows of one split, whose files must be of one kind."""
    kinds = {BUILDERS[Path(file).suffix.lower()] for file in files}
    if len(kinds) > 1:
        raise DataError(
            f"{source} has one split in {' and '.join(sorted(kinds))} files ({', '.join(files[:4])}). Keep one kind "
            "per split, or name one file."
        )
    return _read(kinds.pop(), files, source)


def _read(builder: str, files: list[str], source: str) -> Dataset:
    try:
        options: dict[str, Any] = {}
        if builder == "csv":
            # pandas would read an answer "NA" as missing and "007" as 7: every cell is its text.
            columns = pandas.read_csv(files[0], nrows=0).columns
            options = {"features": Features({c: Value("string") for c in columns}), "keep_default_na": False}
        return load_dataset(builder, data_files={"train": files}, split="train", **options)
    except Exception as error:  # pandas', Arrow's and datasets' own, and plain OSErrors
        raise DataError(f"{source} cannot be read as {builder}: {_reason(error)}") from error


def _from_hub(source: str, name: str | None, revision: str | None) -> DatasetDict:
    try:
        loaded = load_dataset(source, name=name, revision=revision)
    except Exception as error:  # the client's, its HTTP library's, datasets' own, and plain OSErrors
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        if any(isinstance(link, GatedRepoError) for link in chain):
            why = f"it is gated: accept its terms at https://huggingface.co/datasets/{source}, then `hf auth login`"
        elif config.HF_HUB_OFFLINE and any(isinstance(link, ConnectionError) for link in chain):
            why = (
                "HF_HUB_OFFLINE (or HF_DATASETS_OFFLINE) is set and the local cache does not have it. Unset it to "
                "download the dataset, or name a local file or directory"
            )
        else:
            why = f"{_reason(error)} (HF_HUB_OFFLINE is {'' if config.HF_HUB_OFFLINE else 'not '}set)"
        raise DataError(
            f"{source} is neither a local file or directory nor a dataset that the hub gave us: {why}. "
            + NEEDS_NO_NETWORK
        ) from error
    return _nonempty(loaded, source)


def _nonempty(splits: DatasetDict, source: str) -> DatasetDict:
    if not splits:
        raise DataError(f"{source} has no split with any rows")
    return splits


def _refuse_options(what: str, **options: str | None) -> None:
    for option, value in options.items():
        if value is not None:
            raise DataError(f"{what} has no {option} to choose, and {value!r} was given: leave it out")


def _reason(error: BaseException) -> str:
    """The message of the error at the root, in one line: `datasets` wraps a reader's own in its general one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


def _formats() -> str:
    return ", ".join(BUILDERS)


def _is_path(text: str) -> bool:
    """Whether it can only be a local path: a hub id is `name` or `owner/name`."""
    return (
        os.path.isabs(text)
        or text.startswith((".", "~"))
        or "\\" in text
        or text.count("/") > 1
        or text.endswith("/")
        or Path(text).suffix.lower() in BUILDERS
    )
