"""`mamba-study plan`: every run of a recipe, and what it is likely to cost."""

from __future__ import annotations

import math
from pathlib import Path

import click


@click.command("plan")
@click.argument("recipe")
@click.option("--seeds", type=click.IntRange(min=1), help="How many seeds, in place of what the recipe says.")
@click.option(
    "--on",
    "device",
    type=click.Choice(["H200", "CPU"]),
    help="For which device to estimate. [default: CPU for the embedded models, else H200]",
)
def plan_command(recipe: str, seeds: int | None, device: str | None) -> None:
    """Every run of RECIPE with an estimate of its cost; nothing is begun.

    RECIPE is the name of one that comes along, a YAML file, or the directory of a study.
    """
    from rich.console import Console
    from rich.table import Table

    from ..studies import cost
    from ..studies.models import EMBEDDED
    from ..studies.pins import Pins
    from ..studies.progress import duration
    from ..studies.recipe import Recipe, builtin_names
    from ..studies.store import Study, planned
    from .errors import explained

    with explained():
        if Path(recipe).is_dir() and recipe not in builtin_names():
            study = Study.open(Path(recipe))
            asked, runs, pinned = study.recipe, study.runs, True
        else:
            asked = Recipe.load(recipe, seeds)
            pins = Pins()
            runs = planned(asked, pins)
            pinned = pins.complete
    device = device or ("CPU" if all(model.source in EMBEDDED for model in asked.models) else "H200")
    table = Table("", "run", title=f"{asked.kind}: {asked.about}", title_justify="left")
    for column in ("tokens", f"on one {device}"):
        table.add_column(column, justify="right")
    costs = [cost.estimate(run, device) for run in runs]
    for run, each in zip(runs, costs, strict=True):
        # Without the hub's commits the hash is not that of the run.
        table.add_row(run.id[:8] if pinned else "", run.name, _count(each.tokens), duration(each.seconds))
    console = Console()
    console.print(table)
    known = [each for each in costs if not math.isnan(each.seconds)]
    total = f"{len(runs)} runs, {_count(sum(each.tokens for each in known))} tokens, "
    total += f"{duration(sum(each.seconds for each in known))} on one {device}"
    if len(known) < len(costs):
        total += f" beside {len(costs) - len(known)} runs of a size that nothing tells"
    console.print(total, highlight=False, soft_wrap=True)
    console.print(cost.BASIS.format(device=device) + ".", highlight=False, soft_wrap=True)


def _count(tokens: float) -> str:
    if math.isnan(tokens):
        return "?"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.0f}"
