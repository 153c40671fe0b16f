"""One run of `mamba-ft`, from options to figures: what the command calls."""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, set_seed
from trl import SFTConfig

from peft_mamba import checkpoints, kernels, precast_frozen_weights, report
from peft_mamba.mixers import LEVELS, recompute, use_cuda_graphs
from peft_mamba.mixers.packing import packing_support
from peft_mamba.precision import Precision
from peft_mamba.provenance import git_state, versions

from . import distributed
from . import model as models
from .data import TrainingData, load_data, prepare_tokenizer
from .measures import figures
from .memory import estimate, fit
from .outputs import RunDirectory
from .progress import ShowProgress, StopOnSignal
from .score import score
from .settings import Recipe, Settings, SettingsError, resolve
from .tables import print_figures, print_memory, print_plan
from .trainer import MambaTrainer

INTERRUPTED = 130  # the shell's status of a command that Ctrl-C ended


def finetune(
    options: Mapping[str, Any], sources: Mapping[str, str], *, resume: bool, dry_run: bool, evaluate: str | None
) -> int:
    """Plan, train, save, report; returns the exit status.

    Args:
        options: settings by name, None where not given.
        sources: who gave each.
        resume: go on with the run in `options["output"]`.
        dry_run: print what would be done, and stop.
        evaluate: lm-eval tasks for the result, separated by commas.
    """
    options = dict(options)
    process = _start(options)
    console = Console(quiet=not process.is_main_process)
    precision = Precision.parse(options["precision"])
    precision.check_device(process.device)
    kernels.select(process.device.type)  # forced ones that cannot run are refused before a model is loaded
    if options["output"] is None:
        options["output"] = _name_of(options)
    directory = RunDirectory(options["output"])
    if not (resume or dry_run):
        on_main_process(process, directory.check_free)
    if resume and directory.finished:
        console.print(f"The run in {directory.path} is finished.", highlight=False, soft_wrap=True)
        finished = directory.read_run()
        print_figures(console, finished)
        return score(console, directory, Settings(**finished["settings"]), finished, evaluate)
    bare = models.skeleton(options)
    recipe = resolve(options, sources, models.facts(bare))
    settings = recipe.settings
    for option, wanted, problem in (
        ("cuda_graphs", settings.cuda_graphs, _no_graphs(process)),
        ("precast", settings.precast, _no_precast(process)),
    ):
        if wanted and problem and recipe.sources.get(option) == "the command line":
            raise SettingsError(f"--{option.replace('_', '-')}: {problem}. Leave it out.")
    tokenizer = models.load_tokenizer(settings)
    data = load_data(
        settings.dataset,
        name=settings.dataset_name,
        split=settings.split,
        eval_split=settings.eval_split,
        revision=settings.dataset_revision,
        loss_on=settings.loss_on,
        seed=settings.seed,
    )
    tokenizer = prepare_tokenizer(tokenizer, data.form, settings.loss_on)
    adapted, ranks = models.with_adapter(bare, settings)
    print_plan(console, recipe, precision, process.device, data, adapted, ranks)
    if dry_run:
        for level in LEVELS if settings.recompute == "auto" else (settings.recompute,):
            chosen = replace(settings, recompute=level, precast=settings.precast and not _no_precast(process))
            print_memory(console, estimate(adapted, chosen, precision, process.device), chosen)
        return 0
    del bare, adapted
    with contextlib.ExitStack() as held:
        result = _run(process, console, recipe, tokenizer, data, precision, directory, resume, held)
    if result is None:
        return INTERRUPTED
    if process.is_main_process:
        gc.collect()
        torch.cuda.empty_cache()  # lm_eval, which may follow, is another process
        print_figures(console, result)
        return score(console, directory, Settings(**result["settings"]), result, evaluate)
    return 0


