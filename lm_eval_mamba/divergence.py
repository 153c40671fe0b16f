"""What a precision costs: one benchmark at several shot counts, each request scored in several precisions in one run.

    lm_eval --model mamba_amp --model_args pretrained=state-spaces/mamba-130m-hf --tasks mmlu_divergence

A YAML file names the benchmarks (see `tasks/mmlu_divergence/mmlu_divergence.yaml`);
`class: !function lm_eval_mamba.divergence.DivergenceGroup` has lm-eval build this group. The arithmetic is
`lm_eval_mamba.statistics.divergence`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance

from lm_eval_mamba.precisions import REQUEST, Precisions, scorers
from lm_eval_mamba.shots import Recorder, ShotTask, builtin_tasks, shot_tasks
from lm_eval_mamba.statistics import Divergence, Estimate, Pair, divergence

logger = logging.getLogger(f"lm_eval.{__name__}")  # below the logger that lm-eval configures

# Documents of a group that are scored once more in other batches: enough for an order of magnitude, and few enough, at
# most one in twenty, to cost next to nothing beside three precisions of all.
NOISE_DOCUMENTS, NOISE_STRIDE = 32, 20
_GOLDEN = (math.sqrt(5) - 1) / 2


class DivergenceTask(ShotTask):
    """A multiple-choice benchmark with a fixed number of shots, scored in several precisions.

    For each document: `acc` in the reference precision, `acc_<precision>` in each other one, `loglikelihoods`:
    precision -> one a choice, and `rescored`: those of the reference precision in other batches, for a sample of
    documents.
    """

    def __init__(self, config: dict[str, Any], zero_shot: ShotTask | None = None) -> None:
        metrics = config.get("metric_list") or []
        metric_list = [metric for metric in metrics if metric["metric"] == "acc"]
        if config.get("output_type") != "multiple_choice" or not metric_list:
            raise ValueError(
                f"{config['task']}: a divergence needs a benchmark of output_type multiple_choice with the metric acc, "
                f"not {config.get('output_type')} with {[metric['metric'] for metric in metrics]}."
            )
        metadata = config["metadata"]
        self.precisions = Precisions.parse(metadata.get("precisions"), metadata.get("reference"))
        self.rescored = range(0)
        super().__init__(config | {"metric_list": metric_list}, zero_shot)

    def build_all_requests(self, **kwargs: Any) -> None:
        if not scorers:
            raise ValueError(
                f"{self.config.task} compares precisions of one loaded model, which --model mamba_amp scores and other "
                "backends do not. Use --model mamba_amp (it runs any causal LM), or compare two runs of another "
                "backend with mamba-study compare."
            )
        super().build_all_requests(**kwargs)
        # Here, not where lm-eval makes the requests: its --cache_requests would bring back those of other precisions.
        own = {"precisions": list(self.precisions.names), "rebatched": False}
        again = {"precisions": [self.precisions.reference], "rebatched": True}
        requests = [_by_precision(instance, own) for instance in self._instances]
        requests += [_by_precision(instance, again) for instance in self._instances if instance.doc_id in self.rescored]
        self._instances = requests

    def process_results(self, doc: Any, results: Sequence[dict[str, tuple[float, bool]]]) -> dict[str, Any]:
        choices = len(self.doc_to_choice(doc))
        reference = self.precisions.reference
        scored, again = results[:choices], results[choices:]
        metrics = super().process_results(doc, [answers[reference] for answers in scored])
        if "acc" not in metrics:  # --predict_only
            return metrics
        for precision in self.precisions.compared:
            answers = [answers[precision] for answers in scored]
            metrics[f"acc_{precision}"] = super().process_results(doc, answers)["acc"]
        return metrics | {
            "loglikelihoods": {name: [answers[name][0] for answers in scored] for name in self.precisions.names},
            "rescored": [answers[reference][0] for answers in again] or None,
        }

    def aggregation(self) -> dict[str, Callable]:
        functions = super().aggregation()
        if "acc" not in functions:
            return functions
        others = {f"acc_{precision}": self._aggregation_list["acc"] for precision in self.precisions.compared}
        others |= {"loglikelihoods": len, "rescored": len}  # for the group, which takes them out of the table
        return functions | {name: Recorder(function, self, name) for name, function in others.items()}

    def higher_is_better(self) -> dict[str, bool]:
        return super().higher_is_better() | {f"acc_{precision}": True for precision in self.precisions.compared}

    def answers(self) -> Answers | None:
        """The results of all documents, or None when the run computed none (`--predict_only`)."""
        if "loglikelihoods" not in self.recorded:
            return None
        names = {self.precisions.reference: "acc"} | {name: f"acc_{name}" for name in self.precisions.compared}
        return Answers(
            correct={name: np.asarray(self.recorded[metric], dtype=float) for name, metric in names.items()},
            loglikelihoods=list(self.recorded["loglikelihoods"]),
            rescored=list(self.recorded["rescored"]),
        )


class Answers:
    """Per-document results of one benchmark at one shot count.

    Args:
        correct: precision -> (documents,) 0 or 1.
        loglikelihoods: a document each: precision -> log-likelihoods of its choices.
        rescored: a document each: log-likelihoods in the reference precision in other batches, or None.
    """

    def __init__(self, correct: dict[str, Any], loglikelihoods: list[dict[str, Any]], rescored: list[Any]) -> None:
        self.correct, self.loglikelihoods, self.rescored = correct, loglikelihoods, rescored

    def against(self, reference: str, other: str) -> tuple[Any, Any]:
        """(documents,) whether the answers differ, and the absolute change of the chosen answer's log-likelihood."""
        return answer_changes([(doc[reference], doc[other]) for doc in self.loglikelihoods])

    def noise(self, reference: str) -> tuple[Any, Any]:
        """The same for the documents that were scored again in the reference precision."""
        documents = zip(self.loglikelihoods, self.rescored, strict=True)
        return answer_changes([(doc[reference], again) for doc, again in documents if again is not None])


