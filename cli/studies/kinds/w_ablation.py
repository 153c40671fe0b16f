"""What adapting W alone is worth, the layer of Δ, B and C, against the other layers and against all."""

from __future__ import annotations

from ..build import tuned_runs
from ..pins import Pins
from ..recipe import Key, Recipe, number
from ..report.w_ablation import report
from ..runs import Run
from .kind import FINETUNE, Kind, scoring_keys


def plan(recipe: Recipe, pins: Pins) -> list[Run]:
    """Each model with each configuration and seed, fine-tuned and scored."""
    runs: list[Run] = []
    for model in recipe.models:
        for seed in recipe.seeds:
            scored = tuned_runs(recipe, model, recipe.configurations(model), seed, pins)
            if "w" not in {run.labels["preset"] for run in scored}:
                raise recipe.error(
                    "finetune", "an ablation of W needs the preset w, and not-w or all to hold it against."
                )
            runs += scored
    return runs


KIND = Kind(
    name="w-ablation",
    about="LoRA on W alone against all other layers, and against all",
    keys=scoring_keys() | {"finetune": Key(FINETUNE.read, required=True), "num_fewshot": Key(number(0))},
    plan=plan,
    report=report,
)
