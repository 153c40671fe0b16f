"""A study's directory: the recipe, what its names were pinned to, and a directory for each run.

study.json              the recipe's text and the pins; written when the study begins
runs/<id>/result.json   what a finished run found, and how it came about; written last, as a whole or not at all
runs/<id>/error.json    why a run failed
runs/<id>/claim         who is at work on it
runs/<id>/log.txt       what it printed
runs/<id>/model/        of a fine-tuning: mamba-ft's directory
runs/<id>/lm_eval/      of a scoring: lm-eval's result file and samples
report/                 what mamba-study report wrote
"""

from __future__ import annotations

import json
import shutil
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from peft_mamba.provenance import git_state, versions

from ..outputs import write_atomically
from .kinds import KINDS
from .pins import Pins
from .recipe import Recipe
from .results import Finished
from .runs import Run, unique

STUDY, RESULT, ERROR, LOG = "study.json", "result.json", "error.json", "log.txt"


class StudyError(ValueError):
    """A directory that is no study, or another one; the message says what to do."""


@dataclass(frozen=True)
class Study:
    """A recipe in a directory.

    Attributes:
        path: absolute.
        runs: all that the recipe asks for, what is needed first.
    """

    path: Path
    recipe: Recipe
    pins: Pins
    runs: list[Run]

    @classmethod
    def begin(cls, path: Path, recipe: Recipe, *, extend: bool = False) -> Study:
        """A new study, or the one that this recipe began there.

        Args:
            extend: a changed recipe takes the place of the one that is there; runs in both stay finished.

        Raises:
            StudyError: the directory holds something else, or a study of another recipe.
            PinError: a name could not be looked up.
        """
        path = path.resolve()
        known: dict[str, str] = {}
        if (path / STUDY).is_file():
            stored = _read_study(path)
            known = stored["pins"]
            changed = differences(cls._recipe(stored, path), recipe)
            if changed and (not extend or stored["kind"] != recipe.kind):
                raise StudyError(
                    f"{path} holds a study of another recipe: {'; '.join(changed)}. Give another directory with -o"
                    + (
                        ", or --extend to take this recipe there: runs that are in both stay finished."
                        if stored["kind"] == recipe.kind
                        else "."
                    )
                )
        elif path.exists() and any(path.iterdir()):
            raise StudyError(f"{path} is not empty and no study. Give another directory with -o.")
        pins = Pins(known, online=True)
        runs = planned(recipe, pins)
        path.mkdir(parents=True, exist_ok=True)
        contents = {
            "kind": recipe.kind,
            "recipe": recipe.text,
            "file": recipe.file,
            "base": str(recipe.base),
            "seeds": recipe.seeds,
            "pins": pins.stored,
        }
        text = json.dumps(contents, indent=2, ensure_ascii=False) + "\n"
        if not (path / STUDY).is_file() or (path / STUDY).read_text(encoding="utf-8") != text:
            write_atomically(path / STUDY, text)
        return cls(path, recipe, pins, runs)

    @classmethod
    def open(cls, path: Path) -> Study:
        """The study in a directory. Raises StudyError if there is none."""
        path = path.resolve()
        stored = _read_study(path)
        recipe, pins = cls._recipe(stored, path), Pins(stored["pins"])
        return cls(path, recipe, pins, planned(recipe, pins))

    @staticmethod
    def _recipe(stored: dict[str, Any], path: Path) -> Recipe:
        recipe = Recipe.parse(stored["recipe"], stored["file"], Path(stored["base"]))
        return Recipe(**(vars(recipe) | {"seeds": stored["seeds"]}))

    def directory(self, run: Run) -> Path:
        """Of a run."""
        return self.path / "runs" / run.id

    def is_finished(self, run: Run) -> bool:
        """Whether it has a result."""
        return (self.directory(run) / RESULT).is_file()

    def error(self, run: Run) -> dict[str, Any] | None:
        """Why it failed, if it did."""
        return _read(self.directory(run) / ERROR)

    def finished(self) -> list[Finished]:
        """All runs with a result, in the recipe's order."""
        return [each for run in self.runs if (each := self.result(run)) is not None]

    def result(self, run: Run) -> Finished | None:
        """A run with its result, if it has one."""
        stored = _read(self.directory(run) / RESULT)
        return Finished(run, self.directory(run), stored["result"], stored["record"]) if stored else None

    def write_result(self, run: Run, result: dict[str, Any], record: dict[str, Any]) -> None:
        """Finish a run."""
        contents = {"run": run.name, "identity": run.identity, "record": record, "result": result}
        text = json.dumps(contents, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(self.directory(run) / RESULT, text)
        (self.directory(run) / ERROR).unlink(missing_ok=True)
        for checkpoint in self.directory(run).glob("model/checkpoint-*"):  # there is nothing to resume any more
            shutil.rmtree(checkpoint, ignore_errors=True)

    def write_error(self, run: Run, problem: dict[str, Any]) -> None:
        """Record why a run failed."""
        earlier = self.error(run)
        problem = problem | {"run": run.name, "attempts": 1 + (earlier["attempts"] if earlier else 0)}
        write_atomically(self.directory(run) / ERROR, json.dumps(problem, indent=2, ensure_ascii=False) + "\n")


def planned(recipe: Recipe, pins: Pins) -> list[Run]:
    """All runs of a recipe, each once, what is needed first. Raises RecipeError for rows that cannot be."""
    return unique(KINDS[recipe.kind].plan(recipe, pins))


def record(started: float, device: str) -> dict[str, Any]:
    """How a result came about: not what it depends on by intention, and worth knowing when two results differ."""
    return {
        "seconds": round(time.time() - started, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device,
        "versions": versions("trl", "datasets"),
        "git": git_state(),
    }


def failure(error: BaseException) -> dict[str, Any]:
    """An exception for error.json."""
    return {
        "error": str(error) if isinstance(error, click.ClickException) else f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error)),
        "failed": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions("trl", "datasets"),
    }


def differences(stored: Recipe, given: Recipe) -> list[str]:
    """What of a recipe is another, in words; how it is written down does not count."""
    found = [f"study was {stored.kind} and is {given.kind}"] if stored.kind != given.kind else []
    if stored.seeds != given.seeds:
        found.append(f"seeds were {_few(stored.seeds)} and are {_few(given.seeds)}")
    before, after = _plain(stored), _plain(given)
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            found.append(f"{name} was {_few(before.get(name))} and is {_few(after.get(name))}")
    return found


def _plain(recipe: Recipe) -> dict[str, Any]:
    models = [
        (str(model), {name: str(entry.value) for name, entry in model.finetune.items()}) for model in recipe.models
    ]
    return recipe.values | {"finetune": recipe.finetune, "models": sorted(map(str, models))}


def _few(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:76]} …"


def _read_study(path: Path) -> dict[str, Any]:
    stored = _read(path / STUDY)
    if stored is None:
        raise StudyError(f"{path} holds no study (no {STUDY}). Begin one: mamba-study run RECIPE -o {path}")
    return stored


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def pending(study: Study, runs: Iterable[Run]) -> Sequence[Run]:
    """Those without a result."""
    return [run for run in runs if not study.is_finished(run)]
