"""The models of a recipe: the papers' by family and size, or any checkpoint by name or path."""

from __future__ import annotations

import csv
import difflib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from .located import Located, RecipeError

EMBEDDED = {"mini": ("Mamba", "mini"), "mini-2": ("Mamba-2", "mini")}
_KEYS = ("model", "revision", "peft", "tokenizer", "trust_remote_code", "family", "size", "finetune")


@dataclass(frozen=True)
class Model:
    """A checkpoint, and what tables and figures call it.

    Attributes:
        source: embedded name, hub id, or absolute path.
        revision, tokenizer, trust_remote_code: as in transformers.
        peft: hub id or absolute path of an adapter to score it with.
        family, size: labels; family is what curves and averages are taken over.
        parameters: how many, as far as it is known without the checkpoint.
        finetune: options of mamba-ft for this model alone, above the recipe's.
    """

    source: str
    family: str
    size: str
    revision: str | None = None
    peft: str | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    model_type: str | None = None
    parameters: int | None = None
    finetune: dict[str, Located] = field(default_factory=dict, compare=False, hash=False)
    at: Located | None = field(default=None, compare=False, hash=False, repr=False)

    @property
    def label(self) -> str:
        """Family and size, as tables show it."""
        return f"{self.family} {self.size}".strip()

    def error(self, problem: str) -> RecipeError:
        """An error about its line of the recipe."""
        return self.at.error(problem) if self.at is not None else RecipeError(problem)


@functools.cache
def published_models() -> tuple[Model, ...]:
    """The checkpoints that the papers evaluate, as far as transformers loads them."""
    text = (resources.files("lm_eval_mamba") / "published" / "models.csv").read_text(encoding="utf-8")
    return tuple(
        Model(
            source=row["model"],
            family=row["family"],
            size=row["size"],
            revision=row["revision"] or None,
            model_type=row["model_type"],
            parameters=int(row["parameters"]),
        )
        for row in csv.DictReader(text.splitlines())
    )


def read_models(entry: Located, base: Path) -> list[Model]:
    """The models of a recipe's list.

    Args:
        base: the directory that local paths start at.

    Raises:
        RecipeError: an unknown name, family, size or key; a path that is not there; a model twice.
    """
    found: list[Model] = []
    for element in entry.elements():
        for model in _read(element, base):
            if any((model.source, model.revision, model.peft) == (x.source, x.revision, x.peft) for x in found):
                raise element.error(f"{model.source} is in the list twice; give it once, or another revision or peft.")
            found.append(model)
    return found


def local_path(text: str) -> bool:
    """Whether a name is that of a file or directory here, and not of something on the hub."""
    return text.startswith(("./", "../", "/", "~")) or text in (".", "..")


def resolved_path(entry: Located, text: str, base: Path) -> str:
    """`text` from `base` where it is a local path, and as it is otherwise. Raises RecipeError if nothing is there."""
    if not local_path(text):
        return text
    path = Path(base, Path(text).expanduser()).resolve()
    if not path.exists():
        raise entry.error(f"there is no {path}")
    return str(path)


def _read(element: Located, base: Path) -> Iterator[Model]:
    if isinstance(element.value, str):
        yield _named(element, element.value, base, {})
        return
    keys = element.items()
    if "sizes" in keys:
        _refuse_unknown(keys, ("family", "sizes", "finetune"))
        yield from _published(element, keys)
        return
    _refuse_unknown(keys, _KEYS)
    if not isinstance(keys.get("model", element).value, str):
        raise element.error("a model is a name, or has 'model: name', or 'family: …' with 'sizes: […]'.")
    yield _named(keys["model"], keys["model"].value, base, keys)


def _refuse_unknown(keys: dict[str, Located], known: tuple[str, ...]) -> None:
    for name, entry in keys.items():
        if name not in known:
            raise entry.error(f"a model has no {name!r}; it has {', '.join(known)}.")


def _published(element: Located, keys: dict[str, Located]) -> Iterator[Model]:
    models = published_models()
    family = keys["family"].value if "family" in keys else None
    of_family = {model.size: model for model in models if model.family == family}
    if not of_family:
        families = ", ".join(dict.fromkeys(model.family for model in models))
        raise element.error(f"the papers have no family {family!r}; they have {families}. Others go by model: name.")
    for size in keys["sizes"].elements():
        if size.value not in of_family:
            raise size.error(f"{family} has no size {size.value!r}; it has {', '.join(of_family)}.")
        yield replace(of_family[size.value], finetune=_options(keys), at=size)


def _named(entry: Located, name: str, base: Path, keys: dict[str, Located]) -> Model:
    given: dict[str, Any] = {
        key: keys[key].value for key in ("family", "size", "revision", "tokenizer", "trust_remote_code") if key in keys
    }
    for key, value in given.items():
        wanted = bool if key == "trust_remote_code" else str
        if not isinstance(value, wanted):
            raise keys[key].error(f"{key} is {'true or false' if wanted is bool else 'a text'}, not {value!r}.")
    given |= {"finetune": _options(keys), "at": entry}
    if "peft" in keys:
        given["peft"] = resolved_path(keys["peft"], str(keys["peft"].value), base)
        given.setdefault("family", Path(given["peft"]).name)
    if name in EMBEDDED:
        family, size = EMBEDDED[name]
        return replace(Model(name, family, size), **given)
    source = resolved_path(entry, name, base)
    for model in published_models():
        if model.source == source:
            return replace(model, **given)
    if not local_path(name) and name.count("/") != 1:
        known = [*EMBEDDED, *(model.source for model in published_models())]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        raise entry.error(
            f"there is no model {name!r}{f'; did you mean {near[0]}?' if near else '.'} A model is "
            f"{' or '.join(EMBEDDED)}, a hub id owner/name, a path that begins with ./ or /, or 'family: …' with "
            "'sizes: […]'."
        )
    last = Path(source).name
    found = re.search(r"(?i)(?<![a-z0-9.])(\d+(?:\.\d+)?[mb])(?![a-z0-9])", last)
    family = last.replace(found[0], "").strip("-_. ") if found else last
    return replace(Model(source, family or last, found[1].upper() if found else ""), **given)


def _options(keys: dict[str, Located]) -> dict[str, Located]:
    return keys["finetune"].items() if "finetune" in keys else {}
