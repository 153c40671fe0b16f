"""Packed batches of one size, so that CUDA graphs can replay their kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FILLER = "filler"  # key of a batch: how many of its tokens are no one's


class FullBatches:
    """Fills packed batches up to `rows` x `length` tokens, with one more document that has no labels.

    TRL lays the documents of a batch end to end without padding, and packs each row nearly full; the sizes of batches
    then differ by a little, and each would be a shape of its own. The last, smaller batch of an epoch stays as it is.

    Args:
        collate: TRL's padding-free collator.
        rows: packed rows of a full batch, each of at most `length` tokens.
        token: what to fill with.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], rows: int, length: int, token: int):
        self._collate, self._rows, self._length, self._token = collate, rows, length, token

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        missing = self._rows * self._length - sum(len(each["input_ids"]) for each in examples)
        if len(examples) < self._rows or missing <= 0:
            return self._collate(examples)
        filler = {"input_ids": [self._token] * missing, "labels": [-100] * missing, "seq_lengths": [missing]}
        return {**self._collate([*examples, filler]), FILLER: missing}
