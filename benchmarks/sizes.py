"""Real sizes for the benchmarks that train: config, and the papers' LoRA rank, by name. Weights are random."""

from __future__ import annotations

import torch
import transformers
from transformers import Mamba2Config, MambaConfig, PretrainedConfig


def _mamba(hidden: int, layers: int) -> MambaConfig:
    return MambaConfig(vocab_size=50280, hidden_size=hidden, num_hidden_layers=layers)


def _mamba2(hidden: int, layers: int) -> Mamba2Config:
    return Mamba2Config(
        vocab_size=50288,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_heads=hidden // 32,
        n_groups=1,
        tie_word_embeddings=True,
    )


CONFIGS: dict[str, tuple[PretrainedConfig, int]] = {
    "mamba-130m": (_mamba(768, 24), 8),
    "mamba-790m": (_mamba(1536, 48), 32),
    "mamba-2.8b": (_mamba(2560, 64), 128),
    "mamba2-130m": (_mamba2(768, 24), 8),
    "mamba2-780m": (_mamba2(1536, 48), 32),
    "mamba2-2.7b": (_mamba2(2560, 64), 64),
}


def random_model(config: PretrainedConfig, device: str) -> transformers.PreTrainedModel:
    """The model with random fp32 weights, drawn where it will stay."""
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # As transformers draws them, the scan's outputs leave fp16's range in the first layer; trained weights do not.
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data *= 0.3
    return model
