"""The reports on divergence: of precisions in inference, and of fine-tunings from the reference among them."""

from __future__ import annotations

from typing import Any

import numpy as np

from lm_eval_mamba.compare import divergence_between
from lm_eval_mamba.families import mean_of
from lm_eval_mamba.statistics import Divergence, Estimate

from ..recipe import Recipe
from ..results import Finished, by_labels, of_action
from .charts import bars
from .common import DOCUMENTS, over_seeds, published
from .document import Figure, Report, Row, Section, Table, columns

_BIAS = "An interval begins at 0 where sampling alone would give as much."


def report(recipe: Recipe, finished: list[Finished]) -> Report:
    """Of inference, a section a task group."""
    theirs = {f"{row['family']} {row['size']}": row for row in published("divergence_inference")}
    sections = []
    scored = of_action(finished, "score")
    for task in recipe.get("tasks"):
        rows: list[Row] = []
        for (family, size), members in by_labels(scored, "family", "size").items():
            for precision in members[0].precisions[1:]:
                found = [divergence_between(e.studies()[task], e.studies(precision)[task]) for e in members]
                label = f"{family} {size}"
                printed = theirs.get(label, {}).get(f"{precision}_mean_divergence") if task.startswith("mmlu") else None
                rows.append(
                    {"model": label, "precision": precision}
                    | _figures(found)
                    | {"published": printed and float(printed)}
                )
        sections.append(
            Section(task, _parts(f"divergence_{task}", rows, "precision", recipe, f"from {recipe.get('reference')[0]}"))
        )
    return Report("Mixed-precision inference: divergence", sections)


def report_finetuned(recipe: Recipe, finished: list[Finished]) -> Report:
    """Of fine-tunings, a section a data set and task group."""
    from ..kinds.finetune_divergence import is_reference

    sections = []
    scored = of_action(finished, "score")
    for (dataset,), of_data in by_labels(scored, "dataset").items():
        for task in recipe.get("tasks"):
            rows: list[Row] = []
            with_task = [each for each in of_data if task in each.run.settings["tasks"]]
            for (family, size), members in by_labels(with_task, "family", "size").items():
                reference = {e.labels["seed"]: e for e in members if is_reference(recipe, e.run)}
                others = [e for e in members if not is_reference(recipe, e.run) and e.labels["seed"] in reference]
                for (preset, precision), same in by_labels(others, "preset", "precision").items():
                    found = [
                        divergence_between(reference[e.labels["seed"]].studies()[task], e.studies()[task]) for e in same
                    ]
                    labels = {"model": f"{family} {size}", "family": family, "fine-tuning": f"{preset} {precision}"}
                    rows.append(labels | _figures(found))
            if not rows:
                continue
            against = " ".join(map(str, recipe.get("reference").values()))
            parts = _parts(f"divergence_{dataset}_{task}", rows, "fine-tuning", recipe, f"from {against}")
            parts.append(_families(dataset, task, rows))
            sections.append(Section(f"{dataset}, {task}", parts))
    return Report("Fine-tuning in mixed precision: divergence", sections)


def _figures(found: list[Divergence]) -> Row:
    """Means over seeds; the values of single seeds beside them."""
    mean = mean_of([each.mean for each in found])
    return {
        "divergence": mean,
        "std over shots": mean_of([Estimate(each.std.value, float("nan")) for each in found]),
        "spikes": float(np.mean([each.spikes.value for each in found])),
        "flips (%)": mean_of([each.flips for each in found if each.flips is not None]) if found[0].flips else None,
        "log-likelihood (nats)": mean_of([e.change for e in found if e.change is not None])
        if found[0].change
        else None,
        "seeds": [each.mean.value for each in found],
    }


def _mean_known(estimates: list[Estimate | None]) -> Estimate | None:
    known = [each for each in estimates if each is not None]
    return mean_of(known) if known else None


def _parts(name: str, rows: list[Row], series: str, recipe: Recipe, against: str) -> list[Any]:
    several = len(recipe.seeds) > 1
    drawn = []
    for row in rows:
        mean: Estimate = row["divergence"]
        ends = (mean.value - mean.stderr, mean.value + mean.stderr)
        spread = ends if several and mean.interval is None else mean.interval
        drawn.append(
            {"model": row["model"], series: row[series], "seeds": row["seeds"]}
            | columns("divergence", Estimate(mean.value, mean.stderr, spread))
        )
    errors = "Error bars: standard deviation over seeds; dots: single seeds." if several else f"{DOCUMENTS} {_BIAS}"
    figure = Figure(
        name=name,
        caption=f"Mean divergence {against} over shots, in percentage points; above the line a single shot count would "
        f"be a large deviation spike. {errors}",
        rows=drawn,
        draw=lambda canvas, data: bars(
            canvas,
            data,
            group="model",
            series=series,
            value="divergence",
            label="mean divergence (points)",
            line=1.0,
            line_label="spike",
            points="seeds",
        ),
    )
    shown = [{key: value for key, value in row.items() if key not in ("seeds", "family")} for row in rows]
    return [figure, Table(f"Divergence {against} (points). {over_seeds(recipe)}", shown)]


def _families(dataset: str, task: str, rows: list[Row]) -> Table:
    theirs = {
        (row["finetuning"].lower(), row["benchmark"].lower(), row["family"]): row
        for row in published("divergence_finetuned")
    }
    found = []
    for family in dict.fromkeys(row["family"] for row in rows):
        values = np.array([row["divergence"].value for row in rows if row["family"] == family])
        row: Row = {
            "family": family,
            "configurations": len(values),
            "spikes": sum(row["spikes"] for row in rows if row["family"] == family),
            "mean divergence": float(values.mean()),
            "std over configurations": float(values.std(ddof=1)) if len(values) > 1 else None,
        }
        printed = theirs.get((dataset.lower(), task.partition("_")[0].lower(), family), {})
        names = {"mean divergence": "mean_divergence", "std": "std_divergence", "spikes": "spikes"}
        row |= {f"published {name}": float(printed[key]) if printed else None for name, key in names.items()}
        found.append(row)
    return Table("By family, over models and configurations.", found)
