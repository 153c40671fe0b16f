"""A stratified bootstrap over documents, in NumPy: the same resampled documents for each column of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

DRAWS = 10_000
SEED = 1234
# Numbers held at a time for one stratum: 32 MB each of the drawn documents and of their counts.
_CHUNK = 2**22


def bootstrap(
    strata: Sequence[Array], statistic: Callable[[Array], Array], draws: int = DRAWS, seed: int = SEED
) -> tuple[Array, Array]:
    """The value of a statistic of means, and its values on resampled documents.

    Documents are drawn with replacement within their stratum, which keeps its size: a benchmark or subject is fixed,
    its documents are a sample. A draw takes the whole row of a document, so that all columns stay paired. The documents
    drawn depend on the seed and on the sizes of the strata alone.

    Args:
        strata: a (documents, columns) array each.
        statistic: maps means by stratum, (..., strata, columns), to (..., figures).

    Returns:
        (figures,) on the documents as they are, and (draws, figures).
    """
    value = statistic(np.stack([documents.mean(axis=0) for documents in strata]))
    return value, np.concatenate([statistic(means) for means in _resampled(strata, draws, seed)])


def _resampled(strata: Sequence[Array], draws: int, seed: int) -> Iterator[Array]:
    """(chunk, strata, columns) means of resampled documents."""
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // max(len(documents) for documents in strata))
    for start in range(0, draws, size):
        chunk = min(size, draws - start)
        means = np.empty((chunk, len(strata), strata[0].shape[1]))
        for i, documents in enumerate(strata):
            n = len(documents)
            # How often each document was drawn: a matrix product with counts instead of a copy of every drawn row.
            drawn = rng.integers(n, size=(chunk, n)) + n * np.arange(chunk)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=chunk * n).reshape(chunk, n)
            means[:, i] = counts.astype(float) @ documents / n
        yield means
