"""What is adapted and whether it learns: one row a kind of module, and a check of the first step of every training.

print(peft_mamba.report(model))
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import asdict, dataclass

from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from . import kernels
from .mixers import FAMILIES, mixers_of
from .mixers.block import Block


class GradientError(RuntimeError):
    """A trainable adapter was left out of a backward; the message names it."""


@dataclass(frozen=True)
class Row:
    """The adapters on all modules of one kind (x_proj, embeddings, …)."""

    kind: str
    matched: int
    ranks: tuple[int, ...]
    trainable: int  # parameters
    # Of the trainable tensors, those that a backward has reached; a gradient of zeros is one too.
    gradients: int
    tensors: int

    @property
    def gradient(self) -> str:
        """Whether a backward has reached them: "all", "none", "3 of 4", or "frozen" where nothing trains."""
        if not self.tensors:
            return "frozen"
        return {0: "none", self.tensors: "all"}.get(self.gradients, f"{self.gradients} of {self.tensors}")


@dataclass(frozen=True)
class Report:
    """What `report` found. `str()` is a table, `as_dict()` plain values for JSON."""

    rows: tuple[Row, ...]
    parameters: int
    mixers: int
    # What `kernels.describe` says; None: no Mamba mixers, or transformers' own, which bypass adapters.
    kernels: dict[str, str] | None
    # What blocks make again in backward; None: no Mamba mixers of ours.
    recompute: str | None = None

    @property
    def trainable(self) -> int:
        """Parameters of all adapters that training changes."""
        return sum(row.trainable for row in self.rows)

    def as_dict(self) -> dict:
        """Rows, totals and kernels as JSON-serialisable values."""
        return {
            "adapters": [asdict(row) | {"ranks": list(row.ranks), "gradient": row.gradient} for row in self.rows],
            "trainable": self.trainable,
            "parameters": self.parameters,
            "mixers": self.mixers,
            "kernels": self.kernels,
            "recompute": self.recompute,
        }

    def __str__(self) -> str:
        header = ("module", "matched", "rank", "trainable", "gradient")
        cells = [
            (row.kind, str(row.matched), "/".join(map(str, row.ranks)), f"{row.trainable:,}", row.gradient)
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in (header, *cells)) for column in range(len(header))]
        lines = [
            "  ".join(
                cell.rjust(width) if column in (1, 3) else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (header, *cells)
        ]
        share = f"{self.trainable / self.parameters:.2%}" if self.parameters else "0%"
        lines.append(f"trainable: {self.trainable:,} of {self.parameters:,} parameters ({share})")
        if self.mixers:
            path = self.kernels or {"kernels": "transformers' own, past any adapter: see use_mixers"}
            lines.append(f"mixers: {self.mixers}; " + "; ".join(f"{key}: {value}" for key, value in path.items()))
            if self.recompute:
                lines[-1] += f"; recompute: {self.recompute}"
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Describe the adapters and mixers of a model, PeftModel or not; call it after a backward to see gradients."""
    by_kind: dict[str, list[LoraLayer]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            by_kind.setdefault(name.rpartition(".")[2], []).append(module)
    rows = []
    for kind, layers in by_kind.items():
        trained = [parameter for layer in layers for _, parameter in _trainable(layer)]
        rows.append(
            Row(
                kind=kind,
                matched=len(layers),
                ranks=tuple(sorted({rank for layer in layers for rank in layer.r.values()})),
                trainable=sum(parameter.numel() for parameter in trained),
                gradients=sum(parameter.grad is not None for parameter in trained),
                tensors=len(trained),
            )
        )
    mixers = mixers_of(model)
    chosen = None
    if mixers and all(type(mixer) in FAMILIES.values() for _, mixer in mixers):
        chosen = kernels.describe(next(mixers[0][1].parameters()).device.type)
    total = sum(parameter.numel() for parameter in model.parameters())
    levels = sorted({module.recompute for module in model.modules() if isinstance(module, Block)})
    return Report(tuple(rows), total, len(mixers), chosen, "/".join(levels) or None)


def _trainable(layer: LoraLayer) -> list[tuple[str, nn.Parameter]]:
    """The layer's own parameters that train: its adapters, without the layer they adapt."""
    assert isinstance(layer, nn.Module)  # LoraLayer is a mixin of modules
    return [
        (name, parameter)
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad and not name.startswith("base_layer.")
    ]


def _adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Full name to parameter of everything in the model's adapters that trains."""
    return {
        f"{name}.{part}": parameter
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        for part, parameter in _trainable(module)
    }


_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def watch_first_step(model: nn.Module) -> None:
    """Have the first optimizer step that is about to change an adapter of `model` check that all of them can learn.

    The check runs once, in front of `Optimizer.step`, whatever loop or trainer calls that. It raises GradientError,
    before any weight has changed, if an adapter weight of that optimizer has no gradient. Zero is a gradient: it is
    what lora_A has while lora_B is still zero.
    """
    _watched.add(model)
    _watch_optimizers()


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_check_first_step)


def _check_first_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    if not _watched:
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for model in list(_watched):
        adapters = {name: weight for name, weight in _adapter_weights(model).items() if id(weight) in stepped}
        if not adapters:
            continue
        _watched.discard(model)
        missing = [name for name, weight in adapters.items() if weight.grad is None]
        if missing:
            raise GradientError(
                f"{len(missing)} of {len(adapters)} trainable adapter weights received no gradient in the first step, "
                f"so they would never train: {', '.join(missing[:8])}{', …' if len(missing) > 8 else ''}."
            )
