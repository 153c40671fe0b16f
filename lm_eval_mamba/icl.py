"""The in-context-learning gap: what 1, 3 and 5 shots bring over none, as an lm-eval group with AIPSS as its metric.

A YAML file names the benchmarks (see `tasks/icl_gap/icl_gap.yaml`); `class: !function lm_eval_mamba.icl.ICLGapGroup`
has lm-eval build this group. The arithmetic is `lm_eval_mamba.statistics.icl_gap`.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group

from lm_eval_mamba.shots import ShotGroup, builtin_tasks, shot_tasks
from lm_eval_mamba.statistics import Estimate, icl_gap

logger = logging.getLogger(f"lm_eval.{__name__}")  # below the logger that lm-eval configures


class BenchmarkGap(ShotGroup):
    """One benchmark at all shot counts, with its own improvement over 0-shot."""

    def aggregate(self, task_metrics: dict[str, Any]) -> dict[str, Any]:
        return {"alias": self.alias, "name": self.name, **_figures([self])}


class ICLGapGroup(Group):
    """Benchmarks whose improvements are averaged, and others that are shown beside them.

    Keys of the YAML file:
        task: the group's name.
        num_fewshot: shot counts, 0 among them.
        benchmarks: name -> path of a task definition, below the YAML's folder or lm-eval's task folder; averaged.
        beside: likewise, not averaged.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        metadata = dict(config["metadata"])
        super().__init__(name=config["task"], metadata=metadata)
        here = Path(metadata["config_source"]).parent
        shared = {key: value for key, value in metadata.items() if key not in ("version", "config_source")}
        shot_counts = sorted(config["num_fewshot"])
        self._averaged = [f"{self.name}_{benchmark}" for benchmark in config["benchmarks"]]
        for benchmark, path in (config["benchmarks"] | config.get("beside", {})).items():
            definition = here / path if (here / path).is_file() else builtin_tasks() / path
            name = f"{self.name}_{benchmark}"
            tasks = shot_tasks(name, definition, shot_counts, shared)
            group = BenchmarkGap(name=name, alias=tasks[0].config.task_alias, metadata=metadata)
            for task in tasks:
                group.add(task)
            self.add(group)

    @property
    def has_aggregation(self) -> bool:
        return True

    def aggregate(self, task_metrics: dict[str, Any]) -> dict[str, Any]:
        return {"alias": self.name, "name": self.name, **_figures([self.get(name) for name in self._averaged])}


def _figures(benchmarks: list[BenchmarkGap]) -> dict[str, float | str]:
    """lm-eval's metric keys for the gap over `benchmarks`: percent, with standard errors; "N/A" where undefined."""
    correct = {str(group.alias): scores for group in benchmarks if (scores := group.scores()) is not None}
    if len(correct) < len(benchmarks):
        return {}
    gap = icl_gap(correct)
    if gap.undefined:
        logger.warning(
            "0-shot accuracy is zero on %s: improvement over it is undefined, and so is every mean that includes it.",
            ", ".join(gap.undefined),
        )
    figures: dict[str, float | str] = {}
    named = {f"improvement_{shots}shot": estimate for shots, estimate in gap.improvement.items()}
    for name, estimate in (named | {"aipss": gap.aipss}).items():
        figures[f"{name},none"], figures[f"{name}_stderr,none"] = _shown(estimate)
    return figures


def _shown(estimate: Estimate) -> tuple[float | str, float | str]:
    # As lm-eval writes a missing standard error; NaN is not JSON.
    value, stderr = ("N/A" if math.isnan(x) else float(x) for x in (estimate.value, estimate.stderr))
    return value, stderr
