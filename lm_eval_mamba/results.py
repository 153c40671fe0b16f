"""What lm-eval wrote about a run: studies of one benchmark or a group of them, from result files and samples.

`read(path)` takes a `results_*.json`, or a directory with several, and finds the samples beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_mamba.precisions import Precisions


class ResultsError(ValueError):
    """Files that are not lm-eval's results, lack what is asked of them, or cannot be compared."""


@dataclass(frozen=True)
class Cell:
    """One benchmark at one shot count in one run.

    Attributes:
        accuracy: as in the results.
        documents: how many were evaluated.
        limit: lm-eval's `--limit`.
        multiple_choice: whether answers are choices by log-likelihood.
        metric: the key of the accuracy of a document in its sample.
        precision: which log-likelihoods of a sample, where it has those of several precisions.
        samples_file: where lm-eval writes them with `--log_samples`.
    """

    task: str
    accuracy: float
    documents: int
    limit: float | None
    multiple_choice: bool
    metric: str
    precision: str | None
    samples_file: Path

    @cached_property
    def samples(self) -> list[dict[str, Any]] | None:
        """One a document, by doc_id; None where none were logged."""
        if not self.samples_file.is_file():
            return None
        lines = self.samples_file.read_text(encoding="utf-8").splitlines()
        samples = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
        if len(samples) != self.documents:
            raise ResultsError(
                f"{self.samples_file} has {len(samples)} samples, and the results say {self.documents} documents. Give "
                "the results that were written with these samples."
            )
        return samples

    def loglikelihoods(self, sample: dict[str, Any]) -> list[float] | None:
        """Of the choices of a document."""
        if self.precision is not None:
            return sample["loglikelihoods"][self.precision]
        if not self.multiple_choice:
            return None
        values = [float(response[0]) for response in sample["filtered_resps"]]  # lm-eval writes them as text
        return values[: len(values) // 2] if "acc_mutual_info" in sample["metrics"] else values


@dataclass
class Study:
    """A group of benchmarks, or a single one, in one run; cells by benchmark and shots."""

    name: str
    icl: bool
    cells: dict[tuple[str, int], Cell] = field(default_factory=dict)
    weight_by_size: bool = False
    aipss: float | None = None

    @property
    def benchmarks(self) -> list[str]:
        return list(dict.fromkeys(benchmark for benchmark, _ in self.cells))

    @property
    def shot_counts(self) -> list[int]:
        return sorted({shots for _, shots in self.cells})


def read(path: str | Path, precision: str | None = None) -> dict[str, Study]:
    """The studies of one side, by name.

    Args:
        path: a result file of lm-eval, or a directory: all `results_*.json` below it, such as runs of one task at
            several `--num_fewshot`.
        precision: of a divergence result, default its reference; not for other results.

    Raises:
        ResultsError: no such file or no results in it, one task at one shot count twice, a precision that is not there.
    """
    path = Path(path)
    files = sorted(path.rglob("results_*.json")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ResultsError(
            f"{path} is no result file and no directory with results_*.json. Give what lm_eval --output_path wrote."
        )
    studies: dict[str, Study] = {}
    origin: dict[tuple[str, int], Path] = {}
    for file in files:
        for study in _studies(file, precision):
            known = studies.setdefault(study.name, study)
            for (benchmark, shots), cell in study.cells.items():
                if (cell.task, shots) in origin:
                    raise ResultsError(
                        f"{cell.task} at {shots} shots is in {origin[cell.task, shots]} and in {file}. Give one of the "
                        "files, or a directory with one result for each task and shot count."
                    )
                origin[cell.task, shots] = file
                known.cells[benchmark, shots] = cell
    return studies


def _studies(file: Path, precision: str | None) -> Iterable[Study]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        results, configs, children = data["results"], data["configs"], data["group_subtasks"]
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(
            f"{file} is not a result file of lm-eval ({type(error).__name__}: {error}). Give a results_*.json."
        ) from error
    date = file.stem.rpartition("_")[2]
    below = {child for members in children.values() for child in members}
    grouped: set[str] = set()
    for root in (name for name in children if name not in below):
        tasks = list(_leaves(root, children))
        study = _study(root, tasks, data, file.parent, date, precision)
        if study is not None:
            grouped |= set(tasks)
            yield study
    for task in configs:
        if task not in grouped and "acc,none" in results.get(task, {}):
            alone = _study(task, [task], data, file.parent, date, precision)
            if alone is not None:
                yield alone


def _leaves(name: str, children: Mapping[str, Sequence[str]]) -> Iterable[str]:
    if name not in children:
        yield name
    for child in children.get(name, ()):
        yield from _leaves(child, children)


def _study(
    name: str, tasks: Sequence[str], data: dict[str, Any], folder: Path, date: str, precision: str | None
) -> Study | None:
    """None for a group without an accuracy of its own: its tasks are studies then."""
    results, configs = data["results"], data["configs"]
    shown = results.get(name, {})
    chosen = [_chosen(task, configs[task].get("metadata") or {}, precision) for task in tasks]
    study = Study(name, icl="aipss,none" in shown, aipss=_number(shown.get("aipss,none")))
    of_ours = study.icl or chosen[0][1] is not None  # groups that put the shots into the task's name
    for task, (metric, of_several) in zip(tasks, chosen, strict=True):
        config = configs[task]
        multiple_choice = config["output_type"] == "multiple_choice"
        if study.icl and not multiple_choice:  # LAMBADA stands beside the mean
            continue
        if f"{metric},none" not in results[task]:
            return None
        benchmark = re.sub(r"_\d+shot$", "", task).removeprefix(f"{name}_") if of_ours else task
        study.cells[benchmark, data["n-shot"][task]] = Cell(
            task=task,
            accuracy=results[task][f"{metric},none"],
            documents=data["n-samples"][task]["effective"],
            limit=data.get("config", {}).get("limit"),
            multiple_choice=multiple_choice,
            metric=metric,
            precision=of_several,
            samples_file=folder / f"samples_{task}_{date}.jsonl",
        )
    if of_ours:
        study.weight_by_size = bool((configs[tasks[0]].get("metadata") or {}).get("weight_by_size"))
    elif name not in configs:
        if "acc,none" not in shown:
            return None
        study.weight_by_size = _weighting(study, shown["acc,none"])
    return study


def _chosen(task: str, metadata: dict[str, Any], precision: str | None) -> tuple[str, str | None]:
    """(key of the accuracy, precision of the log-likelihoods) in the results of a task."""
    if "reference" not in metadata or "precisions" not in metadata:
        if precision is not None:
            raise ResultsError(
                f"{task} was scored in one precision: there is no {precision} to select. Leave the precision out, or "
                "give the results of a divergence group."
            )
        return "acc", None
    there = Precisions.parse(metadata["precisions"], metadata["reference"])
    name = there.reference if precision is None else Precisions.parse([precision], precision).reference
    if name not in there.names:
        raise ResultsError(f"{task} was scored in {', '.join(there.names)}, not in {name}. Select one of these.")
    return ("acc" if name == there.reference else f"acc_{name}"), name


def _weighting(study: Study, accuracy: float) -> bool:
    """Whether a group of lm-eval's weighs its tasks by size: its results do not say so, but its accuracy does."""
    cells = list(study.cells.values())
    accuracies, sizes = [cell.accuracy for cell in cells], [cell.documents for cell in cells]
    for by_size in (True, False):
        if np.isclose(np.average(accuracies, weights=sizes if by_size else None), accuracy, rtol=1e-9):
            return by_size
    raise ResultsError(
        f"{study.name}: its accuracy of {accuracy} is no mean of those of its tasks, neither by size nor equally "
        "weighted. Evaluate its tasks by their own names."
    )


def _number(value: Any) -> float | None:
    return value if isinstance(value, float) else None
