"""The report on what shots bring: AIPSS curves by family and size class, tables by model, ratios of families."""

from __future__ import annotations

from typing import Any

import numpy as np

from lm_eval_mamba.compare import scores
from lm_eval_mamba.families import aipss_ratio, family_gap, mean_of
from lm_eval_mamba.results import Study

from ..models import published_models
from ..recipe import Recipe
from ..results import Finished, by_labels, of_action, ordered
from .charts import curves
from .common import DOCUMENTS, model_of, over_seeds, published, tuning_of
from .document import Figure, Report, Row, Section, Table, columns

SMALL = 460e6  # the papers' two classes of size: up to 450M, and above


def report(recipe: Recipe, finished: list[Finished]) -> Report:
    """Of all scored models whose group has an AIPSS."""
    scored = [each for each in of_action(finished, "score") if _study(each) is not None]
    sections = []
    for tuning in ordered(map(tuning_of, scored), ["pretrained"]):
        mine = [each for each in scored if tuning_of(each) == tuning]
        for precision in dict.fromkeys(each.precisions[0] for each in mine):
            part = [each for each in mine if each.precisions[0] == precision]
            sections.append(_section(recipe, f"{tuning}, scored in {precision}", part))
    return Report("In-context learning: what shots bring", sections)


def _section(recipe: Recipe, title: str, scored: list[Finished]) -> Section:
    curve = _curve(scored)
    name = "aipss_" + "".join(c if c.isalnum() else "_" for c in title)
    figure = Figure(
        name=name,
        caption=f"Improvement over 0-shot by shots, mean over benchmarks and the models of a family. {DOCUMENTS}",
        rows=curve,
        draw=lambda canvas, rows: curves(
            canvas,
            rows,
            panel="size class",
            series="family",
            x="shots",
            value="improvement",
            label="improvement over 0-shot (%)",
            x_label="shots",
        ),
    )
    parts: list[Any] = [
        figure,
        Table(f"Improvement over 0-shot (%) and AIPSS. {over_seeds(recipe)}", _by_model(scored)),
    ]
    ratios = _ratios(scored)
    if ratios:
        parts.append(
            Table(
                "AIPSS of one family over that of another (%), over models and shots. Published: Mamba over Pythia "
                "38 pretrained, 81.5 instruction-tuned; Mamba-2 over Pythia 82 and 132.",
                ratios,
            )
        )
    parts.append(
        Table(
            "Accuracies (%) by shots; published ones (pretrained) below those of the same model.", _accuracies(scored)
        )
    )
    return Section(title, parts)


def _study(finished: Finished) -> Study | None:
    return next((study for study in finished.studies().values() if study.icl), None)


def _correct(finished: Finished) -> Any:
    study = _study(finished)
    assert study is not None
    return scores(study)


def _by_family(scored: list[Finished]) -> dict[tuple[str, str], list[Finished]]:
    found: dict[tuple[str, str], list[Finished]] = {}
    for each in scored:
        small = (each.run.parameters or _parameters(each)) <= SMALL
        found.setdefault((each.labels["family"], "up to 450M" if small else "above 450M"), []).append(each)
    return found


def _parameters(finished: Finished) -> float:
    of_label = {model.label: model.parameters or 0 for model in published_models()}
    return of_label.get(model_of(finished), finished.result.get("model_num_parameters") or 0)


def _curve(scored: list[Finished]) -> list[Row]:
    rows = []
    for (family, size), members in _by_family(scored).items():
        gap = family_gap([_correct(each) for each in members])
        for shots, estimate in gap.improvement.items():
            rows.append(
                {"family": family, "size class": size, "shots": shots, "models": len({model_of(m) for m in members})}
                | columns("improvement", estimate)
            )
    return rows


def _by_model(scored: list[Finished]) -> list[Row]:
    rows = []
    theirs = _published_rows()
    for (family, size), members in by_labels(scored, "family", "size").items():
        gaps = [family_gap([_correct(each)]) for each in members]
        shots = list(gaps[0].improvement)
        row: Row = {"model": f"{family} {size}"}
        row |= {f"{k} shot{'s' * (k > 1)}": mean_of([gap.improvement[k] for gap in gaps]) for k in shots}
        row["AIPSS"] = mean_of([gap.aipss for gap in gaps])
        if tuning_of(members[0]) == "pretrained":
            rows_of = [theirs[key] for k in shots if (key := (family, size, str(k))) in theirs]
            printed = [float(each["mean_improvement_pct"]) for each in rows_of]
            row["AIPSS, published"] = float(np.mean(printed)) if printed else None
        rows.append(row)
    return rows


def _beside(members: list[Finished], shots: int) -> Row:
    """Accuracy (%) and perplexity of the tasks that are shown beside the mean, LAMBADA in the papers."""
    found: Row = {}
    for task, of_runs in _perplexed(members).items():
        if task.endswith(f"_{shots}shot"):
            name = task.removesuffix(f"_{shots}shot").rpartition("gap_")[2].removeprefix("mini_")
            found[f"{name} acc"] = 100 * float(np.mean([each["acc,none"] for each in of_runs]))
            found[f"{name} ppl"] = float(np.mean([each["perplexity,none"] for each in of_runs]))
    return found


def _perplexed(members: list[Finished]) -> dict[str, list[dict[str, float]]]:
    """Task with a perplexity to its results in each run."""
    found: dict[str, list[dict[str, float]]] = {}
    for each in members:
        for task, figures in each.tasks.items():
            if "perplexity,none" in figures:
                found.setdefault(task, []).append(figures)
    return found


def _published_rows() -> dict[tuple[str, str, str], dict[str, str]]:
    """Family, size and shots to the row that the papers print."""
    return {(row["family"], row["size"], row["num_fewshot"]): row for row in published("icl_pretrained")}


def _ratios(scored: list[Finished]) -> list[Row]:
    grouped = by_labels(scored, "family").items()
    families = {family: [_correct(each) for each in members] for (family,), members in grouped}
    bases = [name for name in families if name not in ("Mamba", "Mamba-2")] or ["Mamba"]
    return [
        {"family": family, "over": base, "ratio (%)": aipss_ratio(models, families[base])}
        for base in bases
        if base in families
        for family, models in families.items()
        if family != base and (family in ("Mamba", "Mamba-2") or base == "Mamba")
    ]


def _accuracies(scored: list[Finished]) -> list[Row]:
    rows: list[Row] = []
    theirs = _published_rows()
    for (family, size), members in by_labels(scored, "family", "size").items():
        correct = [_correct(each) for each in members]
        for shots in next(iter(correct[0].values())):
            row: Row = {"model": f"{family} {size}", "shots": shots}
            for benchmark in correct[0]:
                row[benchmark] = float(np.mean([100 * np.mean(each[benchmark][shots]) for each in correct]))
            row |= _beside(members, shots)
            rows.append(row)
            printed = theirs.get((family, size, str(shots)))
            if printed and tuning_of(members[0]) == "pretrained":
                own = {name: printed.get(f"{name}_acc") for name in correct[0]}
                own |= {name: printed["lambada_" + name.rpartition(" ")[2]] for name in _beside(members, shots)}
                values = {name: float(value) if value else None for name, value in own.items()}
                rows.append({"model": "published", "shots": shots} | values)
    return rows
