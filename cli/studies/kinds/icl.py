"""What shots bring: every model, pretrained and fine-tuned, on a group with AIPSS."""

from __future__ import annotations

from ..build import score_runs, tuned_runs
from ..pins import Pins
from ..recipe import Key, Recipe, flag
from ..report.icl import report
from ..runs import Run
from .kind import FINETUNE, PRECISION_LIST, Kind, scoring_keys


def plan(recipe: Recipe, pins: Pins) -> list[Run]:
    """Each model in each precision and with each draw of examples; then each of its fine-tunings, in their own."""
    runs: list[Run] = []
    if not recipe.get("pretrained") and recipe.finetune is None:
        raise recipe.error("pretrained", "pretrained: false leaves nothing to do without finetune.")
    for model in recipe.models:
        for seed in recipe.seeds:
            if recipe.get("pretrained"):
                for precision in recipe.get("precisions"):
                    runs += score_runs(recipe, model, pins, precisions=[precision], reference=precision, seed=seed)
            if recipe.finetune is not None:
                runs += tuned_runs(recipe, model, recipe.configurations(model), seed, pins)
    return runs


KIND = Kind(
    name="icl",
    about="improvement by shots and AIPSS, by family and size",
    keys=scoring_keys("icl_gap")
    | {"precisions": Key(PRECISION_LIST, ["bf16"]), "pretrained": Key(flag, True), "finetune": FINETUNE},
    plan=plan,
    report=report,
)
