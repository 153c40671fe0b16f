"""The report on the ablation of W: accuracies by what was adapted, and how often W alone is ahead."""

from __future__ import annotations

from typing import Any

import numpy as np

from lm_eval_mamba.bootstrap import bootstrap
from lm_eval_mamba.compare import scores
from lm_eval_mamba.statistics import Estimate, bootstrapped

from ..recipe import Recipe
from ..results import Finished, by_labels, of_action
from .charts import bars
from .common import DOCUMENTS, over_seeds, published
from .document import Figure, Report, Row, Section, Table, columns

_NAMES = {"w": "W only", "not-w": "all but W", "all": "both layers"}


def report(recipe: Recipe, finished: list[Finished]) -> Report:
    """Of one section: differences, wins, accuracies, the published table."""
    scored = of_action(finished, "score")
    measured = {_key(each): _measures(each) for each in scored}
    presets = [name for name in ("w", "not-w", "all") if any(key[1] == name for key in measured)]
    tasks = list(dict.fromkeys(task for values in measured.values() for task in values))
    differences, wins = _against_w(measured, presets, tasks)
    figure = Figure(
        name="w_ablation",
        caption="Accuracy with a LoRA on W alone minus that of the other one, mean over tasks, in points; above 0 W "
        f"alone is ahead. {DOCUMENTS}",
        rows=differences,
        draw=lambda canvas, rows: bars(
            canvas, rows, group="model", series="W alone against", value="difference", label="difference (points)"
        ),
    )
    table = []
    for (family, size, preset), members in by_labels(scored, "family", "size", "preset").items():
        row: Row = {"model": f"{family} {size}", "adapted": _NAMES.get(preset, preset)}
        for task in tasks:
            values = [measured[_key(each)][task] for each in members if task in measured[_key(each)]]
            row[task] = float(np.mean([value["shown"] for value in values])) if values else None
        table.append(row)
    theirs = [
        {"model": f"{row['model']} {row['size']}", "adapted": row["adapted"]}
        | {name: float(value) for name, value in row.items() if name not in ("model", "size", "adapted")}
        for row in published("w_ablation_zero_shot")
        if any(f"{row['model']} {row['size']}" == model for model, _, _ in measured)
    ]
    parts: list[Any] = [
        figure,
        Table(
            "How often W alone is ahead, over models, tasks and seeds (a tie is neither's). Published: 32 of 35 "
            "against all but W, 8 of 14 against both.",
            wins,
        ),
        Table(f"By task: accuracy in %, or perplexity. {over_seeds(recipe)}", table),
    ]
    if theirs:
        parts.append(Table("Published.", theirs))
    return Report("Adapting W alone", [Section("0-shot", parts)])


def _key(finished: Finished) -> tuple[str, str, int]:
    return finished.label("family", "size"), finished.labels["preset"], finished.labels["seed"]


def _measures(finished: Finished) -> dict[str, dict[str, Any]]:
    """Task, or task with `ppl`, to its figure and, for an accuracy, its documents' scores."""
    found: dict[str, dict[str, Any]] = {}
    for name, study in finished.studies().items():
        for benchmark, by_shots in scores(study).items():
            task = name if len(study.benchmarks) == 1 else f"{name} {benchmark}"
            correct = next(iter(by_shots.values()))
            found[task] = {"shown": 100 * float(np.mean(correct)), "correct": correct, "sign": 1}
            perplexity = finished.tasks[study.cells[benchmark, study.shot_counts[0]].task].get("perplexity,none")
            if perplexity is not None:
                found[f"{task} ppl"] = {"shown": perplexity, "correct": None, "sign": -1}
    return found


def _against_w(measured: dict[Any, Any], presets: list[str], tasks: list[str]) -> tuple[list[Row], list[Row]]:
    differences: list[Row] = []
    wins: list[Row] = []
    for other in presets:
        if other == "w":
            continue
        won = ties = count = 0
        for model in dict.fromkeys(model for model, _, _ in measured):
            columns_of: list[Any] = []
            for (name, preset, seed), mine in measured.items():
                theirs = measured.get((name, other, seed))
                if name != model or preset != "w" or theirs is None:
                    continue
                for task in tasks:
                    if task in mine and task in theirs:
                        ahead = mine[task]["sign"] * (mine[task]["shown"] - theirs[task]["shown"])
                        won, ties, count = won + (ahead > 0), ties + (ahead == 0), count + 1
                shared = [task for task in tasks if task in theirs and mine[task]["correct"] is not None]
                columns_of.append([mine[task]["correct"] - theirs[task]["correct"] for task in shared])
            if columns_of:
                row: Row = {"model": model, "W alone against": _NAMES.get(other, other)}
                differences.append(row | columns("difference", _mean_difference(columns_of)))
        wins.append({"W alone against": _NAMES.get(other, other), "ahead": int(won), "ties": int(ties), "of": count})
    return differences, wins


def _mean_difference(by_seed: list[list[Any]]) -> Estimate:
    """Over seeds and tasks, in points; a task's documents are resampled for all seeds at once."""
    strata = [np.stack(of_task, axis=1) for of_task in zip(*by_seed, strict=True)]
    value, drawn = bootstrap(strata, lambda means: 100 * means.mean(axis=(-2, -1), keepdims=True)[..., 0])
    return bootstrapped(value[0], drawn[:, 0], all(len(each) > 1 for each in strata))
