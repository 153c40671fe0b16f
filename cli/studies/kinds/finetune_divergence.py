"""How far fine-tunings of one model are from the reference among them, each scored in its own precision."""

from __future__ import annotations

from typing import Any

from ..build import tuned_runs
from ..models import Model
from ..pins import Pins
from ..recipe import Key, Recipe, scalars
from ..report.divergence import report_finetuned
from ..runs import Run
from .kind import FINETUNE, Kind, scoring_keys

FULL_FP32 = {"preset": "full", "precision": "fp32"}
REFERENCE = Key(scalars(("preset", "precision", "r", "learning_rate")), FULL_FP32)


def plan(recipe: Recipe, pins: Pins) -> list[Run]:
    """Each model with each configuration and seed, fine-tuned and scored."""
    runs: list[Run] = []
    for model in recipe.models:
        for seed in recipe.seeds:
            scored = tuned_runs(recipe, model, recipe.configurations(model), seed, pins)
            check_reference(recipe, model, list({run.needs.id: run.needs for run in scored if run.needs}.values()))
            runs += scored
    return runs


def is_reference(recipe: Recipe, run: Run) -> bool:
    """Whether a fine-tuning is the one that others are held against."""
    reference: dict[str, Any] = recipe.get("reference")
    settings = (run.needs or run).settings
    return all(settings[name] == value for name, value in reference.items())


def check_reference(recipe: Recipe, model: Model, tuned: list[Run]) -> None:
    """Raises RecipeError unless each data set has one reference among the fine-tunings of a model."""
    for dataset in dict.fromkeys(run.settings["dataset_pin"] + run.labels["dataset"] for run in tuned):
        same = [run for run in tuned if run.settings["dataset_pin"] + run.labels["dataset"] == dataset]
        count = sum(is_reference(recipe, run) for run in same)
        if count != 1:
            raise recipe.error(
                "reference" if "reference" in recipe.places else "finetune",
                f"{count} of the {len(same)} configurations of {model.label} on {same[0].labels['dataset']} are the "
                f"reference {recipe.get('reference')}; expected 1.",
            )


KIND = Kind(
    name="finetune-divergence",
    about="{full, LoRA} x precision, each against full fp32",
    keys=scoring_keys("mmlu_divergence", "winogrande_divergence")
    | {"finetune": Key(FINETUNE.read, required=True), "reference": REFERENCE},
    plan=plan,
    report=report_finetuned,
)
