"""The arithmetic of the group metrics: published tables, bootstraps, and shapes that must be refused."""

import csv
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.metrics import mean_stderr

import lm_eval_mamba.bootstrap as bootstrap_module
from lm_eval_mamba.bootstrap import bootstrap
from lm_eval_mamba.statistics import Pair, divergence, icl_gap, icl_gap_difference, improvement

BENCHMARKS = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande")

# Printed means that the formula does not give from the printed accuracies. Mamba 130M and 1.4B: the 0-shot WinoGrande
# of this version of the table (44.8, 58.6) differs from the later one (52.6, 61.3); 790M: not explained by any row.
NOT_REPRODUCED = {
    ("Mamba", "130M", 1),
    ("Mamba", "130M", 3),
    ("Mamba", "130M", 5),
    ("Mamba", "790M", 1),
    ("Mamba", "790M", 3),
    ("Mamba", "1.4B", 1),
    ("Mamba", "1.4B", 3),
    ("Mamba", "1.4B", 5),
}


def published() -> dict[tuple[str, str, int], tuple[list[float], str]]:
    text = (files("lm_eval_mamba") / "published" / "icl_pretrained.csv").read_text()
    return {
        (row["family"], row["size"], int(row["num_fewshot"])): (
            [float(row[f"{benchmark}_acc"]) for benchmark in BENCHMARKS],
            row["mean_improvement_pct"],
        )
        for row in csv.DictReader(text.splitlines())
    }


def test_published_table_is_reproduced_but_for_the_rows_listed():
    table = published()
    differs = {
        (family, size, shots)
        for (family, size, shots), (accuracies, printed) in table.items()
        if shots and abs(improvement(table[family, size, 0][0], accuracies).mean() - float(printed)) > 0.15
    }
    assert len(table) == 40
    assert differs == NOT_REPRODUCED


@pytest.mark.parametrize(("size", "winogrande"), [("130M", 52.6), ("1.4B", 61.3)])
def test_the_second_version_of_winogrande_explains_two_of_the_three_models(size, winogrande):
    table = published()
    base = [*table["Mamba", size, 0][0][:-1], winogrande]
    for shots in (1, 3, 5):
        accuracies, printed = table["Mamba", size, shots]
        assert improvement(base, accuracies).mean() == pytest.approx(float(printed), abs=0.25)


def correlated_answers(rng, documents, accuracies, correlation=0.6):
    """0/1 answers of one benchmark at several shot counts: a document that is easy at 0 shots is easy at 5."""
    common = rng.normal(size=documents) * np.sqrt(correlation)
    own = rng.normal(size=(len(accuracies), documents)) * np.sqrt(1 - correlation)
    latent = common + own
    thresholds = np.quantile(rng.normal(size=100_000), 1 - np.asarray(accuracies))
    return dict(zip((0, 1, 3, 5), (latent > thresholds[:, None]).astype(float), strict=True))


def test_standard_errors_agree_with_a_paired_bootstrap():
    rng = np.random.default_rng(20)
    sizes = {"a": 400, "b": 700, "c": 250}
    data = {name: correlated_answers(rng, n, (0.5, 0.53, 0.58, 0.6)) for name, n in sizes.items()}
    gap = icl_gap(data)
    draws = {1: [], 3: [], 5: [], "aipss": []}
    for _ in range(4000):
        resampled = {}
        for name, by_shots in data.items():
            index = rng.integers(0, sizes[name], sizes[name])
            resampled[name] = np.stack([by_shots[shots][index].mean() for shots in (0, 1, 3, 5)])
        by_shots = np.mean([improvement(acc[0], acc[1:]) for acc in resampled.values()], axis=0)
        for shots, value in zip((1, 3, 5), by_shots, strict=True):
            draws[shots].append(value)
        draws["aipss"].append(by_shots.mean())
    for shots in (1, 3, 5):
        assert gap.improvement[shots].stderr == pytest.approx(np.std(draws[shots], ddof=1), rel=0.06)
    assert gap.aipss.stderr == pytest.approx(np.std(draws["aipss"], ddof=1), rel=0.06)


