"""One benchmark at several shot counts in one run, on the same documents, with per-document results kept for pairing.

lm-eval allows a task name once in a run and aggregates groups by a mean; here a benchmark's own lm-eval definition is
built once per shot count under a name of its own (`icl_gap_piqa_3shot`), and a group gets the scores of each document.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml


class ShotTask(ConfigurableTask):
    """A benchmark with a fixed number of shots.

    Attributes:
        recorded: metric -> its values, one a document, over the documents of all ranks; filled when lm-eval aggregates
            them on rank 0.
    """

    dataset: Any
    _instances: Any

    def __init__(self, config: dict[str, Any], zero_shot: ShotTask | None = None) -> None:
        """
        Args:
            config: a benchmark's task configuration, with `task` and `num_fewshot` set.
            zero_shot: the variant of the same benchmark to be compared with; shares its data set.
        """
        self._zero_shot = zero_shot
        self._samples: list[int] | None = None
        self.recorded: dict[str, Sequence] = {}
        super().__init__(config=config)

    @property
    def scores(self) -> np.ndarray | None:
        """(n,) accuracies, or None before lm-eval has aggregated them."""
        return np.asarray(self.recorded["acc"]) if "acc" in self.recorded else None

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._zero_shot is not None:
            self.dataset = self._zero_shot.dataset
        else:
            super().download(dataset_kwargs, **kwargs)

    def set_config(self, key: str, value: Any, update: bool = False) -> None:
        # lm-eval's --num_fewshot spares zero-shot tasks and overwrites the rest: 0 against N, N times.
        if key == "num_fewshot":
            raise ValueError(
                f"--num_fewshot {value} cannot be applied to {self.config.task}: its group compares fixed shot counts. "
                "Leave --num_fewshot out, or evaluate the benchmark itself."
            )
        super().set_config(key, value, update)

    def build_all_requests(
        self,
        *,
        samples: list[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        cache_requests: bool = False,
        **kwargs: Any,
    ) -> None:
        self._samples = samples
        if self._zero_shot is not None and samples != self._zero_shot._samples:
            raise ValueError(
                f"--samples selects other documents for {self.config.task} than for {self._zero_shot.config.task}; "
                "shot counts are compared on the same documents. Give both the same list."
            )
        # lm-eval draws the shots of a rank's documents one after the other, so that they depend on the number of ranks.
        # Here every rank draws those of all documents, as a single process does, and keeps its own. (The cache of
        # requests is named by rank: several processes would write one file.)
        super().build_all_requests(samples=samples, cache_requests=cache_requests and world_size == 1, **kwargs)
        self._instances = [instance for instance in self._instances if instance.doc_id % world_size == rank]

    def aggregation(self) -> dict[str, Callable]:
        # lm-eval calls these on rank 0 with the values of all documents: the one place where all of them are seen.
        functions = super().aggregation()
        return functions | {"acc": Recorder(functions["acc"], self, "acc")} if "acc" in functions else functions


class Recorder:
    """An aggregation that keeps what it aggregates, in `task.recorded`.

    lm-eval looks up a metric's standard error by its aggregation function, so this equals the function it stands for.
    """

    def __init__(self, function: Callable, task: ShotTask, metric: str) -> None:
        functools.update_wrapper(self, function)
        self._function, self._task, self._metric = function, task, metric

    def __call__(self, items: Sequence) -> Any:
        self._task.recorded[self._metric] = items
        return self._function(items)

    def __eq__(self, other: object) -> bool:
        return other is self or other is self._function

    def __hash__(self) -> int:
        return hash(self._function)


def shot_tasks(
    prefix: str,
    definition: Path,
    shot_counts: Sequence[int],
    metadata: dict[str, Any],
    make: Callable[..., ShotTask] = ShotTask,
    embedded: str = "icl_gap_mini",
) -> list[ShotTask]:
    """The benchmark defined in a task YAML at each of `shot_counts` (0 first), named `<prefix>_<k>shot`.

    Args:
        metadata: added to the definition's own, which wins.
        make: a subclass of `ShotTask`.
        embedded: the group that an error for want of a network names instead.

    Raises:
        FileNotFoundError: lm-eval has moved the definition.
        ConnectionError: the benchmark's data set is neither cached nor reachable.
    """
    if not definition.is_file():
        raise FileNotFoundError(
            f"{prefix}: this lm-eval has no task definition {definition}. Install a version of lm-eval that "
            "lm-eval-mamba was tested with (see its constraints.txt)."
        )
    config = {key: value for key, value in load_yaml(definition).items() if key not in ("tag", "group", "task_list")}
    tasks: list[ShotTask] = []
    for shots in shot_counts:
        variant = {
            **config,
            "task": f"{prefix}_{shots}shot",
            "task_alias": config["task"],
            "num_fewshot": shots,
            "metadata": {**metadata, **config.get("metadata", {})},
        }
        try:
            tasks.append(make(variant, zero_shot=tasks[0] if tasks else None))
        except OSError as error:  # datasets: no network, offline mode, nothing cached, no such data set
            raise ConnectionError(
                f"{prefix}: the data set {config.get('dataset_path')} is neither cached nor reachable "
                f"({type(error).__name__}: {error}). The embedded benchmark needs no network: --tasks {embedded}."
            ) from error
    return tasks


def builtin_tasks() -> Path:
    """The folder with lm-eval's own task definitions."""
    return Path(lm_eval.tasks.__file__).parent


class ShotGroup(Group):
    """The shot counts of one benchmark; subclasses add what they compare."""

    @property
    def has_aggregation(self) -> bool:
        return True

    def scores(self) -> dict[int, np.ndarray] | None:
        """Shots -> (n,) accuracies by document, or None when the run computed none (`--predict_only`)."""
        tasks = self.get_all_tasks(recursive=False)
        if any(task.scores is None for task in tasks):
            return None
        return {task.config.num_fewshot: task.scores for task in tasks}
