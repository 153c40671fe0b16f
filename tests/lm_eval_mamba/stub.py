"""A backend without a model: made-up log-likelihoods that depend on the request and on a seed, and results as files."""

import hashlib
from importlib.resources import files

import lm_eval
from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from lm_eval_mamba.precisions import scorers

# How far each precision is from fp32: enough to flip some answers.
SPREAD = {"fp32": 0.0, "fp16": 0.5, "bf16": 3.0}


def uniform(*key) -> float:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:6], "big") / 2**48


class StubLM(LM):
    """`seed` makes another model; `noise` is what another batch changes."""

    def __init__(self, seed: int = 0, noise: float = 0.0, spread: float = 0.0) -> None:
        super().__init__()
        self.seed, self.noise, self.spread, self.requests = seed, noise, spread, []
        scorers.add(self)

    def score(self, args, precision="fp32", rebatched=False) -> tuple[float, bool]:
        text = args[:2]
        value = -10 * uniform(text) + self.spread * uniform(self.seed, text)
        value += SPREAD[precision] * (uniform(precision, self.seed, text) - 0.5) + self.noise * rebatched
        return value, False

    def loglikelihood(self, requests):
        return [self.score(request.args) for request in requests]

    def loglikelihood_by_precision(self, requests):
        self.requests += requests
        return [
            {name: self.score(r.args, name, r.args[2]["rebatched"]) for name in r.args[2]["precisions"]}
            for r in requests
        ]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    generate_until = loglikelihood_rolling


def our_tasks(**metadata) -> TaskManager:
    """Without lm-eval's own 10,000 files, whose index takes seconds."""
    return TaskManager(
        include_path=str(files("lm_eval_mamba.tasks")), include_defaults=False, metadata=metadata or None
    )


def evaluate(lm, tasks, manager=None, **kwargs):
    defaults = {"limit": 12, "bootstrap_iters": 10}
    return lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager or our_tasks(), **defaults | kwargs)


def save(results, directory, with_samples=True):
    """What `lm_eval --output_path` writes; the path of the result file."""
    results = dict(results)
    samples = results.pop("samples")
    tracker = EvaluationTracker(output_path=str(directory))
    tracker.general_config_tracker.model_name_sanitized = "model"
    tracker.save_results_aggregated(results=results, samples=samples)
    if with_samples:
        for name in results["configs"]:
            tracker.save_results_samples(task_name=name, samples=[dict(sample) for sample in samples[name]])
    return next(directory.rglob(f"results_{tracker.date_id}.json"))
