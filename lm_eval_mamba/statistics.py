"""Arithmetic of the group metrics, on arrays of per-document results; nothing here knows lm-eval.

Every standard error is paired: the same documents were answered at each shot count, so the errors of two accuracies
are correlated, and the difference is known better than its two sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lm_eval_mamba.bootstrap import DRAWS, SEED, Array, bootstrap

# A divergence of more than this many percentage points at a shot count is a large deviation spike. The margin: 0.51 -
# 0.50 is one point, and in floating point a little more.
SPIKE = 1 + 1e-9


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error, and a 95% interval where it was bootstrapped; NaN where it is undefined."""

    value: float
    stderr: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Pair:
    """Two runs over the documents of one benchmark, each array (shots, documents).

    Attributes:
        reference, other: scores (0 or 1 for accuracy).
        flipped: 1 where the answers differ, right or wrong; None where answers are not known.
        change: absolute difference of the log-likelihood of the reference's answer; None where not known.
    """

    reference: Array
    other: Array
    flipped: Array | None = None
    change: Array | None = None


@dataclass(frozen=True)
class Divergence:
    """What separates a run from its reference; differences in percentage points.

    Attributes:
        reference, other: shots -> accuracy.
        difference: shots -> other - reference.
        mean: mean over shots of the absolute difference.
        std: its standard deviation over shots (n - 1); NaN at a single shot count.
        spikes: shot counts at which it exceeds 1.
        flips: share of documents whose answer differs, in percent, mean over shots.
        change: mean absolute difference of the log-likelihood of the reference's answer, in nats.
    """

    reference: dict[int, Estimate]
    other: dict[int, Estimate]
    difference: dict[int, Estimate]
    mean: Estimate
    std: Estimate
    spikes: Estimate
    flips: Estimate | None
    change: Estimate | None


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


