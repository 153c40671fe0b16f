"""Figures over models, against plain loops."""

import numpy as np
import pytest

from lm_eval_mamba.families import aipss_ratio, family_gap, mean_of
from lm_eval_mamba.statistics import Estimate, icl_gap

SHOTS = (0, 1, 3, 5)


def models(rng, count, sizes=(40, 60)):
    return [
        {f"b{i}": {k: (rng.random(n) < 0.4 + 0.05 * k).astype(float) for k in SHOTS} for i, n in enumerate(sizes)}
        for _ in range(count)
    ]


def test_a_family_of_one_is_its_model():
    rng = np.random.default_rng()
    # With few documents a ratio is far from normal, and its deviation not what draws of them show.
    (model,) = models(rng, 1, sizes=(400, 600))
    ours, single = family_gap([model], draws=4000), icl_gap(model)
    assert ours.aipss.value == pytest.approx(single.aipss.value)
    for k in SHOTS[1:]:
        assert ours.improvement[k].value == pytest.approx(single.improvement[k].value)
        low, high = ours.improvement[k].interval
        assert low <= ours.improvement[k].value <= high
        assert ours.improvement[k].stderr == pytest.approx(single.improvement[k].stderr, rel=0.2)


def test_a_mean_over_models_that_share_documents():
    rng = np.random.default_rng()
    several = models(rng, 3)
    gap = family_gap(several, draws=200)
    assert gap.aipss.value == pytest.approx(np.mean([icl_gap(model).aipss.value for model in several]))
    (one,) = models(rng, 1)
    # Copies are no new information: the interval is that of one. Independent documents would make it narrower.
    assert family_gap([one] * 3, draws=500).aipss.interval == pytest.approx(family_gap([one], draws=500).aipss.interval)


def test_a_ratio_of_families_is_paired():
    rng = np.random.default_rng()
    ours, theirs = models(rng, 2), models(rng, 3)
    ratio = aipss_ratio(ours, theirs, draws=200)
    means = [np.mean([icl_gap(model).aipss.value for model in side]) for side in (ours, theirs)]
    assert ratio.value == pytest.approx(100 * means[0] / means[1])
    same = aipss_ratio(ours, ours, draws=200)
    assert same.value == pytest.approx(100) and same.stderr == pytest.approx(0, abs=1e-9)


def test_what_cannot_be_averaged_is_refused():
    rng = np.random.default_rng()
    with pytest.raises(ValueError, match="at least one model"):
        family_gap([])
    with pytest.raises(ValueError, match="same benchmarks"):
        family_gap([*models(rng, 1), *models(rng, 1, sizes=(40, 61))])


def test_a_mean_of_runs_has_their_spread():
    assert mean_of([Estimate(1.0, 0.1, (0.5, 1.5))]) == Estimate(1.0, 0.1, (0.5, 1.5))
    assert mean_of([Estimate(1.0, 9.0), Estimate(3.0, 9.0)]) == Estimate(2.0, pytest.approx(2**0.5))
