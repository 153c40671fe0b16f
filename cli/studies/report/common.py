"""What several reports say alike: labels of runs, published tables, and how errors are to be read."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from importlib import resources

from ..recipe import Recipe
from ..results import Finished
from .document import Row

DOCUMENTS = (
    "Intervals are 95%, from a paired bootstrap over documents: the same resampled documents for all runs that are "
    "compared, drawn within each benchmark."
)


def published(name: str) -> list[dict[str, str]]:
    """A table of the papers, arXiv 2406.00209."""
    text = (resources.files("lm_eval_mamba") / "published" / f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def model_of(finished: Finished) -> str:
    """Family and size."""
    return finished.label("family", "size")


def tuning_of(finished: Finished) -> str:
    """What it was fine-tuned on and how; `pretrained` if it was not."""
    if finished.run.action == "score" and finished.run.needs is None:
        return "pretrained"
    return finished.label("dataset", "preset", "precision")


def over_seeds(recipe: Recipe) -> str:
    """What the dots and ± of a report stand for."""
    if len(recipe.seeds) == 1:
        return "One seed: nothing here tells the spread over seeds (mamba-study run --seeds 5)."
    return f"{len(recipe.seeds)} seeds: figures are means over seeds, ± is the standard deviation over them."


def with_labels(rows: Iterable[Row], **labels: object) -> list[Row]:
    """Rows with these columns before their own."""
    return [labels | row for row in rows]