def test_pairing_makes_the_error_smaller_than_independence_would():
    rng = np.random.default_rng(3)
    answers = correlated_answers(rng, 2000, (0.5, 0.5, 0.5, 0.5), correlation=0.9)
    acc_0, acc_1 = answers[0].mean(), answers[1].mean()
    independent = 100 / acc_0 * np.sqrt((acc_1 * (1 - acc_1) + (acc_1 / acc_0) ** 2 * acc_0 * (1 - acc_0)) / 2000)
    assert icl_gap({"a": answers}).improvement[1].stderr < 0.6 * independent


def test_aipss_is_the_mean_over_shots_and_benchmarks():
    data = {
        "a": {0: [1, 0, 0, 0], 1: [1, 1, 0, 0], 3: [1, 1, 1, 0], 5: [1, 1, 1, 1]},  # +100, +200, +300 percent
        "b": {0: [1, 1, 0, 0], 1: [1, 0, 0, 0], 3: [1, 1, 0, 0], 5: [0, 0, 1, 1]},  # -50, 0, 0 percent
    }
    gap = icl_gap(data)
    assert {shots: estimate.value for shots, estimate in gap.improvement.items()} == {1: 25.0, 3: 100.0, 5: 150.0}
    assert gap.aipss.value == pytest.approx(275 / 3)
    assert gap.undefined == ()


def test_standard_error_is_lm_evals_own_where_the_reference_is_certain():
    answers = np.random.default_rng(1).integers(0, 2, 7)
    gap = icl_gap({"a": {0: np.ones(7), 1: answers}})
    assert gap.aipss.stderr == pytest.approx(100 * mean_stderr(answers.tolist()))


def test_equal_answers_have_no_gap_and_no_error():
    answers = np.random.default_rng(0).integers(0, 2, 50)
    gap = icl_gap({"a": {shots: answers for shots in (0, 1, 3, 5)}})
    assert gap.aipss.value == 0
    assert gap.aipss.stderr == pytest.approx(0, abs=1e-12)


def test_zero_shot_accuracy_of_zero_is_undefined_and_named():
    gap = icl_gap({"a": {0: [0, 0], 1: [1, 0]}, "b": {0: [1, 0], 1: [1, 1]}})
    assert np.isnan(gap.aipss.value) and np.isnan(gap.improvement[1].value)
    assert gap.undefined == ("a",)


def test_one_document_has_a_value_but_no_standard_error():
    gap = icl_gap({"a": {0: [1], 1: [0]}})
    assert gap.aipss.value == -100
    assert np.isnan(gap.aipss.stderr)


@settings(max_examples=50, deadline=None)
@given(
    documents=st.integers(2, 40),
    benchmarks=st.integers(1, 4),
    shots=st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 10**6),
)
def test_order_of_documents_and_benchmarks_is_irrelevant(documents, benchmarks, shots, seed):
    rng = np.random.default_rng(seed)
    data = {str(b): {k: rng.integers(0, 2, documents) for k in (0, *shots)} for b in range(benchmarks)}
    order = rng.permutation(documents)
    shuffled = {b: {k: data[b][k][order] for k in reversed(list(data[b]))} for b in reversed(list(data))}
    one, other = icl_gap(data), icl_gap(shuffled)
    assert one.aipss.value == pytest.approx(other.aipss.value, nan_ok=True)
    assert one.aipss.stderr == pytest.approx(other.aipss.stderr, nan_ok=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "at least one benchmark"),
        ({"a": {1: [1, 0], 3: [1, 1]}}, r"a was scored at \[1, 3\] shots"),
        ({"a": {0: [1], 1: [1]}, "b": {0: [1], 3: [1]}}, r"b was scored at \[0, 3\] shots"),
        ({"a": {0: [1, 0], 1: [1]}}, "documents by shots are"),
        ({"a": {0: [], 1: []}}, "documents by shots are"),
    ],
)
def test_what_cannot_be_paired_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        icl_gap(data)


