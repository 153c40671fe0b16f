"""Arithmetic of the group metrics, on arrays of per-document results; nothing here knows lm-eval.

Every standard error is paired: the same documents were answered at each shot count, so the errors of two accuracies
are correlated, and the difference is known better than its two sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error; NaN where it is undefined."""

    value: float
    stderr: float


@dataclass(frozen=True)
class ICLGap:
    """What shots bring over no shots, in percent of the 0-shot accuracy.

    Attributes:
        improvement: shots -> mean improvement over the benchmarks.
        aipss: average improvement percentage of {1, 3, 5}-shot versus 0-shot: the mean of `improvement`.
        undefined: benchmarks with a 0-shot accuracy of zero, for which no relative improvement exists.
    """

    improvement: dict[int, Estimate]
    aipss: Estimate
    undefined: tuple[str, ...]


def improvement(acc_0: ArrayLike, acc_k: ArrayLike) -> Array:
    """100 (acc_k - acc_0) / acc_0, in percent, elementwise; NaN where acc_0 is zero."""
    base, treated = np.asarray(acc_0, dtype=float), np.asarray(acc_k, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(base == 0, np.nan, 100 * (treated - base) / base)


def icl_gap(correct: Mapping[str, Mapping[int, ArrayLike]]) -> ICLGap:
    """Improvement over 0-shot by shots, averaged over benchmarks, and AIPSS, each with a paired standard error.

    Benchmarks are independent samples; the shot counts of one benchmark are not, they share its documents. So the delta
    method is applied to each document: for r = acc_k / acc_0 the linear influence of document i is
    100 [(x_ki - acc_k) - r (x_0i - acc_0)] / acc_0; influences are averaged over shots first, and variances over
    benchmarks after. The linearisation holds while the error of acc_0 is small beside acc_0.

    Args:
        correct: benchmark -> shots -> (n,) array of one score a document (0 or 1 for accuracy), the same documents in
            the same order at each shot count. Shot count 0 is the reference and must be there.

    Raises:
        ValueError: no benchmark; shot counts differ between benchmarks or lack 0; arrays of one benchmark differ in
            length.
    """
    scores = {
        name: {shots: np.asarray(x, dtype=float) for shots, x in by_shots.items()} for name, by_shots in correct.items()
    }
    shot_counts = _shot_counts(scores)
    values = np.empty((len(scores), len(shot_counts)))
    influences: list[Array] = []  # a benchmark each, (shots, documents)
    for row, by_shots in enumerate(scores.values()):
        zero = by_shots[0]
        treated = np.stack([by_shots[shots] for shots in shot_counts])
        acc_0, acc_k = zero.mean(), treated.mean(axis=1)
        values[row] = improvement(acc_0, acc_k)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = (acc_k / acc_0)[:, None]
            influences.append(100 * ((treated - acc_k[:, None]) - ratio * (zero - acc_0)) / acc_0)
    return ICLGap(
        improvement={
            shots: Estimate(values[:, i].mean(), _stderr_of_mean([influence[i] for influence in influences]))
            for i, shots in enumerate(shot_counts)
        },
        aipss=Estimate(values.mean(), _stderr_of_mean([influence.mean(axis=0) for influence in influences])),
        undefined=tuple(name for name, by_shots in scores.items() if by_shots[0].mean() == 0),
    )


def _shot_counts(scores: Mapping[str, Mapping[int, Array]]) -> list[int]:
    if not scores:
        raise ValueError("icl_gap needs at least one benchmark")
    shot_counts = sorted(next(iter(scores.values())))
    for name, by_shots in scores.items():
        if sorted(by_shots) != shot_counts or 0 not in by_shots or len(by_shots) < 2:
            raise ValueError(
                f"{name} was scored at {sorted(by_shots)} shots; expected 0 and the same further shot counts for each "
                f"benchmark ({shot_counts})"
            )
        lengths = {shots: len(x) for shots, x in by_shots.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(
                f"{name}: documents by shots are {lengths}; a paired comparison needs the same ones at each"
            )
    return [shots for shots in shot_counts if shots != 0]


def _stderr_of_mean(influences: Sequence[Array]) -> float:
    """Standard error of a mean over independent samples, from the centred influences of their documents."""
    if any(len(influence) < 2 for influence in influences):
        return float("nan")
    variances = [np.square(influence).sum() / (len(influence) * (len(influence) - 1)) for influence in influences]
    return float(np.sqrt(np.sum(variances)) / len(influences))