def divergence(
    pairs: Mapping[str, Pair],
    shot_counts: Sequence[int],
    weights: Mapping[str, float] | None = None,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Divergence:
    """Divergence of one run from another over the same documents, with a paired bootstrap.

    Standard errors and 95% intervals (percentiles) are those of draws of documents within each benchmark; an interval
    is widened to hold its figure. The absolute difference of resampled accuracies is biased away from zero, so where
    sampling error alone (draws centred on no difference) would give as large a mean divergence, its interval begins at
    0.

    Args:
        pairs: benchmark -> its two runs, rows in the order of `shot_counts`.
        weights: benchmark -> its weight in the mean over benchmarks, such as its number of documents, as in lm-eval's
            group `mmlu`; default equal ones.

    Raises:
        ValueError: no benchmark, or arrays whose shapes differ.
    """
    k = len(shot_counts)
    strata: list[Array] = []
    for name, pair in pairs.items():
        parts = [
            np.asarray(x, dtype=float) for x in (pair.reference, pair.other, pair.flipped, pair.change) if x is not None
        ]
        shapes = {x.shape for x in parts}
        if len(shapes) != 1 or parts[0].shape[0] != k or parts[0].shape[1] == 0:
            raise ValueError(f"{name}: arrays of {sorted(shapes)}; expected ({k} shot counts, documents) for each")
        reference, other, *answers = parts
        # Differences by document, not of means: equal runs then differ by exactly 0.
        columns = [*reference, *other, *(other - reference), *(x.mean(axis=0) for x in answers)]
        strata.append(np.stack(columns, axis=1))
    if not strata or len({stratum.shape[1] for stratum in strata}) != 1:
        raise ValueError("divergence needs benchmarks, and answers of each of them or of none")
    weight = np.array([weights[name] if weights else 1 for name in pairs], dtype=float)
    weight /= weight.sum()

    def figures(means: Array) -> Array:
        total = np.einsum("...sc,s->...c", means, weight)
        points = 100 * total[..., 2 * k : 3 * k]
        absolute = np.abs(points)
        mean, spikes = absolute.mean(axis=-1), (absolute > SPIKE).sum(axis=-1)
        std = absolute.std(axis=-1, ddof=1) if k > 1 else np.full_like(mean, np.nan)
        summary = np.stack([mean, std, spikes], axis=-1)
        return np.concatenate([total[..., : 2 * k], points, summary, total[..., 3 * k :]], axis=-1)

    value, drawn = bootstrap(strata, figures, draws, seed)
    known = all(len(stratum) > 1 for stratum in strata)
    estimates = [bootstrapped(v, column, known) for v, column in zip(value, drawn.T, strict=True)]
    accuracy, treated, difference = (
        dict(zip(shot_counts, estimates[i * k : (i + 1) * k], strict=True)) for i in range(3)
    )
    mean, std, spikes, *rest = estimates[3 * k :]
    chance = np.abs(drawn[:, 2 * k : 3 * k] - value[2 * k : 3 * k]).mean(axis=1)
    if mean.interval is not None and mean.value <= np.quantile(chance, 0.975):
        mean = Estimate(mean.value, mean.stderr, (0.0, mean.interval[1]))
    first = next(iter(pairs.values()))
    return Divergence(
        reference=accuracy,
        other=treated,
        difference=difference,
        mean=mean,
        std=std,
        spikes=spikes,
        flips=_times(rest.pop(0), 100) if first.flipped is not None else None,
        change=rest.pop(0) if first.change is not None else None,
    )


def icl_gap_difference(
    reference: Mapping[str, Mapping[int, ArrayLike]],
    other: Mapping[str, Mapping[int, ArrayLike]],
    draws: int = DRAWS,
    seed: int = SEED,
) -> ICLGap:
    """`icl_gap` of another run minus that of a reference over the same documents, in percentage points, bootstrapped.

    Args:
        reference, other: as in `icl_gap`, with the same benchmarks, shot counts and documents.

    Raises:
        ValueError: as in `icl_gap`, or the two differ in benchmarks, shot counts or numbers of documents.
    """
    sides = [
        {name: {k: np.asarray(x, dtype=float) for k, x in by_shots.items()} for name, by_shots in side.items()}
        for side in (reference, other)
    ]
    shot_counts = _shot_counts(sides[0])
    if _shot_counts(sides[1]) != shot_counts or sides[0].keys() != sides[1].keys():
        raise ValueError("icl_gap_difference needs the same benchmarks at the same shot counts on both sides")
    k = len(shot_counts)
    strata = [
        np.stack([side[name][shots] for side in sides for shots in (0, *shot_counts)], axis=1) for name in sides[0]
    ]

    def figures(means: Array) -> Array:
        base, treated = means[..., : k + 1], means[..., k + 1 :]
        gaps = [improvement(side[..., :1], side[..., 1:]).mean(axis=-2) for side in (base, treated)]
        difference = gaps[1] - gaps[0]
        return np.concatenate([difference, difference.mean(axis=-1, keepdims=True)], axis=-1)

    value, drawn = bootstrap(strata, figures, draws, seed)
    known = all(len(stratum) > 1 for stratum in strata)
    *by_shots, aipss = [bootstrapped(v, column, known) for v, column in zip(value, drawn.T, strict=True)]
    return ICLGap(
        improvement=dict(zip(shot_counts, by_shots, strict=True)),
        aipss=aipss,
        undefined=tuple(name for name in sides[0] if any(side[name][0].mean() == 0 for side in sides)),
    )


def bootstrapped(value: float, drawn: Array, known: bool) -> Estimate:
    """An estimate from its draws; no error where a benchmark has a single document, or a figure is undefined."""
    defined = drawn[np.isfinite(drawn)]  # a relative improvement is undefined in draws without a right answer
    if not known or np.isnan(value) or len(defined) < 2:
        return Estimate(float(value), float("nan"))
    low, high = np.quantile(defined, (0.025, 0.975))
    return Estimate(float(value), float(defined.std(ddof=1)), (float(min(low, value)), float(max(high, value))))


def _times(estimate: Estimate, factor: float) -> Estimate:
    interval = estimate.interval and (factor * estimate.interval[0], factor * estimate.interval[1])
    return Estimate(factor * estimate.value, factor * estimate.stderr, interval)