# divergence


def pair(rng, documents, shots=4, accuracy=0.5, flip=0.03, shift=0.0):
    """Correct answers of two runs that mostly agree, with flips and changes of log-likelihood."""
    reference = (rng.random((shots, documents)) < accuracy).astype(float)
    flipped = (rng.random((shots, documents)) < flip).astype(float)
    lost = (rng.random((shots, documents)) < shift) & (reference == 1)
    other = np.where((flipped == 1) & (rng.random((shots, documents)) < 0.7), 1 - reference, reference)
    return Pair(reference, np.where(lost, 0.0, other), flipped, rng.exponential(0.01, (shots, documents)))


def test_known_differences_flips_and_spikes():
    # 200 documents: one is half a point
    reference = np.zeros((3, 200))
    reference[:, :100] = 1
    other = reference.copy()
    other[0, :1] = 0  # -0.5 points
    other[1, 100:103] = 1  # +1.5 points: a spike
    other[2, [0, 150]] = [0, 1]  # one lost, one won: 0 points, two flips
    flipped = (reference != other).astype(float)
    flipped[2, 160] = 1  # from one wrong answer to another
    change = np.full((3, 200), 0.25)
    change[0] = 1.0
    result = divergence({"a": Pair(reference, other, flipped, change)}, (0, 1, 5), draws=50)
    assert {k: estimate.value for k, estimate in result.difference.items()} == pytest.approx({0: -0.5, 1: 1.5, 5: 0})
    assert {k: estimate.value for k, estimate in result.other.items()} == pytest.approx({0: 0.495, 1: 0.515, 5: 0.5})
    assert result.mean.value == pytest.approx(2 / 3)
    assert result.std.value == pytest.approx(np.std([0.5, 1.5, 0], ddof=1))
    assert result.spikes.value == 1
    assert result.flips.value == pytest.approx(100 * 7 / 600)
    assert result.change.value == pytest.approx(0.5)


def test_exactly_one_point_is_no_spike():
    reference, other = np.zeros((1, 100)), np.zeros((1, 100))
    reference[0, :51], other[0, :50] = 1, 1
    assert divergence({"a": Pair(reference, other)}, (0,), draws=2).spikes.value == 0
    tenth = Pair(np.eye(1, 10), np.zeros((1, 10)))  # a tenth of a tenth is a little more than a hundredth
    same = Pair(np.ones((1, 90)), np.ones((1, 90)))
    result = divergence({"a": tenth, "b": same}, (0,), {"a": 10, "b": 90}, draws=2)
    assert result.mean.value > 1 and result.spikes.value == 0
    other[0, 49] = 0
    assert divergence({"a": Pair(reference, other)}, (0,), draws=2).spikes.value == 1


def test_benchmarks_count_equally_or_by_weight():
    a = Pair(np.ones((1, 10)), np.zeros((1, 10)))
    b = Pair(np.ones((1, 90)), np.ones((1, 90)))
    assert divergence({"a": a, "b": b}, (0,), draws=2).mean.value == pytest.approx(50)
    assert divergence({"a": a, "b": b}, (0,), {"a": 10, "b": 90}, draws=2).mean.value == pytest.approx(10)


