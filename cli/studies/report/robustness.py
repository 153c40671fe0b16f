"""The report on robustness: a bubble a configuration, and the spread from the worst to the best."""

from __future__ import annotations

import numpy as np

from lm_eval_mamba.bootstrap import bootstrap
from lm_eval_mamba.compare import scores
from lm_eval_mamba.families import mean_of
from lm_eval_mamba.results import Study
from lm_eval_mamba.statistics import Estimate, bootstrapped

from ..recipe import Recipe
from ..results import Finished, by_labels, of_action
from .charts import bubbles
from .common import DOCUMENTS, over_seeds
from .document import Figure, Report, Row, Section, Table, columns

_PUBLISHED = "Published, MMLU at 5 shots over 150 configurations: Mamba 370M 23.3 to 24.8, Pythia 410M 22.9 to 27.6."
_AXES = ("learning_rate", "r", "warmup_steps")


def report(recipe: Recipe, finished: list[Finished]) -> Report:
    """A section a task."""
    scored = of_action(finished, "score")
    tasks = dict.fromkeys(name for each in scored for name in each.studies())
    return Report("Robustness to hyperparameters", [_section(recipe, task, scored) for task in tasks])


def _section(recipe: Recipe, task: str, scored: list[Finished]) -> Section:
    rows: list[Row] = []
    for (family, size, *_), members in by_labels(scored, "family", "size", *_AXES).items():
        settings = members[0].run.needs.settings if members[0].run.needs else {}
        found = [accuracy(each.studies()[task]) for each in members]
        row: Row = {"model": f"{family} {size}"} | {name: settings[name] for name in _AXES}
        rows.append(row | columns("accuracy", _interval(mean_of(found), len(found))))
    errors = "Error bars: standard deviation over seeds." if len(recipe.seeds) > 1 else DOCUMENTS
    figure = Figure(
        name=f"robustness_{task}",
        caption=f"Accuracy on {task} of fine-tunings with drawn hyperparameters. {errors}",
        rows=rows,
        draw=lambda canvas, data: bubbles(
            canvas,
            data,
            panel="model",
            x="learning_rate",
            value="accuracy",
            size="r",
            hue="warmup_steps",
            label="accuracy (%)",
            x_label="learning rate",
        ),
        size=(7.0, 4.2),
    )
    spread = []
    for model in dict.fromkeys(row["model"] for row in rows):
        values = np.array([row["accuracy"] for row in rows if row["model"] == model])
        spread.append(
            {
                "model": model,
                "configurations": len(values),
                "min": float(values.min()),
                "max": float(values.max()),
                "max - min": float(np.ptp(values)),
                "std": float(values.std(ddof=1)) if len(values) > 1 else None,
            }
        )
    said = _PUBLISHED if task == "mmlu" else ""
    caption = f"Spread over configurations, accuracy in %. {over_seeds(recipe)} {said}"
    return Section(task, [figure, Table(caption, spread)])


def accuracy(study: Study) -> Estimate:
    """Percent, over all benchmarks and shots of a study, weighted as its group weighs them; bootstrapped."""
    correct = scores(study)
    strata = [np.stack(list(by_shots.values()), axis=1) for by_shots in correct.values()]
    weights = np.array([len(each) if study.weight_by_size else 1.0 for each in strata])
    weights = weights / weights.sum()
    value, drawn = bootstrap(
        strata, lambda means: 100 * np.einsum("...sc,s->...c", means, weights).mean(axis=-1, keepdims=True)
    )
    return bootstrapped(value[0], drawn[:, 0], all(len(each) > 1 for each in strata))


def _interval(estimate: Estimate, seeds: int) -> Estimate:
    if seeds == 1:
        return estimate
    value, spread = estimate.value, estimate.stderr
    return Estimate(value, spread, (value - spread, value + spread))
