"""From a row of a recipe to a run: everything resolved that decides its result."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any

from peft_mamba.presets import MAMBA_FAMILIES, MODULES, PRESETS

from ..settings import ModelFacts, SettingsError, resolve
from .models import EMBEDDED, Model, local_path
from .options import Options, parameters
from .pins import Pins, is_divergence, own_groups, task_pin
from .recipe import Recipe
from .runs import Run

# lm-eval draws the examples of a prompt with this seed; a study's seed 0 is the one that everyone else uses.
FEWSHOT_SEED = 1234
FREE = ("logging_steps", "save_steps", "save_total_limit", "report_to")
LOCAL = "local"  # stands for a path in what decides a result: its content's hash stands beside it


def finetune_run(
    recipe: Recipe, model: Model, options: Options, seed: int, pins: Pins, *, isolated: bool = False
) -> Run:
    """mamba-ft on a model, with every setting resolved as mamba-ft itself does.

    Raises:
        RecipeError: the model's family lacks the preset, or settings contradict each other.
    """
    if model.peft is not None:
        raise model.error(f"{model.peft} is an adapter; fine-tuning begins with a model. Merge it first.")
    of_model = facts(model)
    given = _defaults() | options | {"model": model.source, "revision": model.revision, "seed": seed, "output": ""}
    given |= {"trust_remote_code": model.trust_remote_code, "device": "auto"}
    _check_preset(model, of_model, given["preset"])
    try:
        settings = asdict(resolve(given, dict.fromkeys(given, "the recipe"), of_model).settings)
    except SettingsError as error:
        raise recipe.error("finetune", f"{model.label}: {error}") from error
    free = {name: settings.pop(name) for name in FREE}
    free |= {name: settings.pop(name) for name in ("model", "revision", "dataset", "dataset_revision")}
    del settings["output"], settings["device"]
    settings |= {
        "model": _place(model.source),
        "model_pin": pins.model(model),
        "dataset": _place(free["dataset"]),
        "dataset_pin": pins.data(free["dataset"], free["dataset_revision"]),
    }
    free["revision"] = pins.commit("model", model.source, model.revision)
    free["dataset_revision"] = pins.commit("dataset", free["dataset"], free["dataset_revision"])
    shown = {name: settings[name] for name in ("preset", "precision")}
    labels = _labels(model) | {"dataset": free["dataset"].rpartition("/")[2]} | shown
    labels |= {name: settings[name] for name in _varying(recipe, model) if name in settings and name not in labels}
    return Run(
        action="finetune",
        settings=settings,
        free=free,
        labels=labels | {"seed": seed},
        isolated=isolated,
        parameters=of_model.parameters,
    )


def _varying(recipe: Recipe, model: Model) -> list[str]:
    """Options that are not the same in all configurations of a model."""
    configurations = recipe.configurations(model)
    names = dict.fromkeys(name for options in configurations for name in options)
    return [name for name in names if len({str(options.get(name)) for options in configurations}) > 1]


def score_runs(
    recipe: Recipe,
    target: Model | Run,
    pins: Pins,
    *,
    precisions: list[str],
    reference: str,
    seed: int = 0,
) -> list[Run]:
    """lm-eval on a model, or on what a fine-tuning made: a run for the recipe's plain tasks, one for those that are
    scored in precisions of their own.

    Args:
        precisions, reference: of the divergence groups; `reference` is the precision of all others.
        seed: of the choice of examples, for a model; a fine-tuned one has the seed of its training.
    """
    tasks: list[str] = recipe.get("tasks")
    check_tasks(recipe)
    own = [task for task in tasks if is_divergence(task)]
    parts = [part for part in (own, [task for task in tasks if task not in own]) if part]
    return [_score_run(recipe, target, pins, part, precisions, reference, seed) for part in parts]


def tuned_runs(recipe: Recipe, model: Model, configurations: list[Options], seed: int, pins: Pins) -> list[Run]:
    """A model fine-tuned with each configuration, and each result scored in the precision that it was trained in."""
    runs: list[Run] = []
    for options in configurations:
        tuned = finetune_run(recipe, model, options, seed, pins)
        precision = tuned.settings["precision"]
        runs += score_runs(recipe, tuned, pins, precisions=[precision], reference=precision)
    return runs


def _score_run(
    recipe: Recipe,
    target: Model | Run,
    pins: Pins,
    tasks: list[str],
    precisions: list[str],
    reference: str,
    seed: int,
) -> Run:
    several = is_divergence(tasks[0])
    num_fewshot = recipe.values.get("num_fewshot")
    settings: dict[str, Any] = {
        "tasks": tasks,
        "task_pins": [task_pin(task) for task in tasks],
        "num_fewshot": num_fewshot,
        "limit": recipe.get("limit"),
        "batch_size": recipe.get("batch_size"),
        "precisions": [reference, *(name for name in precisions if name != reference)] if several else None,
        "dtype": reference,
        "fewshot_seed": FEWSHOT_SEED,
    }
    if isinstance(target, Run):
        return Run(
            action="score",
            settings=settings,
            free={"revision": target.free["revision"], "base": target.free["model"]},
            labels=target.labels | {"tasks": "+".join(tasks)},
            needs=target,
            parameters=target.parameters,
        )
    settings |= {
        "model": _place(target.source),
        "model_pin": pins.model(target),
        "peft_pin": pins.adapter(target.peft) if target.peft else None,
        "tokenizer": target.tokenizer,
        "trust_remote_code": target.trust_remote_code,
        "fewshot_seed": FEWSHOT_SEED + seed,
    }
    free = {
        "model": target.source,
        "peft": target.peft,
        "revision": pins.commit("model", target.source, target.revision),
    }
    precision = {} if several else {"precision": reference}
    return Run(
        action="score",
        settings=settings,
        free=free,
        labels=_labels(target) | precision | {"seed": seed, "tasks": "+".join(tasks)},
        parameters=target.parameters or (facts(target).parameters if target.source in EMBEDDED else None),
    )


def check_tasks(recipe: Recipe) -> None:
    """Raises RecipeError for a task that lm-eval does not know."""
    unknown = [task for task in recipe.get("tasks") if task not in own_groups() and task not in _lm_eval_tasks()]
    if unknown:
        place = recipe.places.get("tasks")
        element = next((each for each in place.elements() if each.value == unknown[0]), place) if place else None
        problem = f"lm-eval has no task {unknown[0]!r}; see lm_eval ls tasks. Ours: {', '.join(own_groups())}."
        raise element.error(problem) if element else recipe.error("tasks", problem)


@functools.cache
def _lm_eval_tasks() -> frozenset[str]:
    from lm_eval.tasks import TaskManager

    return frozenset(TaskManager().all_tasks)


def _labels(model: Model) -> dict[str, Any]:
    return {"family": model.family, "size": model.size}


def _place(name: str) -> str:
    return LOCAL if local_path(name) else name


@functools.cache
def _defaults() -> dict[str, Any]:
    """mamba-ft's options as they are when none is given."""
    from ..ft import main

    given = main.make_context("mamba-ft", []).params
    return {name: given[name] for name in parameters()}


@functools.cache
def facts(model: Model) -> ModelFacts:
    """What defaults depend on: of a published model known without its files, of others read from their config.

    Raises:
        RecipeError: there is no such checkpoint.
    """
    from peft_mamba.checkpoints import CheckpointError

    from .. import model as models

    if model.model_type is not None and model.parameters is not None:
        return ModelFacts(model.model_type, model.parameters)
    try:
        return models.facts(
            models.skeleton(
                {"model": model.source, "revision": model.revision, "trust_remote_code": model.trust_remote_code}
            )
        )
    except CheckpointError as error:
        raise model.error(str(error)) from error


def _check_preset(model: Model, of_model: ModelFacts, preset: str) -> None:
    known = MODULES.get(of_model.family, ("all",))
    if preset != "full" and preset not in known:
        few = " (w and not-w are layers of a Mamba)" if of_model.family not in MAMBA_FAMILIES else ""
        raise model.error(
            f"{model.label} has no preset {preset!r}; it has full, {', '.join(p for p in PRESETS if p in known)}{few}. "
            "Give the model its own: {model: …, finetune: {preset: […]}}."
        )
