"""What a run is likely to cost, from what was measured: tokens, and time on one GPU or on this machine's CPU.

A forward pass is 2 operations a parameter and token, a backward pass 4, or 2 where the weights are frozen. How many
operations a second a device does on these models is taken from what was measured (benchmarks/RESULTS.md): one H200
trained mamba-790m at 27,668 tokens/s in bf16 and 7,497 in fp32; two CPU cores ran mamba-130m forward at 331 tokens/s.
Once runs of a study have finished here, what they took corrects the estimate of the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from .results import Finished
from .runs import Run

BASIS = (
    "Estimates: operations by parameters and tokens, at the rate measured for one {device} (see benchmarks/RESULTS.md)"
)
# Operations a second. An H200: 6 x 793e6 parameters x tokens/s. The CPU: 2 x 129e6 x 331, in any precision.
RATES = {
    "H200": {"fp32": 3.6e13, "fp16": 1.3e14, "bf16": 1.3e14},
    "CPU": dict.fromkeys(("fp32", "fp16", "bf16"), 8.5e10),
}
# Seconds of a run beside its arithmetic: loading, tokenizing, lm-eval's own work. Measured with the embedded models.
OVERHEAD = {"finetune": 3.0, "score": 1.5, "stability": 1.5}
# Rows and mean tokens a row, responses and prompts, cut at 512. Rows as the hub states them; tokens by GPT-NeoX's
# tokenizer, about.
DATASETS = {"alpaca": (52_002, 110), "openhermes": (242_831, 330), "lima": (1_030, 400), "embedded": (1_200, 30)}
# Of a task at no shots: documents, sequences scored a document, tokens of one; and tokens that an example adds.
TASKS = {
    "hellaswag": (10_042, 4, 100, 100),
    "piqa": (1_838, 2, 40, 40),
    "arc_easy": (2_376, 4, 35, 35),
    "arc_challenge": (1_172, 4, 40, 40),
    "winogrande": (1_267, 2, 30, 30),
    "lambada_openai": (5_153, 1, 85, 85),
    "mmlu": (14_042, 1, 100, 100),
    "mini": (108, 3, 12, 12),
}
GROUPS = {
    "icl_gap": ("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande", "lambada_openai"),
    "mmlu_divergence": ("mmlu",),
    "winogrande_divergence": ("winogrande",),
    "icl_gap_mini": ("mini",) * 6,
    "divergence_mini": ("mini",) * 5,
}
SHOTS = (0, 1, 3, 5)


@dataclass(frozen=True)
class Cost:
    """Of one run: tokens and seconds; not a number where nothing tells."""

    tokens: float
    seconds: float


def estimate(run: Run, device: str) -> Cost:
    """On one "H200" or this machine's "CPU"."""
    tokens, operations = _work(run)
    precisions = run.settings.get("precisions") or [run.settings.get("dtype") or run.settings.get("precision")]
    rates = [RATES[device][name] for name in precisions]
    parameters = run.parameters or math.nan
    arithmetic = sum(tokens * operations * parameters / rate for rate in rates)
    return Cost(tokens * len(rates), arithmetic + OVERHEAD[run.action])


def calibrated(runs: Iterable[Run], finished: Iterable[Finished], device: str) -> dict[str, float]:
    """Run id to seconds, by the estimate and, per action, by what it was worth for the runs that have finished."""
    factors: dict[str, float] = {}
    for action in OVERHEAD:
        pairs = [
            (each.record["seconds"], expected)
            for each in finished
            if each.run.action == action and not math.isnan(expected := estimate(each.run, device).seconds)
        ]
        factors[action] = sum(took for took, _ in pairs) / sum(thought for _, thought in pairs) if pairs else 1.0
    return {run.id: factors[run.action] * estimate(run, device).seconds for run in runs}


def _work(run: Run) -> tuple[float, float]:
    """(tokens once through the model, operations a token and parameter)."""
    settings = run.settings
    if run.action == "finetune":
        return _training_tokens(run), 6.0 if settings["preset"] == "full" else 4.0
    if run.action == "stability":
        return 2.0 * settings["tokens"], 2.0
    return sum(_scored_tokens(task, settings) for task in settings["tasks"]), 2.0


def _training_tokens(run: Run) -> float:
    settings = run.settings
    name = str(run.free["dataset"]).lower()
    rows, length = next((DATASETS[each] for each in DATASETS if each in name), (math.nan, math.nan))
    length = min(length, settings["max_length"])
    if settings["max_steps"] is None:
        part = re.search(r"\[:(\d+)(%?)\]$", settings["split"])
        if part:
            rows = rows * int(part[1]) / 100 if part[2] else min(rows, int(part[1]))
        return rows * length * settings["epochs"]
    batch = settings["effective_batch_size"] or settings["batch_size"] * (settings["gradient_accumulation"] or 1)
    return settings["max_steps"] * batch * (settings["max_length"] if settings["packing"] else length)


def _scored_tokens(task: str, settings: dict) -> float:
    total = 0.0
    for name in GROUPS.get(task, (task,)):
        known = TASKS.get("mini" if name.startswith("mini_") else name)
        if known is None:
            return math.nan
        documents, sequences, length, example = known
        if settings["limit"]:
            documents = min(documents, settings["limit"] * (57 if name == "mmlu" else 1))
        for shots in SHOTS if task in GROUPS else (settings["num_fewshot"] or 0,):
            total += documents * sequences * (length + shots * example)
    return total
