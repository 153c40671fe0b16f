"""How much hyperparameters matter: configurations drawn from a grid, fine-tuned and scored."""

from __future__ import annotations

import random

from ..build import tuned_runs
from ..pins import Pins
from ..recipe import Key, Recipe, number
from ..report.robustness import report
from ..runs import Run
from .kind import FINETUNE, Kind, scoring_keys


def plan(recipe: Recipe, pins: Pins) -> list[Run]:
    """The same draw for each model: `sample` of the grid's combinations without repetition, or all."""
    runs: list[Run] = []
    for model in recipe.models:
        configurations = recipe.configurations(model)
        sample = recipe.get("sample") or len(configurations)
        if sample > len(configurations):
            raise recipe.error(
                "sample", f"the grid has {len(configurations)} combinations, so {sample} cannot be drawn."
            )
        rng = random.Random(recipe.get("sample_seed"))
        drawn = rng.sample(configurations, sample)
        for seed in recipe.seeds:
            runs += tuned_runs(recipe, model, drawn, seed, pins)
    return runs


KIND = Kind(
    name="robustness",
    about="spread of accuracy over learning rate, r and warm-up",
    keys=scoring_keys()
    | {
        "finetune": Key(FINETUNE.read, required=True),
        "num_fewshot": Key(number(0)),
        "sample": Key(number(1)),
        "sample_seed": Key(number(0), 0),
    },
    plan=plan,
    report=report,
)
