"""The report on stability: exponents by layer, and the growth of a small error by precision."""

from __future__ import annotations

import math

import numpy as np

from ..measure import worst
from ..recipe import Recipe
from ..results import Finished, by_labels, of_action
from .charts import bands, growth
from .common import model_of
from .document import Figure, Report, Row, Section, Table


def report(recipe: Recipe, finished: list[Finished]) -> Report:
    """Exponents do not depend on the seed, which is the direction of the error; its growth does."""
    measured = of_action(finished, "stability")
    first = {model_of(each): each for each in reversed(measured)}
    layers = [row for model in reversed(first) for row in _layers(model, first[model])]
    by_model = by_labels(measured, "family", "size").items()
    grown = [row for (family, size), same in by_model for row in _growth(f"{family} {size}".strip(), same)]
    sections = []
    if layers:
        width = max(7.0, 2.6 * len(first))
        exponents = Table("λ in nats per token, over all layers.", _summary(layers))
        deviations = Table(
            "Relative deviation after all tokens; ± is the standard deviation over "
            f"{len(recipe.seeds)} directions of the error.",
            _last(grown),
        )
        sections = [
            Section("Lyapunov exponents", [_exponents(layers, width), exponents]),
            Section("Growth of a small error", [_grown(recipe, grown, width), deviations]),
        ]
    return Report("Stability of the recurrence", sections)


def _layers(model: str, finished: Finished) -> list[Row]:
    return [
        {
            "model": model,
            "layer": i,
            "units": layer["units"],
            "smallest": -layer["maximal"],
            "low": -layer["quantiles"][2],
            "median": -layer["quantiles"][1],
            "high": -layer["quantiles"][0],
            "largest": -layer["minimal"],
            "near_zero": layer["near_zero"],
        }
        for i, layer in enumerate(finished.result["layers"])
    ]


def _exponents(rows: list[Row], width: float) -> Figure:
    return Figure(
        name="exponents",
        caption="How fast a deviation of the state dies out, |λ| in nats per token, over the channels (Mamba) or heads "
        "(Mamba-2) of each layer, computed in fp32 on the text; the slowest is the maximal exponent. λ is never "
        "positive. The bands are a distribution, not an error.",
        rows=rows,
        draw=lambda canvas, data: bands(
            canvas, data, panel="model", x="layer", label="|λ| (nats per token)", x_label="layer"
        ),
        size=(width, 3.4),
    )


def _summary(rows: list[Row]) -> list[Row]:
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        units = [row["units"] for row in mine]
        near_zero = float(np.average([row["near_zero"] for row in mine], weights=units))
        found.append(
            {
                "model": model,
                "layers": len(mine),
                "λ_max": -min(row["smallest"] for row in mine),
                "median of layers' medians": -float(np.median([row["median"] for row in mine])),
                "λ_min": -max(row["largest"] for row in mine),
                "keep more than 1/e over the text (%)": 100 * near_zero,
                "positive": sum(row["smallest"] < 0 for row in mine),
            }
        )
    return found


def _growth(model: str, same: list[Finished]) -> list[Row]:
    rows = []
    for i, first in enumerate(same[0].result["growth"]):
        for of in ("state", "output"):
            runs = [each.result["growth"][i] for each in same]
            series = np.array(
                [worst(run) if of == "state" else [math.nan if x is None else x for x in run["output"]] for run in runs]
            )
            for time, values in zip(first["times"], series.T, strict=True):
                several = len(values) > 1
                rows.append(
                    {
                        "model": model,
                        "precision": first["precision"],
                        "of": of,
                        "tokens": time,
                        "deviation": float(values.mean()),
                        "deviation_low": float(values.min()) if several else None,
                        "deviation_high": float(values.max()) if several else None,
                        "deviation_std": float(values.std(ddof=1)) if several else None,
                    }
                )
    return rows


def _numbers(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _grown(recipe: Recipe, rows: list[Row], width: float) -> Figure:
    seeds = len(recipe.seeds)
    errors = f"Bands: smallest to largest of {seeds} directions." if seeds > 1 else "One direction: no spread is known."
    return Figure(
        name="growth",
        caption="Relative deviation of the states (the largest of all layers) and of the logits, the first token's "
        f"embedding off by {recipe.get('epsilon'):g} of its length. In half precision rounding is a part of it. "
        f"{errors}",
        rows=rows,
        draw=lambda canvas, data: growth(canvas, data, panel="model", label="relative deviation"),
        size=(width, 3.8),
    )


def _last(rows: list[Row]) -> list[Row]:
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        labels = {"model": row["model"], "precision": row["precision"]}
        cell = found.setdefault((row["model"], row["precision"]), labels)
        spread = "" if row["deviation_std"] is None else f" ± {row['deviation_std']:.1e}"
        cell[row["of"]] = f"{row['deviation']:.2e}{spread}"  # the last time wins
    return list(found.values())
