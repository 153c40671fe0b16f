"""Shared by all tests: nothing reaches out to a hub; tiny checkpoints of random weights with a byte-level tokenizer."""

import os
from pathlib import Path

# Before any import of huggingface_hub, datasets or transformers, which read these once; subprocesses inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Every byte a token, and <|endoftext|> as id 0: any text can be encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0, **{byte: i + 1 for i, byte in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(family: str, seed: int = 0, layers: int = 2) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 264, "hidden_size": 16, "num_hidden_layers": layers}  # padded beyond the tokenizer's 257
    if family == "mamba":
        config = transformers.MambaConfig(**sizes, state_size=4)
        return transformers.MambaForCausalLM(config).eval()
    if family == "mamba2":
        config = transformers.Mamba2Config(**sizes, state_size=8, num_heads=4, head_dim=8, n_groups=1, chunk_size=16)
        return transformers.Mamba2ForCausalLM(config).eval()
    config = transformers.GPTNeoXConfig(**sizes, num_attention_heads=2, intermediate_size=32)
    return transformers.GPTNeoXForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """family -> directory of a tiny random checkpoint, for mamba, mamba2 and gpt_neox."""
    directories = {}
    for family in ("mamba", "mamba2", "gpt_neox"):
        directories[family] = tmp_path_factory.mktemp(family)
        tiny_model(family).save_pretrained(directories[family])
        byte_tokenizer().save_pretrained(directories[family])
    return directories
