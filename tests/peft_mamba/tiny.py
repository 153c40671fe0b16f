"""Tiny random models and the table of adapters that the tests of PEFT for Mamba share, on a CPU and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from peft_mamba import MambaLoraConfig

VOCABULARY = 64
PRECISIONS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def tiny_model(family: str, **config) -> nn.Module:
    """Two layers, hidden size 32, every parameter away from its initial value (biases of zero would hide an error)."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "eos_token_id": 63}
    if family == "mamba":
        model = MambaForCausalLM(MambaConfig(**sizes | {"state_size": 8, "time_step_rank": 4} | config))
    elif family == "mamba2":
        own = {"state_size": 16, "head_dim": 16, "num_heads": 4, "n_groups": 2, "chunk_size": 32}
        model = Mamba2ForCausalLM(Mamba2Config(**sizes | own | {"tie_word_embeddings": True} | config))
    else:
        own = {"num_attention_heads": 2, "intermediate_size": 64}
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes | own | config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tokens(batch: int = 3, length: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|, in float64; infinite if either has a NaN."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if actual.isnan().any() or expected.isnan().any() or actual.shape != expected.shape:
        return float("inf")
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@dataclass(frozen=True)
class Adapter:
    """One row of the table: an adapter, and the module kinds that it must reach."""

    name: str
    family: str
    kinds: tuple[str, ...]
    options: dict = field(default_factory=dict)

    def config(self) -> LoraConfig:
        own = self.options if "preset" in self.options else {"target_modules": list(self.kinds), **self.options}
        return MambaLoraConfig(**{"r": 2, "lora_alpha": 4} | own)

    def on(self, model: nn.Module) -> PeftModel:
        """The adapter on `model`, trained a little: no factor is zero, so all of it shows."""
        adapted = get_peft_model(model, self.config())
        randomise_adapters(adapted)
        return adapted


def randomise_adapters(model: nn.Module, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter)


ALL = {"mamba": ("in_proj", "x_proj", "dt_proj", "out_proj"), "mamba2": ("in_proj", "out_proj")}
SLL = {"mamba": ("x_proj", "embeddings", "in_proj", "out_proj"), "mamba2": ("embeddings", "in_proj", "out_proj")}
W = {"mamba": ("x_proj",), "mamba2": ("in_proj",)}
NOT_W = {"mamba": ("in_proj", "dt_proj", "out_proj"), "mamba2": ("out_proj",)}

ADAPTERS = [
    row
    for family in ("mamba", "mamba2")
    for row in (
        Adapter(f"{family}-all", family, ALL[family], {"preset": "all"}),
        Adapter(f"{family}-sll", family, SLL[family], {"preset": "sll"}),
        Adapter(f"{family}-w", family, W[family], {"preset": "w"}),
        Adapter(f"{family}-not-w", family, NOT_W[family], {"preset": "not-w"}),
        *(Adapter(f"{family}-{kind}", family, (kind,)) for kind in (*ALL[family], "embeddings", "lm_head")),
        Adapter(f"{family}-dora", family, (*ALL[family], "embeddings"), {"use_dora": True}),
        Adapter(f"{family}-rslora", family, ALL[family], {"use_rslora": True}),
        Adapter(f"{family}-dropout", family, ALL[family], {"lora_dropout": 0.2}),
        Adapter(f"{family}-dora-dropout", family, ALL[family], {"lora_dropout": 0.2, "use_dora": True}),
        Adapter(
            f"{family}-patterns",
            family,
            ALL[family],
            {"rank_pattern": {"in_proj": 5, "layers.1.mixer.out_proj": 3}, "alpha_pattern": {"in_proj": 1}},
        ),
        Adapter(f"{family}-one-layer", family, ALL[family], {"layers_to_transform": [1]}),
        Adapter(f"{family}-bias", family, ALL[family], {"bias": "all"}),
    )
]


def gradients_reach(model: nn.Module, batch: torch.Tensor, kinds: tuple[str, ...]) -> None:
    """One backward gives every adapter weight a gradient that is not zero, and nothing frozen any."""
    model.train()
    model.zero_grad(set_to_none=True)
    model(batch, labels=batch).loss.backward()
    reached = set()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.requires_grad and parameter.grad is not None, f"{name} has no gradient"
            assert parameter.grad.isfinite().all() and parameter.grad.any(), f"{name} has a zero gradient"
            reached.update(kind for kind in kinds if f".{kind}." in name)
        elif not parameter.requires_grad:
            assert parameter.grad is None, f"frozen {name} has a gradient"
    assert reached == set(kinds)