def answer_changes(documents: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """What separates two lists of log-likelihoods of the same choices, (reference, other) for each document.

    Returns:
        (documents,) 1 where the most likely choice differs, else 0; and (documents,) the absolute difference of the
        log-likelihood of the reference's choice.
    """
    chosen = [int(np.argmax(reference)) for reference, _ in documents]
    flipped = [float(np.argmax(other) != i) for i, (_, other) in zip(chosen, documents, strict=True)]
    change = [abs(other[i] - reference[i]) for i, (reference, other) in zip(chosen, documents, strict=True)]
    return np.array(flipped), np.array(change)


def _by_precision(instance: Instance, options: dict[str, Any]) -> Instance:
    # lm-eval hands the answers of a document over in the order of idx: repeated requests after all others.
    idx = instance.idx + (1_000_000 if options["rebatched"] else 0)
    arguments = (*instance.args, options)
    return Instance(REQUEST, instance.doc, arguments, idx, instance.metadata)  # type: ignore[arg-type]


class DivergenceGroup(Group):
    """Benchmarks whose accuracy in several precisions is compared at several shot counts.

    Keys of the YAML file:
        task: the group's name.
        num_fewshot: shot counts.
        benchmarks: name -> path of a task definition, below the YAML's folder or lm-eval's task folder; or one path
            with a `*` that stands for the name.
        weight_by_size: whether a benchmark counts by its documents in the group's accuracy, as in lm-eval's key of that
            name; default no.

    The metadata keys `precisions` and `reference` (`lm_eval --metadata`, or model arguments) choose what is compared.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        metadata = dict(config["metadata"])
        super().__init__(name=config["task"], metadata=metadata)
        self.precisions = Precisions.parse(metadata.get("precisions"), metadata.get("reference"))
        self._shot_counts = sorted(config["num_fewshot"])
        self._weight_by_size = bool(config.get("weight_by_size", False))
        shared = {key: value for key, value in metadata.items() if key not in ("version", "config_source")}
        shared |= {
            "precisions": list(self.precisions.names),
            "reference": self.precisions.reference,
            "weight_by_size": self._weight_by_size,
        }
        self._benchmarks: dict[str, list[DivergenceTask]] = {}
        for benchmark, path in _definitions(Path(metadata["config_source"]).parent, config["benchmarks"]).items():
            name = f"{self.name}_{benchmark}"
            tasks = shot_tasks(name, path, self._shot_counts, shared, DivergenceTask, embedded="divergence_mini")
            self._benchmarks[benchmark] = cast("list[DivergenceTask]", tasks)
        variants = [task for by_shots in self._benchmarks.values() for task in by_shots]
        documents = sum(len(task.eval_docs) for task in variants)
        stride = max(NOISE_STRIDE, documents // NOISE_DOCUMENTS)
        for i, task in enumerate(variants):
            # A systematic sample that does not depend on the number of processes. Its start differs by task, so that a
            # few documents of each (--limit) still hold some; the first task's first document is always one.
            task.rescored = range(int(stride * (i * _GOLDEN % 1)), len(task.eval_docs), stride)
            self.add(task)

    @property
    def has_aggregation(self) -> bool:
        return True

    def aggregate(self, task_metrics: dict[str, Any]) -> dict[str, Any]:
        shown: dict[str, Any] = {"alias": self.name, "name": self.name}
        for task in self.get_all_tasks():
            for hidden in ("loglikelihoods", "rescored"):
                for key in (f"{hidden},none", f"{hidden}_stderr,none"):
                    task_metrics.get(task.task_name, {}).pop(key, None)
        answers: dict[str, list[Answers]] = {}
        for benchmark, tasks in self._benchmarks.items():
            answers[benchmark] = [found for task in tasks if (found := task.answers()) is not None]
            if len(answers[benchmark]) < len(tasks):
                return shown
        reference = self.precisions.reference
        for i, precision in enumerate(self.precisions.compared):
            pairs = {name: _pair(by_shots, reference, precision) for name, by_shots in answers.items()}
            sizes = {name: pair.reference.shape[1] for name, pair in pairs.items()} if self._weight_by_size else None
            result = divergence(pairs, self._shot_counts, sizes)
            if i == 0:
                shown |= _shown({f"acc_{shots}shot": estimate for shots, estimate in result.reference.items()})
            shown |= _figures(result, precision)
        noise = _noise_floor([found for by_shots in answers.values() for found in by_shots], reference)
        # The table has four decimals, and this is often less.
        logger.info(
            "%s: %s in other batches changes the log-likelihood of an answer by %s (mean of %s documents).",
            self.name,
            reference,
            noise["noise_floor_loglikelihood_change,none"],
            noise["noise_floor_documents,none"],
        )
        return shown | noise


def _definitions(here: Path, benchmarks: dict[str, str] | str) -> dict[str, Path]:
    if isinstance(benchmarks, str):
        folder, pattern = (builtin_tasks() / benchmarks).parent, Path(benchmarks).name
        prefix, _, suffix = pattern.partition("*")
        found = {path.name[len(prefix) : -len(suffix)]: path for path in sorted(folder.glob(pattern))}
        if not found:
            raise FileNotFoundError(
                f"this lm-eval has no task definitions {folder / pattern}. Install a version of lm-eval that "
                "lm-eval-mamba was tested with (see its constraints.txt)."
            )
        return found
    return {
        name: here / path if (here / path).is_file() else builtin_tasks() / path for name, path in benchmarks.items()
    }


def _pair(by_shots: Sequence[Answers], reference: str, other: str) -> Pair:
    flipped, change = zip(*(answers.against(reference, other) for answers in by_shots), strict=True)
    return Pair(
        reference=np.stack([answers.correct[reference] for answers in by_shots]),
        other=np.stack([answers.correct[other] for answers in by_shots]),
        flipped=np.stack(flipped),
        change=np.stack(change),
    )


def _figures(result: Divergence, precision: str) -> dict[str, Any]:
    named = {
        f"divergence_{precision}": result.mean,
        f"divergence_{precision}_std": result.std,
        f"divergence_{precision}_spikes": result.spikes,
        f"flips_{precision}": result.flips,
        f"loglikelihood_change_{precision}": result.change,
    }
    accuracies = {f"acc_{precision}_{shots}shot": estimate for shots, estimate in result.other.items()}
    known = {name: estimate for name, estimate in named.items() if estimate is not None}
    intervals = {
        f"{name}_interval,none": [round(end, 6) for end in estimate.interval] if estimate.interval else "N/A"
        for name, estimate in known.items()
    }
    return _shown(accuracies | known) | intervals


def _noise_floor(answers: Sequence[Answers], reference: str) -> dict[str, Any]:
    flipped, change = (np.concatenate(parts) for parts in zip(*(a.noise(reference) for a in answers), strict=True))
    figures = {"noise_floor_flips": 100 * flipped, "noise_floor_loglikelihood_change": change}

    def estimate(x: Any) -> Estimate:
        stderr = x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
        return Estimate(x.mean() if len(x) else math.nan, stderr)

    return _shown({name: estimate(x) for name, x in figures.items()}) | {"noise_floor_documents,none": len(change)}


def _shown(figures: dict[str, Estimate]) -> dict[str, Any]:
    """lm-eval's metric keys; "N/A" where undefined, as lm-eval writes it: NaN is not JSON."""
    shown: dict[str, Any] = {}
    for name, estimate in figures.items():
        for key, x in ((name, estimate.value), (f"{name}_stderr", estimate.stderr)):
            shown[f"{key},none"] = float(x) if math.isfinite(x) else "N/A"
    return shown
