"""What `mamba-ft` prints: the plan before a run, its figures after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from peft_mamba import kernels
from peft_mamba.mixers import mixers_of
from peft_mamba.precision import Precision

from .data import TrainingData
from .memory import MemoryEstimate
from .model import matched_modules
from .progress import gib
from .settings import DEFAULT_BATCH_SIZE, Recipe, Settings


def print_plan(
    console: Console,
    recipe: Recipe,
    precision: Precision,
    device: torch.device,
    data: TrainingData,
    model: Any,
    ranks: Mapping[str, int],
) -> None:
    table = Table("setting", "value", "from", title="mamba-ft", title_justify="left")
    for name, value in asdict(recipe.settings).items():
        if value is not None:
            table.add_row(name, str(value), recipe.sources.get(name, ""))
    console.print(table)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    modules = ", ".join(f"{count} {kind}" for kind, count in matched_modules(model).items())
    lines = [
        f"data: {data.source} ({data.form}), {len(data.train):,} rows to train on"
        + (f", {len(data.evaluation):,} held out" if data.evaluation is not None else ""),
        f"trains: {modules}",
        f"trainable: {trainable:,} of {total:,} parameters ({trainable / total:.2%})",
        f"precision {precision}; loss scaling {'on' if precision.loss_scaling else 'off'}"
        f" ({precision.reasons['loss_scaling']})",
    ]
    if ranks:
        capped = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
        lines.append(f"ranks: {capped} (all that these layers hold), {recipe.settings.r} elsewhere")
    if mixers_of(model):
        lines.append("kernels: {kernels} ({reason})".format(**kernels.describe(device.type)))
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def print_memory(console: Console, needs: MemoryEstimate, settings: Settings) -> None:
    batch = DEFAULT_BATCH_SIZE if settings.batch_size == "auto" else int(settings.batch_size)
    tokens = batch * settings.max_length
    parts = {
        "weights": needs.weights,
        "gradients": needs.gradients,
        "AdamW": needs.optimizer,
        "copies of weights": needs.copies,
        f"activations of {batch} x {settings.max_length} tokens": tokens * needs.activations_per_token,
    }
    level = f" with --recompute {settings.recompute}" if settings.recompute else ""
    console.print(
        f"memory{level}: about {gib(needs.total(tokens))}: "
        f"{', '.join(f'{name} {gib(size)}' for name, size in parts.items())} "
        f"({needs.activations_per_token / 1024:,.0f} KiB a token); the loss's workspace and the allocator's fragments "
        "come on top.",
        highlight=False,
        soft_wrap=True,
    )


def print_figures(console: Console, result: dict[str, Any]) -> None:
    table = Table("figure", "value", title="result", title_justify="left")
    loss = result["held_out_loss"]
    if loss:
        table.add_row("held-out loss", f"{loss['before']:.4f} before, {loss['after']:.4f} after")
    rows = (
        ("ATPS, tokens per second", result["atps"], "{:,.0f}"),
        ("  after the first step", result["atps_after_first_step"], "{:,.0f}"),
        ("MMPT, bytes per token", result["mmpt_bytes"], "{:,.0f}"),
        ("  padding counted as tokens", result["mmpt_bytes_with_padding"], "{:,.0f}"),
        ("tokens", result["tokens"], "{:,}"),
        ("padding", result["padding_tokens"], "{:,}"),
        ("training time, seconds", result["training_seconds"], "{:,.1f}"),
    )
    for name, value, form in rows:
        table.add_row(name, "" if value is None else form.format(value))
    table.add_row("peak memory", gib(result["peak_memory_bytes"]))
    table.add_row("trainable parameters", f"{result['trainable_parameters']:,}")
    table.add_row("matched modules", ", ".join(f"{n} {kind}" for kind, n in result["matched_modules"].items()))
    table.add_row("precision", result["precision"]["name"])
    if result["skipped_steps"]:
        table.add_row("steps skipped by the loss scaler", str(result["skipped_steps"]))
    console.print(table)
