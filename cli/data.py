"""Training data for `mamba-ft`: found (`sources`), brought into TRL's forms and checked (`forms`), and fingerprinted.

`chat` prepares the tokenizer for it. Every row is checked before anything is trained.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass

from datasets import Dataset

from .chat import CHAT_TEMPLATE, Preparation, prepare_tokenizer
from .forms import converted
from .sources import EMBEDDED, DataError, open_splits, take

__all__ = ["CHAT_TEMPLATE", "DataError", "Preparation", "TrainingData", "load_data", "prepare_tokenizer"]

logger = logging.getLogger(__name__)

LOSSES = ("response", "all")


@dataclass(frozen=True)
class TrainingData:
    """Rows that SFTTrainer takes as they are.

    train, evaluation: with the columns `messages`, `prompt` and `completion`, or `text`.
    form: the name of the form in which they came, a key of `forms.COLUMNS`.
    source: what the user named, or "embedded".
    fingerprint: hash of the rows' content, in their order, the same on every machine.
    loss: arguments of SFTConfig.
    """

    train: Dataset
    evaluation: Dataset | None
    form: str
    source: str
    fingerprint: str
    loss: dict[str, bool]


def load_data(
    source: str | None,
    *,
    name: str | None = None,
    split: str = "train",
    eval_split: str | None = None,
    revision: str | None = None,
    loss_on: str = "response",
    seed: int = 0,
) -> TrainingData:
    """Loads, recognises and checks training data.

    Args:
        source: None or "embedded"; a .jsonl, .json, .csv or .parquet file; a directory of such files or written by
            `save_to_disk`; or a dataset's id on the hub.
        name: the configuration of a hub dataset.
        split: the rows to train on, as `datasets` writes them ("train", "train[:10%]").
        eval_split: the rows to evaluate on, written alike, or the share of the training rows (between 0 and 1) to
            hold out for it. By default the held-out part of the embedded set; no evaluation for others.
        revision: of a hub dataset.
        loss_on: "response" for the loss on responses alone, "all" for the loss on every token. Plain text has no
            responses.
        seed: of the choice of the rows that a share holds out.

    Raises DataError for anything that cannot be found, read, recognised or trained on; a row that cannot be is
    named by its index in its split.
    """
    if loss_on not in LOSSES:
        raise DataError(f"the loss can be on {' or '.join(map(repr, LOSSES))}, not on {loss_on!r}")
    share = _share(eval_split)
    splits = open_splits(source, name=name, revision=revision)
    source = source or EMBEDDED
    if source == EMBEDDED and eval_split is None and "heldout" not in split:
        eval_split = "heldout"
    rows, places = take(splits, split, source)
    train, form = converted(rows, f"{source}, split {split!r}")
    evaluation = None
    if share is not None:
        train, evaluation = _hold_out(train, share, seed, source)
    elif eval_split is not None:
        eval_rows, eval_places = take(splits, eval_split, source)
        evaluation, eval_form = converted(eval_rows, f"{source}, split {eval_split!r}")
        if eval_form != form:
            raise DataError(f"{source}: split {split!r} has the form {form!r}, split {eval_split!r} {eval_form!r}")
        if both := sum(len(range(*_overlap(a, b))) for n, a in places for m, b in eval_places if n == m):
            logger.warning("%s: %d of %d evaluation rows are also trained on", source, both, len(eval_rows))
    return TrainingData(
        train=train,
        evaluation=evaluation,
        form=form,
        source=source,
        fingerprint=_fingerprint([train] if evaluation is None else [train, evaluation]),
        loss={
            "completion_only_loss": loss_on == "response" and "prompt" in train.column_names,
            "assistant_only_loss": loss_on == "response" and "messages" in train.column_names,
        },
    )


def _overlap(a: range, b: range) -> tuple[int, int]:
    return max(a.start, b.start), min(a.stop, b.stop)


def _share(eval_split: str | None) -> float | None:
    """The share of the rows that `eval_split` holds out; None if it names a split."""
    try:
        share = float(eval_split or "none")
    except ValueError:
        return None
    if not 0 < share < 1:
        raise DataError(f"a share of the training rows is between 0 and 1, not {eval_split}: 0.05 holds out 5 %")
    return share


def _hold_out(rows: Dataset, share: float, seed: int, source: str) -> tuple[Dataset, Dataset]:
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise DataError(f"{source}: {share} of {len(rows)} rows for evaluation leaves none to train on")
    parts = rows.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def _fingerprint(parts: list[Dataset]) -> str:
    """Of the rows' content: `datasets` has a fingerprint, but of how the rows came about."""
    digest = hashlib.sha256()
    for part in parts:
        columns = sorted(part.column_names)
        digest.update(json.dumps([len(part), columns]).encode())
        for batch in part.iter(batch_size=1000):
            for row in zip(*(batch[column] for column in columns), strict=True):
                digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]
