"""Divergence of one run from another, from lm-eval's result files and the samples beside them.

`compare(read(path_a), read(path_b))` pairs what two runs of the same tasks answered: a model fine-tuned in mixed
precision against one fine-tuned in fp32, say. Without samples (`--log_samples`) there are accuracies but no intervals
and no answers. The arithmetic is `lm_eval_mamba.statistics`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from lm_eval_mamba.divergence import answer_changes
from lm_eval_mamba.results import Cell, ResultsError, Study
from lm_eval_mamba.statistics import Divergence, Estimate, Pair, divergence, icl_gap, icl_gap_difference


@dataclass(frozen=True)
class Row:
    """A figure of both runs and of their difference; None where it has no meaning."""

    name: str
    a: Estimate | None
    b: Estimate | None
    difference: Estimate | None


@dataclass(frozen=True)
class Comparison:
    name: str
    shot_counts: list[int]
    documents: int
    rows: list[Row]
    notes: list[str]


def compare(a: Mapping[str, Study], b: Mapping[str, Study]) -> list[Comparison]:
    """Each study of `b` against that of `a`, the reference.

    Raises:
        ResultsError: the two differ in tasks, shot counts, limits or documents; names the first that does.
    """
    _same("tasks", "the two runs", a, b)
    return [_compare_study(a[name], b[name]) for name in a]


def published(model: str) -> dict[str, list[dict[str, str]]]:
    """What the papers print of a model: `inference`, by size, and `finetuned`, by family; all figures in points.

    Args:
        model: `<family>/<size>`, such as `Mamba/130M`, a family alone, or `all`.

    Raises:
        ResultsError: the papers have no such model.
    """
    tables = {}
    for name in ("inference", "finetuned"):
        text = (files("lm_eval_mamba") / "published" / f"divergence_{name}.csv").read_text(encoding="utf-8")
        tables[name] = list(csv.DictReader(text.splitlines()))
    if model.lower() == "all":
        return tables
    family, _, size = model.lower().partition("/")
    found = {
        name: [row for row in rows if row["family"].lower() == family and size in ("", row.get("size", size).lower())]
        for name, rows in tables.items()
    }
    if not any(found.values()) or (size and not found["inference"]):
        known = ", ".join(f"{row['family']}/{row['size']}" for row in tables["inference"])
        raise ResultsError(f"the papers print no divergence of {model}. Choose all or one of {known}.")
    return found


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """For a JSON report; None where a figure is undefined."""

    def shown(estimate: Estimate | None) -> dict[str, Any] | None:
        if estimate is None or np.isnan(estimate.value):
            return None
        stderr = None if np.isnan(estimate.stderr) else estimate.stderr
        return {"value": estimate.value, "stderr": stderr, "interval": estimate.interval}

    return {
        "name": comparison.name,
        "shots": comparison.shot_counts,
        "documents": comparison.documents,
        "figures": {
            row.name: {"a": shown(row.a), "b": shown(row.b), "difference": shown(row.difference)}
            for row in comparison.rows
        },
        "notes": comparison.notes,
    }


def divergence_between(a: Study, b: Study) -> Divergence:
    """Of `b` from `a`, the reference, over the same documents.

    Raises:
        ResultsError: as `compare`.
    """
    _, logged = _checked(a, b)
    return _divergence(a, b, logged)


def scores(study: Study) -> dict[str, dict[int, np.ndarray]]:
    """Benchmark -> shots -> (documents,) scores; a study without samples has one a benchmark, its accuracy."""
    logged = all(cell.samples is not None for cell in study.cells.values())
    return {name: {k: _correct(study.cells[name, k], logged) for k in study.shot_counts} for name in study.benchmarks}


def _compare_study(a: Study, b: Study) -> Comparison:
    notes, logged = _checked(a, b)
    rows = (_icl_rows if a.icl else _divergence_rows)(a, b, logged)
    documents = sum(a.cells[benchmark, a.shot_counts[0]].documents for benchmark in a.benchmarks)
    return Comparison(a.name, a.shot_counts, documents, rows, notes)


def _checked(a: Study, b: Study) -> tuple[list[str], bool]:
    """Notes, and whether both have samples, of two studies that can be compared."""
    _same("tasks", a.name, a.benchmarks, b.benchmarks)
    _same("shot counts", a.name, a.shot_counts, b.shot_counts)
    notes: list[str] = []
    prompts = 0
    for key in a.cells:
        for side in (a, b):
            if len(side.cells) != len(side.benchmarks) * len(side.shot_counts):
                raise ResultsError(
                    f"{side.name}: not every task was evaluated at each of {side.shot_counts} shots. Give the missing "
                    "results too."
                )
        ours, theirs = a.cells[key], b.cells[key]
        if (ours.documents, ours.limit) != (theirs.documents, theirs.limit):
            raise ResultsError(
                f"{ours.task}: {ours.documents} documents (limit {ours.limit}) against {theirs.documents} (limit "
                f"{theirs.limit}). Evaluate both with the same --limit."
            )
        if ours.samples is not None and theirs.samples is not None:
            prompts += _check_documents(ours, theirs)
    logged = all(cell.samples is not None for study in (a, b) for cell in study.cells.values())
    if not logged:
        notes.append("no samples were logged for both runs: no intervals and no answers. Evaluate with --log_samples.")
    if prompts:
        notes.append(f"{prompts} prompts differ between the runs (shots drawn otherwise, or another chat template).")
    return notes, logged


def _same(what: str, where: str, a: Iterable, b: Iterable) -> None:
    first, second = set(a), set(b)
    if first != second:
        only = [
            f"{sorted(x - y)} only in {side}" for x, y, side in ((first, second, "A"), (second, first, "B")) if x - y
        ]
        raise ResultsError(f"{where}: {what} differ: {', '.join(only)}. Compare results of the same {what}.")


def _check_documents(a: Cell, b: Cell) -> int:
    """The number of prompts that differ, when all documents are the same."""
    assert a.samples is not None and b.samples is not None
    differing = 0
    for ours, theirs in zip(a.samples, b.samples, strict=True):
        if (ours["doc_id"], ours["doc_hash"]) != (theirs["doc_id"], theirs["doc_hash"]):
            raise ResultsError(
                f"{a.task}: document {ours['doc_id']} of A (doc_hash {ours['doc_hash'][:12]}…) is not document "
                f"{theirs['doc_id']} of B ({theirs['doc_hash'][:12]}…). Compare runs over the same data set."
            )
        differing += ours["prompt_hash"] != theirs["prompt_hash"]
    return differing


def _correct(cell: Cell, logged: bool) -> np.ndarray:
    """(documents,) scores, or the accuracy as if there were a single document, which then has no standard error."""
    return np.array([float(s[cell.metric]) for s in cell.samples] if logged and cell.samples else [cell.accuracy])


def _divergence(a: Study, b: Study, logged: bool) -> Divergence:
    pairs = {}
    answers = logged and all(cell.multiple_choice for cell in a.cells.values())
    for benchmark in a.benchmarks:
        cells = [(a.cells[benchmark, shots], b.cells[benchmark, shots]) for shots in a.shot_counts]
        changes = [_answer_changes(*both) for both in cells] if answers else []
        pairs[benchmark] = Pair(
            reference=np.stack([_correct(ours, logged) for ours, _ in cells]),
            other=np.stack([_correct(theirs, logged) for _, theirs in cells]),
            flipped=np.stack([flipped for flipped, _ in changes]) if answers else None,
            change=np.stack([change for _, change in changes]) if answers else None,
        )
    sizes = {benchmark: a.cells[benchmark, a.shot_counts[0]].documents for benchmark in a.benchmarks}
    return divergence(pairs, a.shot_counts, sizes if a.weight_by_size else None)


def _divergence_rows(a: Study, b: Study, logged: bool) -> list[Row]:
    result = _divergence(a, b, logged)
    rows = [
        Row(f"acc, {k} shots (points)", _percent(result.reference[k]), _percent(result.other[k]), result.difference[k])
        for k in a.shot_counts
    ]
    summary = {
        "mean divergence (points)": result.mean,
        "its standard deviation over shots": result.std,
        "large deviation spikes (> 1 point)": result.spikes,
        "flipped answers (%)": result.flips,
        "change of log-likelihood (nats)": result.change,
    }
    return rows + [Row(name, None, None, estimate) for name, estimate in summary.items() if estimate is not None]


def _answer_changes(a: Cell, b: Cell) -> tuple[np.ndarray, np.ndarray]:
    documents = zip(a.samples or (), b.samples or (), strict=True)
    return answer_changes([(a.loglikelihoods(x) or [], b.loglikelihoods(y) or []) for x, y in documents])


def _icl_rows(a: Study, b: Study, logged: bool) -> list[Row]:
    scores = [
        {name: {k: _correct(side.cells[name, k], logged) for k in side.shot_counts} for name in side.benchmarks}
        for side in (a, b)
    ]
    gaps = [icl_gap(by_benchmark) for by_benchmark in scores]
    for side, gap in zip((a, b), gaps, strict=True):
        if side.aipss is not None and not np.isclose(gap.aipss.value, side.aipss, rtol=1e-6, atol=1e-6):
            raise ResultsError(
                f"{side.name}: its AIPSS of {side.aipss} is not that of its multiple-choice tasks ({gap.aipss.value}). "
                "The results do not say which benchmarks are averaged; compare groups that average these."
            )
    change = icl_gap_difference(scores[0], scores[1])
    rows = [
        Row(f"improvement, {k} shots (%)", gaps[0].improvement[k], gaps[1].improvement[k], change.improvement[k])
        for k in change.improvement
    ]
    return [*rows, Row("AIPSS (%)", gaps[0].aipss, gaps[1].aipss, change.aipss)]


def _percent(estimate: Estimate) -> Estimate:
    return Estimate(100 * estimate.value, 100 * estimate.stderr)
