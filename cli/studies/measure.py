"""Measures a model's stability for a study: `peft_mamba.stability.analyse` on a text that the recipe names."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .runs import Run


def measure_stability(run: Run, device: str | None) -> tuple[dict[str, Any], str]:
    """Exponents of all layers and the growth of a perturbation, as JSON values, and the device that did it."""
    from peft_mamba.adapter_io import SavedAdapter
    from peft_mamba.checkpoints import AutoMambaForCausalLM, describe
    from peft_mamba.stability import analyse

    from ..stability import finite, token_ids, torch_device
    from .execute import device_name

    settings, free = run.settings, run.free
    where = torch_device(device)
    text = None if settings["text"] == "embedded" else _text(settings["text"], free, settings["tokens"])
    ids = token_ids(free["model"], free["revision"], text, settings["tokens"])
    loaded: Any = AutoMambaForCausalLM.from_pretrained(free["model"], revision=free["revision"], device_map={"": where})
    if free["peft"]:
        loaded = SavedAdapter.read(free["peft"]).apply(loaded)
    found = analyse(loaded, ids, epsilon=settings["epsilon"], precisions=settings["precisions"], seed=settings["seed"])
    unit = "heads" if describe(loaded)["family"] == "mamba2" else "channels"
    result = {
        "model": describe(loaded),
        "unit": unit,
        "tokens": found.tokens,
        "epsilon": found.epsilon,
        "layers": [asdict(layer) for layer in found.layers],
        "growth": [asdict(growth) for growth in found.growth],
    }
    return finite(result), device_name(where)


def _text(source: str | dict[str, Any], free: dict[str, Any], tokens: int) -> str:
    """A file's text, or the rows of a hub data set's column until there are surely enough."""
    if isinstance(source, str):
        return Path(free["text"]).read_text(encoding="utf-8")
    from datasets import load_dataset

    rows = load_dataset(
        source["dataset"],
        source.get("name"),
        split=source.get("split", "test"),
        revision=free["text_revision"],
        streaming=True,
    )
    parts: list[str] = []
    length, enough = 0, 16 * tokens  # characters; a token of English has about 4
    for row in rows:
        parts.append(row[source["column"]])
        length += len(parts[-1])
        if length > enough:
            break
    return "\n\n".join(parts)


def worst(growth: dict[str, Any]) -> list[float]:
    """Per time the largest deviation of a layer's state; not a number where one layer's is not."""
    columns = zip(*growth["states"].values(), strict=True)
    return [math.nan if any(value is None for value in column) else max(column) for column in columns]
