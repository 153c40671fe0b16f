"""The report on throughput: ATPS and MMPT by configuration, and what each saves against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np

from lm_eval_mamba.statistics import Estimate

from ..recipe import Recipe
from ..results import Finished, by_labels, of_action
from .charts import bars
from .common import over_seeds
from .document import Figure, Report, Row, Section, Table, columns

_PUBLISHED = (
    "Published, against full fp32 on a 24 GB A10G: Mamba 790M 2.15x tokens per second, 62.7% less memory per token on "
    "average and 65.5% at best; over all sizes 1.74x and 47.2%."
)


def report(recipe: Recipe, finished: list[Finished]) -> Report:
    """One section a device: figures of different devices are not comparable."""
    sections = []
    tuned = of_action(finished, "finetune")
    for device in dict.fromkeys(each.record["device"] for each in tuned):
        sections.append(_section(recipe, device, [each for each in tuned if each.record["device"] == device]))
    return Report("Throughput and memory of fine-tuning", sections)


def _section(recipe: Recipe, device: str, tuned: list[Finished]) -> Section:
    rows = _rows(recipe, tuned)
    errors = (
        "Error bars: smallest to largest of the repetitions, which are the dots."
        if len(recipe.seeds) > 1
        else "One repetition: no error bars (mamba-study run --seeds 3)."
    )
    parts: list[Any] = []
    for name, label, caption in (
        ("ATPS", "tokens per second", "ATPS: tokens trained on per second of training."),
        ("MMPT", "bytes per token", "MMPT: peak memory over the tokens of a mini-batch."),
    ):
        file = f"{name.lower()}_{''.join(c if c.isalnum() else '_' for c in device)}"
        parts.append(_figure(file, name, label, f"{caption} {errors}", rows))
    shown = [{key: value for key, value in row.items() if not key.endswith(" of seeds")} for row in rows]
    memory = "" if "cpu" not in device else " On a CPU the peak is the process' resident memory, torch itself included."
    parts.append(Table(f"Against the reference of the same model. {over_seeds(recipe)}{memory} {_PUBLISHED}", shown))
    return Section(device, parts)


def _figure(file: str, name: str, label: str, caption: str, rows: list[Row]) -> Figure:
    drawn = [
        {key: row[key] for key in ("model", "fine-tuning")}
        | columns(name, Estimate(row[name].value, row[name].stderr, _range(row[f"{name} of seeds"])))
        | {"seeds": row[f"{name} of seeds"]}
        for row in rows
    ]
    return Figure(
        name=file,
        caption=caption,
        rows=drawn,
        draw=lambda canvas, data: bars(
            canvas, data, group="model", series="fine-tuning", value=name, label=label, points="seeds"
        ),
    )


def _range(values: list[float]) -> tuple[float, float] | None:
    return (min(values), max(values)) if len(values) > 1 else None


def _rows(recipe: Recipe, tuned: list[Finished]) -> list[Row]:
    from ..kinds.finetune_divergence import is_reference

    rows: list[Row] = []
    several = len({each.labels["dataset"] for each in tuned}) > 1
    for (family, size, dataset), members in by_labels(tuned, "family", "size", "dataset").items():
        reference = [each for each in members if is_reference(recipe, each.run)]
        base = {name: _mean(reference, name) if reference else None for name in ("atps", "mmpt_bytes")}
        for (preset, precision), same in by_labels(members, "preset", "precision").items():
            speed, memory = _mean(same, "atps"), _mean(same, "mmpt_bytes")
            rows.append(
                {
                    "model": f"{family} {size}" + (f", {dataset}" if several else ""),
                    "fine-tuning": f"{preset} {precision}",
                    "ATPS": speed,
                    "speed": speed.value / base["atps"].value if base["atps"] else None,
                    "MMPT": memory,
                    "memory (%)": 100 * (memory.value / base["mmpt_bytes"].value - 1) if base["mmpt_bytes"] else None,
                    "batch": same[0].result["settings"]["batch_size"],
                    "ATPS of seeds": [each.result["atps"] for each in same],
                    "MMPT of seeds": [each.result["mmpt_bytes"] for each in same],
                }
            )
    return rows


def _mean(members: list[Finished], name: str) -> Estimate:
    values = np.array([each.result[name] for each in members], dtype=float)
    return Estimate(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan"))
