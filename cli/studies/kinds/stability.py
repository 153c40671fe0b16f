"""How stable recurrences are: exponents of every layer, and the growth of a small error in each precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..build import facts
from ..located import Located
from ..models import local_path, resolved_path
from ..pins import Pins
from ..recipe import PRECISIONS, Key, Recipe, number, scalars
from ..report.stability import report
from ..runs import Run
from .kind import PRECISION_LIST, Kind


def read_text(entry: Located, base: Path) -> str | dict[str, Any]:
    """`embedded`, a file, or a hub data set with the column that has the text."""
    if entry.is_mapping:
        found = scalars(("dataset", "name", "split", "column", "revision"))(entry, base)
        if missing := [name for name in ("dataset", "column") if name not in found]:
            raise entry.error(f"a text from a data set needs {' and '.join(missing)}.")
        return found
    text = str(entry.value)
    if text != "embedded" and not local_path(text):
        raise entry.error(f"text is embedded, a file (./book.txt), or {{dataset: …, column: …}}, not {text!r}.")
    return resolved_path(entry, text, base)


def plan(recipe: Recipe, pins: Pins) -> list[Run]:
    """Each model with each direction of the error."""
    runs = []
    text: Any = recipe.get("text")
    hub = isinstance(text, dict)
    source, revision = (text["dataset"], text.get("revision")) if hub else (text, None)
    for model in recipe.models:
        family = facts(model).family
        if family not in ("mamba", "mamba2"):
            raise model.error(f"{model.label} is a {family}; only the recurrences of Mamba and Mamba-2 have exponents.")
        for seed in recipe.seeds:
            settings = {
                "model": "local" if local_path(model.source) else model.source,
                "model_pin": pins.model(model),
                "peft_pin": pins.adapter(model.peft) if model.peft else None,
                "text": text if hub or text == "embedded" else "local",
                "text_pin": pins.data(source, revision),
                "tokens": recipe.get("tokens"),
                "epsilon": recipe.get("epsilon"),
                "precisions": recipe.get("precisions"),
                "seed": seed,
            }
            free = {
                "model": model.source,
                "revision": pins.commit("model", model.source, model.revision),
                "peft": model.peft,
                "text": source,
                "text_revision": pins.commit("dataset", source, revision),
            }
            labels = {"family": model.family, "size": model.size, "seed": seed}
            runs.append(Run("stability", settings, labels, free, parameters=facts(model).parameters))
    return runs


KIND = Kind(
    name="stability",
    about="Lyapunov exponents by layer, growth of a small error by precision",
    keys={
        "text": Key(read_text, required=True),
        "tokens": Key(number(2), 1024),
        "epsilon": Key(number(1e-12, whole=False), 1e-3),
        "precisions": Key(PRECISION_LIST, list(PRECISIONS)),
    },
    plan=plan,
    report=report,
)
