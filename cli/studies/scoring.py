"""Scores a model with lm-eval, in this process, and keeps what a report needs of it in lm-eval's own files.

`mamba-study compare` and `lm_eval_mamba.results.read` take these files as they take those of `lm_eval --log_samples`;
prompts and documents are left out of the samples, their hashes are not.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from .runs import Run

# Of a sample, what figures and the pairing of documents need.
_KEPT = ("doc_id", "doc_hash", "prompt_hash", "target_hash", "metrics", "loglikelihoods")


def model_arguments(run: Run, finetuned: Path | None) -> dict[str, Any]:
    """`--model_args` of the backend mamba_amp for a run; `finetuned` is mamba-ft's directory, if it scores one."""
    settings, free = run.settings, run.free
    arguments: dict[str, Any] = {"dtype": "fp32" if settings["precisions"] else settings["dtype"]}
    if run.needs is None:
        arguments["pretrained"] = free["model"]
        optional = {"revision": free["revision"], "peft": free["peft"], "tokenizer": settings["tokenizer"]}
        arguments["trust_remote_code"] = settings["trust_remote_code"]
    elif run.needs.settings["preset"] == "full":
        arguments["pretrained"] = str(finetuned)
        arguments["trust_remote_code"] = run.needs.settings["trust_remote_code"]
        optional = {}
    else:
        arguments |= {"pretrained": free["base"], "peft": str(finetuned)}
        arguments["trust_remote_code"] = run.needs.settings["trust_remote_code"]
        optional = {"revision": free["revision"]}
    return arguments | {name: value for name, value in optional.items() if value is not None}


def evaluate(settings: dict[str, Any], arguments: dict[str, Any], device: str | None) -> dict[str, Any]:
    """lm-eval's results, with samples."""
    from lm_eval.evaluator import simple_evaluate

    precisions = settings["precisions"]
    metadata = {"precisions": "+".join(precisions), "reference": precisions[0]} if precisions else {}
    if precisions:
        arguments = arguments | metadata
    results = simple_evaluate(
        model="mamba_amp",
        model_args=arguments,
        tasks=list(settings["tasks"]),
        num_fewshot=settings["num_fewshot"],
        batch_size=settings["batch_size"],
        device=device,
        limit=settings["limit"],
        log_samples=True,
        task_manager=_task_manager(tuple(metadata.items())),
        fewshot_random_seed=settings["fewshot_seed"],
        bootstrap_iters=0,
    )
    assert results is not None  # None is for ranks above 0
    return results


@functools.lru_cache(maxsize=4)
def _task_manager(metadata: tuple[tuple[str, str], ...]) -> Any:
    """lm-eval's index of tasks, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(metadata=dict(metadata))


def save(results: dict[str, Any], folder: Path, name: str) -> None:
    """Write results and samples as `lm_eval --output_path … --log_samples` does, without prompts."""
    from lm_eval.utils import handle_non_serializable

    folder.mkdir(parents=True)
    samples = results["samples"]
    shown = {key: value for key, value in results.items() if key != "samples"}
    text = json.dumps(shown, indent=2, default=handle_non_serializable, ensure_ascii=False)
    (folder / f"results_{name}.json").write_text(text + "\n", encoding="utf-8")
    for task, of_task in samples.items():
        lines = (json.dumps(_slim(sample), default=handle_non_serializable) for sample in of_task)
        (folder / f"samples_{task}_{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _slim(sample: dict[str, Any]) -> dict[str, Any]:
    kept = [name for name in sample["metrics"] if name not in ("rescored", "loglikelihoods")]
    slim = {name: sample[name] for name in (*_KEPT, *kept) if name in sample}
    if "loglikelihoods" not in sample:  # of a divergence task, they are these in another form
        slim["filtered_resps"] = [
            [str(part) for part in answer] if isinstance(answer, tuple | list) else answer
            for answer in sample["filtered_resps"]
        ]
    return slim