def test_divergence_errors_agree_with_a_bootstrap_of_10000_draws():
    rng = np.random.default_rng(5)
    sizes = {"a": 120, "b": 300}
    data = {name: pair(rng, n, shift=0.02) for name, n in sizes.items()}
    result = divergence(data, (0, 1, 3, 5), sizes)
    figures = []
    for _ in range(10_000):  # one document at a time, as a textbook has it
        points, flips, change = np.zeros(4), 0.0, 0.0
        for name, n in sizes.items():
            drawn, weight = rng.integers(n, size=n), n / 420
            runs = data[name]
            points += weight * 100 * (runs.other[:, drawn].mean(axis=1) - runs.reference[:, drawn].mean(axis=1))
            flips += weight * 100 * runs.flipped[:, drawn].mean()
            change += weight * runs.change[:, drawn].mean()
        absolute = np.abs(points)
        spikes = (absolute > 1).sum()
        figures.append([*points, absolute.mean(), absolute.std(ddof=1), spikes, flips, change])
    expected = np.std(figures, axis=0, ddof=1)
    low, high = np.quantile(figures, (0.025, 0.975), axis=0)
    estimates = [*result.difference.values(), result.mean, result.std, result.spikes, result.flips, result.change]
    for i, estimate in enumerate(estimates):
        assert estimate.stderr == pytest.approx(expected[i], rel=0.05)
        step = 0.1 * expected[i] + 100 / 420  # an end is a whole number of documents
        assert estimate.interval[1] == pytest.approx(high[i], abs=step)
        if estimate is not result.mean:  # which begins at 0 where chance explains it
            assert estimate.interval[0] == pytest.approx(low[i], abs=step)


def test_pairing_counts():
    """Two runs that differ in few documents: far more certain than two independent accuracies."""
    rng = np.random.default_rng(2)
    result = divergence({"a": pair(rng, 1000, flip=0.01)}, (0, 1, 3, 5), draws=1000)
    independent = 100 * np.sqrt(2 * 0.25 / 1000)
    assert result.difference[0].stderr < 0.3 * independent


def test_a_run_against_itself_is_exactly_zero():
    answers = np.random.default_rng(0).integers(0, 2, (4, 1237)).astype(float)
    none = np.zeros_like(answers)
    runs = {
        name: Pair(answers[:, :n], answers[:, :n], none[:, :n], none[:, :n]) for name, n in (("a", 1237), ("b", 61))
    }
    result = divergence(runs, (0, 1, 3, 5), {"a": 1237, "b": 61}, draws=500)
    for estimate in (*result.difference.values(), result.mean, result.std, result.spikes, result.flips, result.change):
        assert (estimate.value, estimate.stderr, estimate.interval) == (0, 0, (0, 0))


def test_the_interval_of_a_mean_divergence_begins_at_zero_where_chance_explains_it():
    rng = np.random.default_rng(8)
    chance = [divergence({"a": pair(rng, 300)}, (0, 1, 3, 5), draws=400).mean for _ in range(40)]
    real = [divergence({"a": pair(rng, 300, shift=0.2)}, (0, 1, 3, 5), draws=400).mean for _ in range(10)]
    assert sum(estimate.interval[0] == 0 for estimate in chance) >= 36
    assert all(estimate.interval[0] > 3 for estimate in real)


@settings(max_examples=30, deadline=None)
@given(documents=st.integers(2, 30), shots=st.integers(2, 4), seed=st.integers(0, 10**6))
def test_intervals_hold_their_figures_and_order_is_irrelevant(documents, shots, seed):
    rng = np.random.default_rng(seed)
    runs = pair(rng, documents, shots, flip=0.3)
    result = divergence({"a": runs}, range(shots), draws=100)
    for estimate in (*result.difference.values(), result.mean, result.std, result.spikes, result.flips, result.change):
        assert estimate.interval[0] <= estimate.value <= estimate.interval[1]
    order = rng.permutation(documents)
    shuffled = Pair(*(x[:, order] for x in (runs.reference, runs.other, runs.flipped, runs.change)))
    swapped = divergence({"a": Pair(shuffled.other, shuffled.reference, shuffled.flipped)}, range(shots), draws=10)
    assert swapped.mean.value == pytest.approx(result.mean.value)
    assert swapped.flips.value == pytest.approx(result.flips.value)
    assert swapped.change is None


