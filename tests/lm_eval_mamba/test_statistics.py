"""The arithmetic of the in-context-learning gap: published tables, a bootstrap, and shapes that must be refused."""

import csv
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.metrics import mean_stderr

from lm_eval_mamba.statistics import icl_gap, improvement

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
