"""A recipe: a short YAML file that says which study to do, on which models, with which choices.

    mamba-study list                          # those that come along
    mamba-study list --show icl > my.yaml     # one to edit

Keys: `study` (its kind), `about` (a line), `models`, and those of its kind. Whatever is a choice may be a list. Paths
begin with ./, ../, ~ or / and start at the recipe's directory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from .located import Located, RecipeError, read_file
from .models import Model, read_models
from .options import Options, axes, grid

PRECISIONS = ("fp32", "fp16", "bf16")
_COMMON = ("study", "about", "models", "seeds")


@dataclass(frozen=True)
class Recipe:
    """A recipe that has been checked.

    Attributes:
        kind: what study it is, a name in `kinds.KINDS`.
        about: one line for people.
        text: the file as it was written.
        base: the directory that its local paths start at.
        seeds: of whatever is random in the kind.
        values: the kind's own keys that were given, plain.
        finetune: mamba-ft's options, each with its choices; None where the recipe has none.
        places: the nodes of all keys, for errors.
    """

    kind: str
    about: str
    text: str
    file: str
    base: Path
    models: list[Model]
    seeds: list[int]
    values: dict[str, Any]
    finetune: dict[str, list[Options]] | None
    places: dict[str, Located] = field(repr=False)

    @classmethod
    def load(cls, name: str, seeds: int | None = None) -> Recipe:
        """A built-in recipe by name, or a file.

        Args:
            seeds: how many, in place of what the recipe says.

        Raises:
            RecipeError: no such recipe, or one that cannot be carried out; names file and line.
        """
        path = Path(name)
        if name in builtin_names():
            return cls.parse(builtin_text(name), f"{name}.yaml", Path.cwd(), seeds)
        if not path.is_file():
            raise RecipeError(
                f"there is no recipe {name!r}. Give a YAML file, or one of: {', '.join(builtin_names())}."
            )
        return cls.parse(read_file(path), str(path), path.parent.resolve(), seeds)

    @classmethod
    def parse(cls, text: str, file: str, base: Path, seeds: int | None = None) -> Recipe:
        """From its text. Raises RecipeError as `load` does."""
        from .kinds import KINDS

        root = Located.read(text, file)
        entries = root.items()
        kind = entries["study"].value if "study" in entries else None
        if kind not in KINDS:
            raise entries.get("study", root).error(f"study: is one of {', '.join(KINDS)}, not {kind!r}.")
        keys = KINDS[kind].keys
        for name, entry in entries.items():
            if name not in (*_COMMON, *keys):
                raise entry.error(f"a study {kind} has no key {name!r}; it has {', '.join((*_COMMON, *keys))}.")
        for name in ("models", *(name for name, key in keys.items() if key.required)):
            if name not in entries:
                raise root.error(f"a study {kind} needs the key {name}.")
        values = {
            name: keys[name].read(entry, base) for name, entry in entries.items() if name in keys and name != "finetune"
        }
        return cls(
            kind=kind,
            about=str(entries["about"].value) if "about" in entries else "",
            text=text,
            file=file,
            base=base,
            models=read_models(entries["models"], base),
            seeds=list(range(seeds)) if seeds else _seeds(entries.get("seeds")),
            values=values,
            finetune=axes(entries["finetune"].items(), base) if "finetune" in entries else None,
            places=entries,
        )

    def get(self, name: str) -> Any:
        """The value of a key of the kind, or its default."""
        from .kinds import KINDS

        return self.values.get(name, KINDS[self.kind].keys[name].default)

    def error(self, key: str, problem: str) -> RecipeError:
        """An error about a key's line."""
        return self.places[key].error(problem) if key in self.places else RecipeError(f"{self.file}: {problem}")

    def configurations(self, model: Model) -> list[Options]:
        """mamba-ft's options for a model: every combination of the recipe's choices and the model's own.

        Raises:
            RecipeError: as `options.axes`.
        """
        assert self.finetune is not None
        return grid(self.finetune | axes(model.finetune, self.base))


@dataclass(frozen=True)
class Key:
    """A key of a kind of study: how its value is read, and what it is if it is not given."""

    read: Callable[[Located, Path], Any]
    default: Any = None
    required: bool = False


def builtin_names() -> list[str]:
    """The recipes that come along, the papers' first."""
    folder = resources.files(__package__) / "recipes"
    names = sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))
    return sorted(names, key=lambda name: name.endswith("-mini"))


def builtin_text(name: str) -> str:
    """The text of one."""
    return (resources.files(__package__) / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def text(entry: Located, base: Path) -> str:
    """A word or a line."""
    if not isinstance(entry.value, str) or not entry.value:
        raise entry.error(f"expected a text, not {entry.value!r}.")
    return entry.value


def texts(entry: Located, base: Path) -> list[str]:
    """One or several, each once."""
    found: list[str] = []
    for element in entry.elements():
        if text(element, base) in found:
            raise element.error(f"{element.value} is in the list twice.")
        found.append(element.value)
    return found


def choices(of: Sequence[str]) -> Callable[[Located, Path], list[str]]:
    """One or several of these words."""

    def read(entry: Located, base: Path) -> list[str]:
        for element in entry.elements():
            if element.value not in of:
                raise element.error(f"{element.value!r} is not one of {', '.join(of)}.")
        return texts(entry, base)

    return read


def number(least: float, *, whole: bool = True) -> Callable[[Located, Path], Any]:
    """A finite number of at least `least`."""

    def read(entry: Located, base: Path) -> Any:
        value = entry.value
        if isinstance(value, str) and not whole:  # YAML takes 1e-3 for a word
            try:
                value = float(value)
            except ValueError:
                pass
        wanted = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted) or not math.isfinite(value) or value < least:
            raise entry.error(f"expected a {'whole ' if whole else ''}number of at least {least}, not {entry.value!r}.")
        return value

    return read


def flag(entry: Located, base: Path) -> bool:
    """true or false."""
    if not isinstance(entry.value, bool):
        raise entry.error(f"expected true or false, not {entry.value!r}.")
    return entry.value


def batch_size(entry: Located, base: Path) -> int | str:
    """A number of requests, or auto."""
    return "auto" if entry.value == "auto" else number(1)(entry, base)


def scalars(known: Sequence[str]) -> Callable[[Located, Path], dict[str, Any]]:
    """A mapping of some of these names to one value each."""

    def read(entry: Located, base: Path) -> dict[str, Any]:
        keys = entry.items()
        for name, value in keys.items():
            if name not in known:
                raise value.error(f"expected {', '.join(known)} here, not {name!r}.")
            if isinstance(value.value, list | dict) or value.value is None:
                raise value.error(f"{name} is one value here, not {value.value!r}.")
        return {name: value.value for name, value in keys.items()}

    return read


def _seeds(entry: Located | None) -> list[int]:
    if entry is None:
        return [0]
    if not entry.is_list:
        return list(range(number(1)(entry, Path())))
    found = [number(0)(element, Path()) for element in entry.elements()]
    if len(set(found)) < len(found):
        raise entry.error(f"a seed is in the list twice: {found}.")
    return found