def test_all_columns_get_the_same_documents_whatever_the_chunks(monkeypatch):
    rng = np.random.default_rng(1)
    documents = rng.random((50, 1))
    _, drawn = bootstrap([np.hstack([documents, documents])], lambda means: means[..., 0, :], draws=30)
    assert np.array_equal(drawn[:, 0], drawn[:, 1]) and len(np.unique(drawn[:, 0])) == 30
    _, wide = bootstrap([np.hstack([documents] * 9)], lambda means: means[..., 0, :1], draws=30)
    assert np.allclose(wide[:, 0], drawn[:, 0])
    monkeypatch.setattr(bootstrap_module, "_CHUNK", 100)  # two draws at a time
    _, constant = bootstrap([np.ones((50, 1))], lambda means: means[..., 0, :], draws=5)
    assert (constant == 1).all()
    value, small = bootstrap([documents], lambda means: means[..., 0, :], draws=31)
    assert small.shape == (31, 1) and value[0] == pytest.approx(documents.mean())
    assert small.std() == pytest.approx(documents.std() / np.sqrt(50), rel=0.5)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({}, "needs benchmarks"),
        (
            {"a": Pair(np.ones((2, 3)), np.ones((2, 4)))},
            r"a: arrays of \[\(2, 3\), \(2, 4\)\]; expected \(2 shot counts",
        ),
        ({"a": Pair(np.ones((1, 3)), np.ones((1, 3)))}, "a: arrays of"),
        ({"a": Pair(np.ones((2, 0)), np.ones((2, 0)))}, "a: arrays of"),
        ({"a": Pair(*[np.ones((2, 3))] * 2), "b": Pair(*[np.ones((2, 3))] * 4)}, "answers of each of them or of none"),
    ],
)
def test_runs_that_cannot_be_paired_are_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        divergence(pairs, (0, 1))


def test_one_document_has_no_error_and_one_shot_count_no_deviation():
    single = divergence({"a": Pair(np.ones((1, 1)), np.zeros((1, 1)))}, (0,), draws=10)
    assert single.mean.value == 100 and np.isnan(single.mean.stderr) and single.mean.interval is None
    assert np.isnan(single.std.value)


# the difference of two in-context-learning gaps


def test_difference_of_gaps_and_its_paired_error():
    rng = np.random.default_rng(4)
    sizes = {"a": 300, "b": 200}
    reference = {name: correlated_answers(rng, n, (0.5, 0.53, 0.58, 0.6)) for name, n in sizes.items()}
    other = {
        name: {k: np.where(rng.random(len(x)) < 0.05, 1 - x, x) for k, x in by_shots.items()}
        for name, by_shots in reference.items()
    }
    result, gaps = icl_gap_difference(reference, other), [icl_gap(reference), icl_gap(other)]
    assert result.aipss.value == pytest.approx(gaps[1].aipss.value - gaps[0].aipss.value)
    for k in (1, 3, 5):
        expected = gaps[1].improvement[k].value - gaps[0].improvement[k].value
        assert result.improvement[k].value == pytest.approx(expected)
    draws = []
    for _ in range(4000):
        both = []
        indices = {name: rng.integers(n, size=n) for name, n in sizes.items()}
        for side in (reference, other):
            acc = {name: [side[name][k][indices[name]].mean() for k in (0, 1, 3, 5)] for name in sizes}
            both.append(np.mean([improvement(x[0], x[1:]).mean() for x in acc.values()]))
        draws.append(both[1] - both[0])
    assert result.aipss.stderr == pytest.approx(np.std(draws), rel=0.06)
    assert result.aipss.stderr < 0.5 * np.hypot(gaps[0].aipss.stderr, gaps[1].aipss.stderr)  # paired
    same = icl_gap_difference(reference, reference, draws=100)
    assert (same.aipss.value, same.aipss.stderr) == (0, 0)


def test_gaps_of_other_benchmarks_have_no_difference():
    answers = {0: [1, 0], 1: [1, 1]}
    with pytest.raises(ValueError, match="same benchmarks at the same shot counts"):
        icl_gap_difference({"a": answers}, {"b": answers})
    assert icl_gap_difference({"a": answers}, {"a": {0: [0, 0], 1: [1, 1]}}, draws=10).undefined == ("a",)
