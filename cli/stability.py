"""`mamba-study stability`: Lyapunov exponents of a model's recurrences on a text, and how a small error in it grows.

mamba-study stability --model mini-2
mamba-study stability --model state-spaces/mamba-130m-hf --peft out/ --text book.txt --tokens 1024 --output report.json
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from peft_mamba.stability import Growth, Stability

EMBEDDED_TEXT = "embedded"


def _positive(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise click.BadParameter(
            f"{value:g} perturbs nothing that can be measured; give a number above 0, such as 1e-3."
        )
    return value


@click.command("stability")
@click.option("--model", required=True, help="mini, mini-2, a local directory or a hub id: a Mamba or a Mamba-2.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--peft", metavar="DIR", help="Put this PEFT adapter (directory or hub id) on the model.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 file to read. Default for mini and mini-2: held-out documents of their world.",
)
@click.option("--tokens", type=click.IntRange(min=2), default=256, show_default=True, help="How much of it to read.")
@click.option(
    "--epsilon",
    type=float,
    default=1e-3,
    show_default=True,
    callback=_positive,
    help="Perturbation of the first token's embedding, as a share of its length.",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    default=("fp32", "fp16", "bf16"),
    show_default=True,
    help="Precision in which its growth is measured; may be given more than once.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the perturbation's direction.")
@click.option("--device", help="cpu, cuda, cuda:1, …  Default cuda where there is one.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the report as JSON, too.")
def stability_command(
    model: str,
    revision: str | None,
    peft: str | None,
    text: Path | None,
    tokens: int,
    epsilon: float,
    precisions: tuple[str, ...],
    seed: int,
    device: str | None,
    output: Path | None,
) -> None:
    """How stable a Mamba's recurrence is on real text.

    Per layer the maximal Lyapunov exponent, max over i of A[i,i] · mean over t of Δ̄_t[i,i], in nats per token, and its
    distribution over channels (Mamba) or heads (Mamba-2), in fp32: never positive, and the nearer to zero, the longer
    a deviation of the state lasts. Then what becomes of a small perturbation of the first token, in the states and in
    the logits, in each precision.
    """
    import torch
    import transformers
    from rich.console import Console

    from peft_mamba import KernelError, TargetError, kernels
    from peft_mamba.adapter_io import AdapterError, SavedAdapter
    from peft_mamba.checkpoints import AutoMambaForCausalLM, CheckpointError, describe
    from peft_mamba.precision import Precision, PrecisionError
    from peft_mamba.provenance import versions
    from peft_mamba.stability import StabilityError, analyse

    transformers.logging.disable_progress_bar()
    try:
        where = torch_device(device)
        parsed = list({each.name: each for each in map(Precision.parse, precisions)}.values())
        for precision in parsed:
            precision.check_device(where)
        kernels.select(where.type)
        _check_family(model, revision)
        input_ids = _read(model, revision, text, tokens)
        adapter = SavedAdapter.read(peft) if peft else None
        loaded: Any = AutoMambaForCausalLM.from_pretrained(model, revision=revision, device_map={"": where})
        if adapter is not None:
            loaded = adapter.apply(loaded)
        found = analyse(loaded, input_ids, epsilon=epsilon, precisions=parsed, seed=seed)
    except (AdapterError, CheckpointError, KernelError, PrecisionError, StabilityError, TargetError) as error:
        raise click.ClickException(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise click.ClickException(
            f"{where} does not hold {model} with two runs of {tokens} tokens ({str(error).splitlines()[0]}). Try "
            f"--tokens {max(tokens // 4, 2)} or --device cpu."
        ) from error
    unit = "heads" if describe(loaded)["family"] == "mamba2" else "channels"
    console = Console()
    console.print(_exponents_table(found, model, unit))
    console.print(_growth_table(found))
    if output is not None:
        report = {
            "model": describe(loaded),
            "peft": peft,
            "text": {
                "source": EMBEDDED_TEXT if text is None else str(text),
                "tokens": found.tokens,
                "sha256_of_ids": hashlib.sha256(json.dumps(input_ids.tolist()).encode()).hexdigest(),
            },
            "device": str(where),
            "kernels": kernels.describe(where.type),
            "versions": versions(),
            "precisions": [precision.as_dict() for precision in parsed],
            "exponents": {"unit": unit, "in": "nats per token", "layers": [asdict(layer) for layer in found.layers]},
            "perturbation": {"epsilon": found.epsilon, "seed": found.seed, "of": "the embedding of the first token"},
            "growth": [asdict(growth) for growth in found.growth],
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        contents = json.dumps(finite(report), indent=2, allow_nan=False, ensure_ascii=False)
        output.write_text(contents + "\n", encoding="utf-8")


def torch_device(name: str | None) -> torch.device:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise click.BadParameter(
            f"torch cannot use {name!r} ({reason}); give cpu, or a device that it sees.", param_hint="--device"
        ) from error
    if device.type == "meta":
        raise click.BadParameter("'meta' holds no values; give cpu or cuda.", param_hint="--device")
    return device


def _check_family(model: str, revision: str | None) -> None:
    from peft_mamba.checkpoints import load_config

    family = load_config(model, revision=revision).model_type
    if family not in ("mamba", "mamba2"):
        raise click.BadParameter(
            f"{model} is a model of type {family}; the exponents are those of the recurrences of Mamba and Mamba-2. "
            "Give one of these, such as mini or state-spaces/mamba-130m-hf.",
            param_hint="--model",
        )


def _read(model: str, revision: str | None, text: Path | None, tokens: int) -> torch.Tensor:
    """(tokens,) ids of the file's beginning, or of the embedded world."""
    from peft_mamba.checkpoints import EMBEDDED

    if text is None and model not in EMBEDDED:
        raise click.UsageError(
            f"{model} needs --text FILE, a text like those that it is used on; only {' and '.join(EMBEDDED)} bring "
            "their own."
        )
    written = None
    if text is not None:
        try:
            written = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise click.BadParameter(
                f"{text} cannot be read as UTF-8 text ({error}); give a plain text file.", param_hint="--text"
            ) from error
    try:
        return token_ids(model, revision, written, tokens)
    except TooShortError as error:
        raise click.BadParameter(
            f"{text} has {error.there} tokens of {model}'s tokenizer, and --tokens asks for {tokens}. Give a longer "
            "text " + (f"or --tokens {error.there}." if error.there > 1 else "."),
            param_hint="--text",
        ) from error


