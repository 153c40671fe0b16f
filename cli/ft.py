"""`mamba-ft`: fine-tune a Mamba, a Mamba-2 or another causal LM with TRL, in one line.

mamba-ft --preset sll --precision fp16
mamba-ft --model state-spaces/mamba-370m-hf --dataset tatsu-lab/alpaca --preset all --precision bf16 -o out/
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click
import yaml

from .settings import ADAPTER_ONLY, PRESET_CHOICES, RECOMPUTE_CHOICES

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr", "polynomial", "inverse_sqrt")
# Options that say what to do and not what the run is.
_ACTIONS = ("config", "resume", "dry_run", "evaluate")


class _BatchSize(click.ParamType):
    name = "integer|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        if value == "auto":
            return "auto"
        return click.IntRange(min=1).convert(value, param, ctx)


def _read_config(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:
    """Take the defaults of all options from a YAML file; what is on the command line goes before it."""
    if path is None:
        return None
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise click.BadParameter(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise click.BadParameter(f"{path} holds a {type(values).__name__}; expected one 'option: value' a line.")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    known = {each.name for each in ctx.command.params} - {"config", "help"}
    if unknown := sorted(values.keys() - known):
        raise click.BadParameter(
            f"{path} sets {', '.join(unknown)}, which mamba-ft has no option for. There are {', '.join(sorted(known))}."
        )
    ctx.default_map = {name: value for name, value in values.items() if value is not None}
    return path


def _positive(**kwargs: Any) -> Any:
    return click.FloatRange(min=0, min_open=True, **kwargs)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--model",
    default="mini",
    show_default=True,
    help="Hub id, local directory (transformers or original "
    "state-spaces format), or an embedded checkpoint: mini (Mamba), mini-2 (Mamba-2).",
)
@click.option("--revision", help="Branch, tag or commit of a hub model. [default: main]")
@click.option("--trust-remote-code/--no-trust-remote-code", default=False, help="Run code that the model brings along.")
@click.option(
    "--dataset",
    default="embedded",
    show_default=True,
    help="Hub id, local .jsonl, .json, .csv or .parquet "
    "file, or directory; Alpaca, ShareGPT, messages, prompt and completion, or text.",
)
@click.option("--dataset-name", help="Configuration of a hub data set that has several.")
@click.option("--dataset-revision", help="Branch, tag or commit of a hub data set. [default: main]")
@click.option(
    "--split", default="train", show_default=True, help="Split to train on, as datasets writes it: train[:10%]."
)
@click.option(
    "--eval-split",
    help="Split for the held-out loss, or a share of the training rows to hold out: 0.05. "
    "[default: none; the embedded set has its own]",
)
@click.option(
    "--loss-on",
    type=click.Choice(["response", "all"]),
    default="response",
    show_default=True,
    help="Which tokens the loss is over: the responses, or prompts too.",
)
@click.option(
    "--preset",
    type=click.Choice(PRESET_CHOICES),
    default="sll",
    show_default=True,
    help="What trains: every weight (full), or a LoRA on all linear layers, the papers' selection (sll), the "
    "layer of Δ, B and C (w), or all but that one (not-w).",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="fp32 weights always; fp16 and bf16 are autocast, fp16 with loss scaling.",
)
@click.option("--r", type=click.IntRange(min=1), help="Rank of the LoRA. [default: the papers', by model size]")
@click.option("--alpha", type=_positive(), help="LoRA's alpha; the update is scaled by alpha/r. [default: 2 r]")
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), help="LoRA's dropout. [default: 0]")
@click.option("--learning-rate", type=_positive(), help="Of AdamW. [default: the papers', by model size]")
@click.option("--schedule", type=click.Choice(SCHEDULES), help="Of the learning rate. [default: cosine]")
@click.option("--warmup-steps", type=click.IntRange(min=0), help="[default: 0, as in the papers]")
@click.option("--weight-decay", type=click.FloatRange(min=0), help="[default: 0]")
@click.option("--max-grad-norm", type=click.FloatRange(min=0), help="Gradient clipping, 0 for none. [default: 1]")
@click.option(
    "--epochs", type=_positive(), help="[default: the papers', by data set: Alpaca 3, OpenHermes 1, LIMA 5; else 3]"
)
@click.option("--max-steps", type=click.IntRange(min=1), help="Optimizer steps, in place of --epochs.")
@click.option(
    "--batch-size",
    type=_BatchSize(),
    help="Sequences a device and forward pass, or auto: the largest that "
    "fits, with gradient accumulation up to the effective batch. [default: 8]",
)
@click.option("--gradient-accumulation", type=click.IntRange(min=1), help="Forward passes a step. [default: 1]")
@click.option(
    "--effective-batch-size",
    type=click.IntRange(min=1),
    help="With --batch-size auto: sequences a step over all devices. [default: 8]",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    help="Tokens of a sequence, longer ones are cut. [default: 512, as in the papers]",
)
@click.option(
    "--packing/--no-packing",
    default=False,
    help="Fill sequences of --max-length with several documents, whose states are kept apart.",
)
@click.option(
    "--recompute",
    type=click.Choice(RECOMPUTE_CHOICES),
    help="What a Mamba block makes again in backward rather than keep it: nothing (none), what is cheap (mixer), "
    "everything but its input (block); auto: the first of these that fits. [default: auto]",
)
@click.option(
    "--cuda-graphs/--no-cuda-graphs",
    default=None,
    help="On a GPU, launch the kernels of a Mamba's layers all at once while batches keep their size, as they do with "
    "--packing. [default: for adapters]",
)
@click.option(
    "--precast/--no-precast",
    default=None,
    help="On a GPU in fp16 or bf16, cast the frozen weights of a Mamba's mixers once and keep their fp32 originals in "
    "host memory, in place of casting them in every step; the results are the same. [default: for adapters]",
)
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing",
    default=False,
    help="transformers' own, for models of any family: every layer runs again in backward.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the adapter's initial weights, dropout and the order of the data.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--kernels",
    help="Which kernels the scans and convolutions run: reference, torch, triton, mamba_ssm, or by operation: "
    "selective_scan=mamba_ssm+ssd=triton. [default: PEFT_MAMBA_KERNELS, else the fastest on the device]",
)
@click.option(
    "--eval-steps",
    type=click.IntRange(min=1),
    help="Steps between held-out losses. [default: at the start and at the end]",
)
@click.option("--logging-steps", type=click.IntRange(min=1), default=10, show_default=True)
@click.option(
    "--save-steps",
    type=click.IntRange(min=0),
    default=500,
    show_default=True,
    help="Steps between checkpoints; 0 for none, and then nothing to resume from.",
)
@click.option(
    "--save-total-limit", type=click.IntRange(min=1), default=2, show_default=True, help="Checkpoints to keep."
)
@click.option(
    "--report-to", default="none", show_default=True, help="As in transformers: wandb, tensorboard, trackio, …"
)
@click.option(
    "-o", "--output", help="Directory of the run. [default: mamba-ft-runs/<model>-<preset>-<precision>-<time>]"
)
@click.option("--eval", "evaluate", metavar="TASKS", help="lm-eval tasks to score the result on, separated by commas.")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="YAML file with any of these options; the command line goes before it.",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --output, from its last complete checkpoint.")
@click.option(
    "--dry-run", is_flag=True, help="Print recipe, matched modules, trainable parameters and a memory estimate."
)
@click.version_option(package_name="lm-eval-mamba")
@click.pass_context
def main(ctx: click.Context, **options: Any) -> None:
    """Fine-tune a Mamba, a Mamba-2 or another causal LM with TRL.

    Without names, the embedded model learns the embedded instruction set: that runs anywhere, in seconds.
    Defaults are the recipes of "Mamba State-Space Models Are Lyapunov-Stable Learners" and are printed.
    """
    resume, dry_run, evaluate = (options.pop(name) for name in ("resume", "dry_run", "evaluate"))
    sources = {name: _source(ctx, name) for name in options}
    if resume:
        options, sources = _of_the_run(options, sources)
    # Imported now: torch, transformers and TRL take seconds, which --help and a typing error need not wait for.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from peft_mamba import kernels

    from .errors import explained
    from .finetune import finetune

    with explained(options), kernels.use(options["kernels"]):
        status = finetune(options, sources, resume=resume, dry_run=dry_run, evaluate=evaluate)
    sys.exit(status)


def _source(ctx: click.Context, name: str) -> str:
    origin = ctx.get_parameter_source(name)
    if origin is click.core.ParameterSource.DEFAULT_MAP:
        return "the config file"
    return "the default" if origin is click.core.ParameterSource.DEFAULT else "the command line"


def _of_the_run(options: dict[str, Any], sources: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The options of the run in --output, and above them what was said now."""
    if options["output"] is None:
        raise click.UsageError("--resume goes on with the run in a directory: give it with -o.")
    recipe = Path(options["output"]) / "recipe.yaml"
    if not recipe.is_file():
        raise click.UsageError(
            f"--resume: {options['output']} holds no run of mamba-ft (no recipe.yaml). Leave out --resume to begin one."
        )
    stored = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    said = {name: value for name, value in options.items() if sources[name] != "the default" and value is not None}
    if stored["preset"] == "full":
        stored = {name: value for name, value in stored.items() if name not in ADAPTER_ONLY}
    merged = {name: stored.get(name) for name in options} | said
    return merged, {name: sources[name] if name in said else "the run" for name in merged}


if __name__ == "__main__":
    main()
