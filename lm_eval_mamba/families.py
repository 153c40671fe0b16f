"""Figures over several models: all have answered the same documents, so these are resampled once for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lm_eval_mamba.bootstrap import DRAWS, SEED, Array, bootstrap
from lm_eval_mamba.statistics import Estimate, ICLGap, bootstrapped, improvement

Correct = Mapping[str, Mapping[int, ArrayLike]]  # as in `statistics.icl_gap`


def family_gap(models: Sequence[Correct], draws: int = DRAWS, seed: int = SEED) -> ICLGap:
    """`icl_gap`, averaged over models, with 95% intervals of a paired bootstrap over documents.

    Args:
        models: benchmark -> shots -> (n,) scores of a document each; the same benchmarks, shots and documents in all.

    Raises:
        ValueError: no model, or models that differ in benchmarks, shots or numbers of documents.
    """
    strata, shots = _strata(models)
    k = len(shots) - 1

    def figures(means: Array) -> Array:
        by_shots = _improvements(means, len(models), k).mean(axis=-2)
        return np.concatenate([by_shots, by_shots.mean(axis=-1, keepdims=True)], axis=-1)

    value, drawn = bootstrap(strata, figures, draws, seed)
    known = all(len(stratum) > 1 for stratum in strata)
    *by_shots, aipss = [bootstrapped(v, column, known) for v, column in zip(value, drawn.T, strict=True)]
    undefined = tuple(name for name in models[0] if any(not np.asarray(model[name][0]).any() for model in models))
    return ICLGap(dict(zip(shots[1:], by_shots, strict=True)), aipss, undefined)


def aipss_ratio(models: Sequence[Correct], base: Sequence[Correct], draws: int = DRAWS, seed: int = SEED) -> Estimate:
    """AIPSS averaged over one family's models over that of another's, in percent, bootstrapped over documents.

    Raises:
        ValueError: as `family_gap`, over both families.
    """
    strata, shots = _strata([*models, *base])
    k, first = len(shots) - 1, len(models)

    def figures(means: Array) -> Array:
        by_model = _improvements(means, len(models) + len(base), k).mean(axis=-1)
        ours, theirs = by_model[..., :first].mean(axis=-1), by_model[..., first:].mean(axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(theirs == 0, np.nan, 100 * ours / theirs)[..., None]

    value, drawn = bootstrap(strata, figures, draws, seed)
    return bootstrapped(value[0], drawn[:, 0], all(len(stratum) > 1 for stratum in strata))


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of figures of different runs, with their spread (standard deviation, n - 1) as its error."""
    values = np.array([each.value for each in estimates])
    if len(values) == 1:
        return replace(estimates[0])
    return Estimate(float(values.mean()), float(values.std(ddof=1)))


def _strata(models: Sequence[Correct]) -> tuple[list[Array], list[int]]:
    """A (documents, models x shots) array a benchmark, and the shots, 0 first."""
    if not models:
        raise ValueError("figures of a family need at least one model")
    shots = sorted(next(iter(models[0].values())))
    sizes = {name: len(np.asarray(by_shots[shots[0]])) for name, by_shots in models[0].items()}
    for model in models:
        same = {name: {k: len(np.asarray(x)) for k, x in by_shots.items()} for name, by_shots in model.items()}
        if shots[0] != 0 or same != {name: dict.fromkeys(shots, size) for name, size in sizes.items()}:
            raise ValueError(f"models of a family need the same benchmarks, shots (0 among them) and documents: {same}")
    columns: dict[str, Any] = {
        name: [np.asarray(model[name][k], dtype=float) for model in models for k in shots] for name in models[0]
    }
    return [np.stack(each, axis=1) for each in columns.values()], shots


def _improvements(means: Array, models: int, k: int) -> Array:
    """(…, models, k) improvements over 0-shot, mean over benchmarks, of (…, benchmarks, models x (k + 1)) means."""
    shaped = means.reshape(*means.shape[:-1], models, k + 1)
    return improvement(shaped[..., :1], shaped[..., 1:]).mean(axis=-3)