class TooShortError(ValueError):
    """A text with fewer tokens than asked for: `there`."""

    def __init__(self, there: int, tokens: int) -> None:
        super().__init__(f"the text has {there} tokens, not {tokens}: give a longer one, or ask for fewer tokens")
        self.there = there


def token_ids(model: str, revision: str | None, text: str | None, tokens: int) -> torch.Tensor:
    """(tokens,) ids: the beginning of the text, or of the embedded world's held-out documents, each ended by eos.

    Raises:
        TooShortError: the text has fewer.
    """
    import torch
    from lm_eval_mamba.tasks.icl_gap_mini import world
    from transformers import AutoTokenizer

    from peft_mamba.checkpoints import tokenizer_source

    source = tokenizer_source(model, revision)
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision if source == model else None)
    ids: list[int] = []
    if text is None:
        documents = world.documents(0, "heldout")
        while len(ids) < tokens:
            ids += [*tokenizer(next(documents))["input_ids"], tokenizer.eos_token_id]
    else:
        # verbose: a text longer than what the tokenizer calls its maximum is no mistake here.
        ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < tokens:
        raise TooShortError(len(ids), tokens)
    return torch.tensor(ids[:tokens])


def _exponents_table(found: Stability, model: str, unit: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"{escape(model)}: Lyapunov exponents in nats per token, fp32",
        title_justify="left",
        caption=f"near 0: keep more than 1/e of a deviation of their state over {found.tokens} tokens",
        caption_justify="left",
    )
    for column in ("layer", unit, "λ_max", "95%", "median", "5%", "min", "near 0"):
        table.add_column(column, justify="right")
    for index, layer in enumerate(found.layers):
        low, median, high = layer.quantiles
        values = (layer.maximal, high, median, low, layer.minimal)
        table.add_row(str(index), str(layer.units), *map(_number, values), f"{layer.near_zero:.1%}")
    return table


def _growth_table(found: Stability) -> Table:
    from rich.table import Table

    table = Table(
        title=f"relative deviation after t tokens, the first one's embedding off by {found.epsilon:g}",
        title_justify="left",
        caption="state: the largest of all layers",
        caption_justify="left",
    )
    table.add_column("t", justify="right")
    columns: list[Sequence[float]] = []
    for growth in found.growth:
        for of, values in (("state", _largest(growth)), ("logits", growth.output)):
            table.add_column(f"{growth.precision} {of}", justify="right")
            columns.append(values)
    for time, *row in zip(found.growth[0].times, *columns, strict=True):
        table.add_row(str(time), *map(_number, row))
    return table


def _largest(growth: Growth) -> list[float]:
    """Per time the largest deviation of a layer's state, not a number if one layer's is not."""
    columns = zip(*growth.states.values(), strict=True)
    return [math.nan if any(map(math.isnan, column)) else max(column) for column in columns]


def _number(x: float) -> str:
    if not math.isfinite(x):
        return "not finite"
    return f"{x:.1e}" if 0 < abs(x) < 1e-3 else f"{x:.4f}"


def finite(value: Any) -> Any:
    """The value with null in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