def _run(
    process: PartialState,
    console: Console,
    recipe: Recipe,
    tokenizer: Any,
    data: TrainingData,
    precision: Precision,
    directory: RunDirectory,
    resume: bool,
    held: contextlib.ExitStack,
) -> dict[str, Any] | None:
    """Load, train and save; returns the run's figures, or None if a signal stopped it. `held` ends after it."""
    settings = recipe.settings
    # FSDP moves each process' shard to its device itself.
    device = torch.device("cpu") if distributed.sharded_launch() else process.device
    model, ranks = models.with_adapter(models.load(settings, device), settings)
    if settings.packing and (problem := packing_support(model, process.device.type)):
        raise SettingsError(f"--packing: {problem}")
    settings = _with_precast(model, settings, process, console, held)
    settings = _with_what_fits(model, settings, precision, process, console)
    if settings.recompute is not None:
        recompute(model, settings.recompute)
    settings = _with_graphs(model, settings, process, console)
    identity = {
        "data": data.fingerprint,
        "processes": process.num_processes,
        "model": checkpoints.describe(model)["commit"] or "local",
    }
    checkpoint = _claim(directory, settings, identity, resume, process, console)
    trainer = _trainer(model, tokenizer, data, settings, precision, directory, console)
    trainer.args.eval_on_start = data.evaluation is not None and checkpoint is None
    with StopOnSignal(process.device) as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.stopped:
        console.print(
            f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; everything is saved. Go on:"
            f"\n  mamba-ft -o {shlex.quote(settings.output)} --resume",
            highlight=False,
            soft_wrap=True,
        )
        return None
    return _finish(trainer, recipe, settings, data, ranks)


def _start(options: Mapping[str, Any]) -> PartialState:
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    # TRL 1.16 names it by transformers' old name.
    warnings.filterwarnings("ignore", message=".*checkpointing` is deprecated", category=FutureWarning)
    device = options["device"]
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: torch sees no CUDA device here. Use --device cpu, or install a CUDA torch.")
    on_cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # the trainer's accelerator reads it
    return PartialState(cpu=on_cpu)


def _name_of(options: Mapping[str, Any]) -> str:
    """A new directory for a run without a name, the same in all processes."""
    model = Path(options["model"]).name
    name = f"mamba-ft-runs/{model}-{options['preset']}-{options['precision']}-{time.strftime('%Y%m%d-%H%M%S')}"
    return broadcast_object_list([name])[0]


def _claim(
    directory: RunDirectory,
    settings: Settings,
    identity: dict[str, Any],
    resume: bool,
    process: PartialState,
    console: Console,
) -> Path | None:
    """Make the output directory ours; the checkpoint to go on from, if any."""
    on_main_process(process, lambda: (directory.resume if resume else directory.begin)(settings, identity))
    if not resume:
        return None
    checkpoint = directory.last_checkpoint
    console.print(
        f"Going on from {checkpoint or 'the start: no checkpoint had been written'}.", highlight=False, soft_wrap=True
    )
    return checkpoint


def on_main_process(process: PartialState, check: Callable[[], None]) -> None:
    """Run a check of shared files in one process, before any other goes on; what it raises, all raise."""
    outcome: list[Exception | None] = [None]
    if process.is_main_process:
        try:
            check()
        except (SettingsError, OSError) as error:
            outcome = [error]
    problem = broadcast_object_list(outcome)[0]
    if problem is not None:
        raise problem


def _with_what_fits(
    model: Any, settings: Settings, precision: Precision, process: PartialState, console: Console
) -> Settings:
    """The settings with batch size and recomputation in place of auto."""
    if "auto" not in (settings.batch_size, settings.recompute):
        return settings
    size, level = fit(model, settings, precision, process.device, process.num_processes)
    if settings.batch_size == "auto":
        assert settings.effective_batch_size is not None
        accumulation = settings.effective_batch_size // (size * process.num_processes)
        console.print(
            f"--batch-size auto: {size} sequences a device, {accumulation} forward passes a step, "
            f"{settings.effective_batch_size} sequences a step.",
            highlight=False,
            soft_wrap=True,
        )
        settings = replace(settings, batch_size=size, gradient_accumulation=accumulation, effective_batch_size=None)
    if settings.recompute == "auto":
        console.print(f"--recompute auto: {level}.", highlight=False, soft_wrap=True)
    return replace(settings, recompute=level)


def _no_graphs(process: PartialState) -> str | None:
    """Why there are no CUDA graphs where this runs, if so."""
    if process.device.type != "cuda":
        return f"this runs on {process.device.type}"
    return f"they are for one device, and there are {process.num_processes}" if process.num_processes > 1 else None


