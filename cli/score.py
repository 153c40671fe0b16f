"""From a fine-tuned model to its score: the lm_eval command for a run's result, printed or run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from typing import Any

from rich.console import Console

from peft_mamba.checkpoints import EMBEDDED

from .outputs import RUN, RunDirectory
from .settings import Settings

LAUNCHER = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE",
}  # fmt: skip


def evaluation_command(settings: Settings, tasks: str) -> list[str]:
    """The lm_eval command line that scores a run's result."""
    if settings.preset == "full":
        names = {"pretrained": settings.output}
    else:
        names = {"pretrained": settings.model, "peft": settings.output}
        if settings.revision:
            names["revision"] = settings.revision
    names["dtype"] = settings.precision
    if settings.kernels:
        names["kernels"] = settings.kernels.replace(",", "+")  # the comma separates lm_eval's own arguments
    arguments = ",".join(f"{name}={value}" for name, value in names.items())
    return ["lm_eval", "--model", "mamba_amp", "--model_args", arguments, "--tasks", tasks]


def score(
    console: Console, directory: RunDirectory, settings: Settings, result: dict[str, Any], evaluate: str | None
) -> int:
    """Say how to score the result; with `evaluate`, do so and add the figures to run.json. Returns lm_eval's status."""
    tasks = evaluate or ("icl_gap_mini" if settings.model in EMBEDDED else "icl_gap")
    command = evaluation_command(settings, tasks)
    if evaluate is None:
        console.print(f"Score it:\n  {shlex.join(command)}", highlight=False, soft_wrap=True)
        return 0
    scores = directory.path / "eval"
    command += ["--output_path", str(scores)]
    if settings.device == "cpu":
        command += ["--device", "cpu"]
    console.print(f"Scoring it:\n  {shlex.join(command)}", highlight=False, soft_wrap=True)
    # Without what a launcher set for the processes of the training: this is one process.
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    status = subprocess.run([sys.executable, "-m", *command], env=environment).returncode
    if status:
        console.print(
            f"lm_eval ended with status {status}; the fine-tuned model and {RUN} are complete.",
            highlight=False,
            soft_wrap=True,
        )
        return status
    newest = max(scores.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    contents = json.loads(newest.read_text(encoding="utf-8"))
    shown = {key: contents[key] for key in ("results", "groups") if key in contents}
    directory.write_run({**result, "evaluation": {"command": shlex.join(command), "file": str(newest), **shown}})
    return 0
