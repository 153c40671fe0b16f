"""What a fine-tuning run is: every setting of `mamba-ft`, with its default and where that comes from.

The defaults are the recipes of "Mamba State-Space Models Are Lyapunov-Stable Learners" (2406.00209): AdamW, cosine
schedule without warm-up, gradient norm clipped at 1, 512 tokens; learning rate and rank by the size of the model
(`published/recipes.csv`), epochs by the data set. What the papers leave open follows TRL, PEFT or transformers.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from typing import Any

import yaml

from peft_mamba.checkpoints import EMBEDDED
from peft_mamba.mixers import LEVELS
from peft_mamba.presets import MAMBA_FAMILIES, PRESETS

PRESET_CHOICES = ("full", *PRESETS)
RECOMPUTE_CHOICES = ("auto", *LEVELS)
# May differ between a run and its resumption: they decide what is shown and kept, not what is learned.
FREE_ON_RESUME = frozenset(
    {"logging_steps", "save_steps", "save_total_limit", "report_to", "output", "recompute", "cuda_graphs", "precast"}
)
ADAPTER_ONLY = ("r", "alpha", "dropout")
DEFAULT_BATCH_SIZE = 8
EPOCHS_OF_DATASET = {"alpaca": 3.0, "openhermes": 1.0, "lima": 5.0}


class SettingsError(ValueError):
    """A setting that cannot be; the message says which, what was expected, and what to do."""


@dataclass(frozen=True)
class Settings:
    """One run, fully resolved: nothing is left to a default further down. Lengths in tokens, sizes in sequences."""

    model: str
    revision: str | None
    trust_remote_code: bool
    dataset: str
    dataset_name: str | None
    dataset_revision: str | None
    split: str
    eval_split: str | None
    loss_on: str
    preset: str
    precision: str
    r: int | None
    alpha: float | None
    dropout: float | None
    learning_rate: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    epochs: float | None
    max_steps: int | None
    batch_size: int | str
    gradient_accumulation: int | None
    effective_batch_size: int | None
    max_length: int
    packing: bool
    recompute: str | None
    gradient_checkpointing: bool
    seed: int
    device: str
    eval_steps: int | None
    logging_steps: int
    save_steps: int
    save_total_limit: int
    report_to: str
    output: str
    kernels: str | None = None
    cuda_graphs: bool | None = None
    precast: bool | None = None

    def as_yaml(self) -> str:
        """The settings as a file for `mamba-ft --config`."""
        return yaml.safe_dump(asdict(self), sort_keys=False)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What of a stored run differs from this one in a way that changes its result, in words."""
        mine = asdict(self)
        return [
            f"{name} was {other.get(name)!r} and is {mine[name]!r}"
            for name in mine
            if name not in FREE_ON_RESUME and mine[name] != other.get(name)
        ]


@dataclass(frozen=True)
class Recipe:
    """Settings and, for each, who decided it."""

    settings: Settings
    sources: dict[str, str]


@dataclass(frozen=True)
class ModelFacts:
    """What the defaults depend on: transformers' model_type, the number of parameters."""

    family: str
    parameters: int


def published_size(facts: ModelFacts) -> dict[str, Any]:
    """The papers' row for the model nearest in size (by ratio): size, learning_rate and r."""
    table = resources.files("lm_eval_mamba") / "published" / "recipes.csv"
    column, rank = {"mamba": ("mamba_size", "lora_r_mamba_pythia"), "mamba2": ("mamba2_size", "lora_r_mamba2")}.get(
        facts.family, ("pythia_size", "lora_r_mamba_pythia")
    )
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    row = min(rows, key=lambda row: abs(math.log(_parameters(row[column]) / facts.parameters)))
    return {
        "size": row[column],
        "distance": _parameters(row[column]) / facts.parameters,
        "learning_rate": float(row["learning_rate"]),
        "r": int(row[rank]),
    }


def _parameters(size: str) -> float:
    return float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]


def resolve(given: Mapping[str, Any], sources: Mapping[str, str], facts: ModelFacts) -> Recipe:
    """Fill in what was not given.

    Args:
        given: setting to value; None or absent where it was not given.
        sources: setting to who gave it, for those in `given`.

    Raises:
        SettingsError: settings that contradict each other or that nothing would use.
    """
    values: dict[str, Any] = {field.name: given.get(field.name) for field in fields(Settings)}
    said = {name: sources.get(name, "given") for name, value in values.items() if value is not None}

    def default(name: str, value: Any, source: str) -> None:
        if values[name] is None:
            values[name], said[name] = value, source

    _refuse_contradictions(values, facts)
    embedded = values["model"] in EMBEDDED
    for name, (value, source) in (_embedded_recipe if embedded else _published_recipe)(values, facts).items():
        default(name, value, source)
    papers = "the papers' recipe"
    for name, value, source in (
        ("schedule", "cosine", papers),
        ("warmup_steps", 0, papers),
        ("weight_decay", 0.0, "transformers' default"),
        ("max_grad_norm", 1.0, papers),
        ("max_length", 512, papers),
        ("dropout", None if values["preset"] == "full" else 0.0, "PEFT's default"),
    ):
        default(name, value, source)
    if facts.family in MAMBA_FAMILIES and not values["gradient_checkpointing"]:
        default("recompute", "auto", "as little as memory allows")
        if values["preset"] != "full":
            default("cuda_graphs", True, "faster, on a GPU, where batches are of one size")
    if facts.family in MAMBA_FAMILIES and values["preset"] != "full" and values["precision"] != "fp32":
        default("precast", True, "the same, in less memory, on a GPU")
    if values["preset"] != "full":
        default("alpha", 2.0 * values["r"], "2 r, TRL's ratio")
    default("batch_size", DEFAULT_BATCH_SIZE, "TRL's default; the papers name none")
    if values["batch_size"] == "auto":
        default("effective_batch_size", DEFAULT_BATCH_SIZE, "TRL's default batch a device")
    else:
        default("gradient_accumulation", 1, papers)
    return Recipe(Settings(**values), said)


