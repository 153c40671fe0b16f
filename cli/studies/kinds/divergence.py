"""What half precision changes in inference: each model in several precisions at once."""

from __future__ import annotations

from ..build import score_runs
from ..pins import Pins, is_divergence
from ..recipe import PRECISIONS, Key, Recipe, choices
from ..report.divergence import report
from ..runs import Run
from .kind import PRECISION_LIST, Kind, scoring_keys


def plan(recipe: Recipe, pins: Pins) -> list[Run]:
    """Each model with each draw of examples."""
    (reference,) = recipe.get("reference")
    for task in recipe.get("tasks"):
        if not is_divergence(task):
            raise recipe.error(
                "tasks", f"{task} is scored in one precision; give a divergence group, such as mmlu_divergence."
            )
    if set(recipe.get("precisions")) == {reference}:
        raise recipe.error("precisions", f"nothing to compare with {reference}; give another precision.")
    return [
        run
        for model in recipe.models
        for seed in recipe.seeds
        for run in score_runs(recipe, model, pins, precisions=recipe.get("precisions"), reference=reference, seed=seed)
    ]


KIND = Kind(
    name="divergence",
    about="what fp16 and bf16 change against fp32 in inference",
    keys=scoring_keys("mmlu_divergence")
    | {"precisions": Key(PRECISION_LIST, ["fp16", "bf16"]), "reference": Key(choices(PRECISIONS), ["fp32"])},
    plan=plan,
    report=report,
)