def _with_graphs(model: Any, settings: Settings, process: PartialState, console: Console) -> Settings:
    """Switch CUDA graphs on where they are wanted, and can be had."""
    if not settings.cuda_graphs or process.device.type != "cuda":
        return settings
    if problem := _no_graphs(process):
        console.print(f"--cuda-graphs: off, {problem}.", highlight=False, soft_wrap=True)
        return replace(settings, cuda_graphs=False)
    use_cuda_graphs(model)
    return settings


def _no_precast(process: PartialState) -> str | None:
    """Why frozen weights are not held in half precision where this runs, if so."""
    if process.device.type != "cuda":
        return f"this runs on {process.device.type}, in whose memory the fp32 weights would lie beside the others"
    return f"it is for one device, and there are {process.num_processes}" if process.num_processes > 1 else None


def _with_precast(
    model: Any, settings: Settings, process: PartialState, console: Console, held: contextlib.ExitStack
) -> Settings:
    """Hold frozen weights in half precision until `held` ends, where that is wanted, and can be had."""
    if not settings.precast:
        return settings
    if problem := _no_precast(process):
        if process.device.type != "cuda":
            return settings
        console.print(f"--precast: off, {problem}.", highlight=False, soft_wrap=True)
        return replace(settings, precast=False)
    held.enter_context(precast_frozen_weights(model, settings.precision))
    # The originals come back to where the model is then. On the device, where nothing reads them, may be no room.
    held.callback(model.to, "cpu")
    return settings


def _trainer(
    model: Any,
    tokenizer: Any,
    data: TrainingData,
    settings: Settings,
    precision: Precision,
    directory: RunDirectory,
    console: Console,
) -> MambaTrainer:
    evaluates = data.evaluation is not None
    batch_size = int(settings.batch_size)
    arguments = SFTConfig(
        output_dir=settings.output,
        use_cpu=PartialState().device.type == "cpu",
        # Our own precision instead of accelerate's: see trainer.py
        bf16=False,
        fp16=False,
        tf32=False if torch.cuda.is_available() else None,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        num_train_epochs=settings.epochs or 1.0,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation or 1,
        gradient_checkpointing=settings.gradient_checkpointing,
        max_length=settings.max_length,
        packing=settings.packing,
        seed=settings.seed,
        eval_strategy="steps" if evaluates and settings.eval_steps else "no",
        eval_steps=settings.eval_steps,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=settings.save_total_limit,
        report_to=settings.report_to,
        disable_tqdm=True,
        prediction_loss_only=True,
        **dict[str, Any](data.loss),
    )
    set_seed(settings.seed)
    trainer = MambaTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        precision=precision,
        directory=directory,
        full_batches=bool(settings.cuda_graphs and settings.packing and PartialState().device.type == "cuda"),
    )
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    trainer.add_callback(ShowProgress(trainer.meter, console))
    return trainer


def _finish(
    trainer: MambaTrainer, recipe: Recipe, settings: Settings, data: TrainingData, ranks: Mapping[str, int]
) -> dict[str, Any]:
    """Save the result and gather the run's figures; writes run.json on the first process."""
    trainer.meter.stop()
    model: Any = trainer.model
    losses = [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]
    if data.evaluation is not None and (not losses or losses[-1][0] != trainer.state.global_step):
        losses.append((trainer.state.global_step, trainer.evaluate()["eval_loss"]))
    if settings.preset == "full":
        model.config.use_cache = True  # Trainer switches it off, and the result is for use
    trainer.save_result()
    tallies = gather_object([trainer.meter.tally])
    described = report(model)
    result = {
        "model": checkpoints.describe(model),
        "precision": trainer.precision.as_dict(),
        "settings": asdict(settings),
        "sources": recipe.sources,
        "data": {"form": data.form, "fingerprint": data.fingerprint, "rows": len(data.train)},
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "held_out_loss": {"before": losses[0][1], "after": losses[-1][1]} if losses else None,
        **figures(tallies),
        "trainable_parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
        "matched_modules": models.matched_modules(model),
        "capped_ranks": dict(ranks),
        "kernels": described.kernels,
        "processes": trainer.accelerator.num_processes,
        "distributed": str(trainer.accelerator.distributed_type),
        "device": _device_name(trainer.args.device),
        "versions": versions("trl", "datasets"),
        "git": git_state(),
        "loss_history": [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry],
    }
    if trainer.args.should_save:
        trainer.directory.write_run(result)
    return result


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
