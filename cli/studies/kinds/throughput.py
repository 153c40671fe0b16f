"""How fast fine-tuning is and how much memory it takes; each run in a process of its own, seeds are repetitions."""

from __future__ import annotations

from ..build import finetune_run
from ..pins import Pins
from ..recipe import Key, Recipe
from ..report.throughput import report
from ..runs import Run
from .finetune_divergence import REFERENCE, check_reference
from .kind import FINETUNE, Kind


def plan(recipe: Recipe, pins: Pins) -> list[Run]:
    """Each model with each configuration, as often as there are seeds."""
    runs: list[Run] = []
    for model in recipe.models:
        for seed in recipe.seeds:
            tuned = [
                finetune_run(recipe, model, options, seed, pins, isolated=True)
                for options in recipe.configurations(model)
            ]
            check_reference(recipe, model, tuned)
            runs += tuned
    return runs


KIND = Kind(
    name="throughput",
    about="tokens per second (ATPS) and memory per token (MMPT) of fine-tuning",
    keys={"finetune": Key(FINETUNE.read, required=True), "reference": REFERENCE},
    plan=plan,
    report=report,
)