def _refuse_contradictions(values: Mapping[str, Any], facts: ModelFacts) -> None:
    if values["recompute"] is not None and facts.family not in MAMBA_FAMILIES:
        raise SettingsError(
            f"--recompute {values['recompute']} says what Mamba's mixers keep, and {facts.family} has none. Use "
            "--gradient-checkpointing."
        )
    if values["recompute"] is not None and values["gradient_checkpointing"]:
        raise SettingsError(
            f"--gradient-checkpointing makes every layer again, so --recompute {values['recompute']} would do nothing. "
            "Give one of the two; --recompute block is the faster one."
        )
    if values["cuda_graphs"]:
        for given, why in (
            (facts.family not in MAMBA_FAMILIES, f"launch the layers of Mamba, and this is {facts.family}"),
            (values["preset"] == "full", "hold gradients a second time, so they are for adapters, not --preset full"),
            (
                values["gradient_checkpointing"],
                "cannot hold --gradient-checkpointing, but can --recompute block",
            ),
        ):
            if given:
                raise SettingsError(f"--cuda-graphs: they {why}. Leave it out.")
    if values["precast"]:
        for given, why in (
            (facts.family not in MAMBA_FAMILIES, f"it is for the mixers of Mamba, and this is {facts.family}"),
            (values["preset"] == "full", "it is for frozen weights, and --preset full trains all"),
            (values["precision"] == "fp32", "--precision fp32 computes with the weights as they are"),
        ):
            if given:
                raise SettingsError(f"--precast: {why}. Leave it out.")
    if values["preset"] == "full":
        useless = [f"--{name} {values[name]}" for name in ADAPTER_ONLY if values[name] is not None]
        if useless:
            raise SettingsError(
                f"--preset full trains every weight and has no adapter: {', '.join(useless)} would do nothing. Leave "
                f"it out, or choose one of {', '.join(PRESETS)}."
            )
    if values["epochs"] is not None and values["max_steps"] is not None:
        raise SettingsError(
            f"--epochs {values['epochs']} and --max-steps {values['max_steps']} both say when to stop. Give one."
        )
    if values["batch_size"] == "auto" and values["gradient_accumulation"] is not None:
        raise SettingsError(
            f"--batch-size auto chooses the gradient accumulation, so --gradient-accumulation "
            f"{values['gradient_accumulation']} cannot hold. Give --effective-batch-size instead."
        )
    if values["batch_size"] != "auto" and values["effective_batch_size"] is not None:
        raise SettingsError(
            f"--effective-batch-size {values['effective_batch_size']} goes with --batch-size auto. With a fixed "
            "--batch-size, give --gradient-accumulation."
        )


def _published_recipe(values: Mapping[str, Any], facts: ModelFacts) -> dict[str, tuple[Any, str]]:
    row = published_size(facts)
    near = "" if 2 / 3 < row["distance"] < 3 / 2 else f", the nearest of theirs to {facts.parameters / 1e6:,.0f}M"
    source = f"the papers' recipe for {row['size']}{near}"
    recipe: dict[str, tuple[Any, str]] = {"learning_rate": (row["learning_rate"], source)}
    if values["preset"] != "full":
        recipe["r"] = (row["r"], source)
    if values["max_steps"] is None:
        name = str(values["dataset"]).lower()
        known = next((each for each in EPOCHS_OF_DATASET if each in name), None)
        if known:
            recipe["epochs"] = (EPOCHS_OF_DATASET[known], f"the papers' recipe for {known}")
        else:
            recipe["epochs"] = (3.0, "transformers' default; the papers used other data")
    return recipe


def _embedded_recipe(values: Mapping[str, Any], facts: ModelFacts) -> dict[str, tuple[Any, str]]:
    source = f"the recipe of the embedded {values['model']}"
    recipe: dict[str, tuple[Any, str]] = {"learning_rate": (1e-3 if values["preset"] == "full" else 3e-3, source)}
    if values["preset"] != "full":
        recipe["r"] = (8, source)
    if values["max_steps"] is None:
        recipe["epochs"] = (3.0, source)
    recipe["batch_size"] = (16, source)
    return recipe
