"""The options of mamba-ft in a recipe: each a value, or a list of values that is an axis of the study's grid."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import click

from ..ft import main as mamba_ft
from .located import Located
from .models import resolved_path

# What a study decides itself, or leaves to the machine that it runs on.
_OWN = {
    "model": "models",
    "revision": "models",
    "trust_remote_code": "models",
    "seed": "seeds",
    "output": "the study's directory",
    "device": "mamba-study run --device",
    "resume": "the study itself",
    "dry_run": "mamba-study plan",
    "evaluate": "tasks",
    "config": "the recipe",
    "version": "the recipe",
    "help": "the recipe",
}
_OF_DATASET = ("dataset", "dataset_name", "dataset_revision", "split", "eval_split", "epochs", "max_steps")
Options = dict[str, Any]


def parameters() -> dict[str, click.Parameter]:
    """Options of mamba-ft that a recipe may set, by name."""
    return {str(each.name): each for each in mamba_ft.params if each.name not in _OWN}


def axes(entries: dict[str, Located], base: Path) -> dict[str, list[Options]]:
    """Per entry of a recipe's `finetune`, its choices; each sets one option or, for a data set, several.

    Raises:
        RecipeError: an option that mamba-ft does not have, or a value that it does not take; an empty list.
    """
    known = parameters()
    found: dict[str, list[Options]] = {}
    for name, entry in entries.items():
        if name in _OWN:
            raise entry.error(f"finetune cannot set {name}: that is said by {_OWN[name]}.")
        if name not in known:
            raise entry.error(f"mamba-ft has no option {name!r}; it has {', '.join(known)}.")
        found[name] = [_choice(name, element, base) for element in entry.elements()]
    return found


def grid(axes: dict[str, list[Options]]) -> list[Options]:
    """Every combination of the choices, the last axis varying fastest."""
    return [
        {name: value for choice in combination for name, value in choice.items()}
        for combination in itertools.product(*axes.values())
    ]


def _choice(name: str, element: Located, base: Path) -> Options:
    if name != "dataset" or not element.is_mapping:
        return {name: _value(name, element, base)}
    keys = element.items()
    for key, entry in keys.items():
        if key not in _OF_DATASET:
            raise entry.error(f"a data set has no {key!r}; it has {', '.join(_OF_DATASET)}.")
    if "dataset" not in keys:
        raise element.error("a data set with options of its own needs 'dataset: name'.")
    return {key: _value(key, entry, base) for key, entry in keys.items()}


def _value(name: str, entry: Located, base: Path) -> Any:
    parameter = parameters()[name]
    if entry.value is None or isinstance(entry.value, dict):
        raise entry.error(f"{name} needs a value")
    try:
        value = parameter.type_cast_value(click.Context(mamba_ft), _text(entry.value))
    except click.BadParameter as error:
        raise entry.error(f"{name}: {error.message}") from error
    return resolved_path(entry, value, base) if name == "dataset" else value


def _text(value: Any) -> Any:
    # YAML reads 1e-5 as text and 0.05 as a number; click's types read text.
    return value if isinstance(value, bool) else str(value)
