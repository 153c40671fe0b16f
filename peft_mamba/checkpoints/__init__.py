"""Checkpoints: Mamba and Mamba-2 in transformers or original state-spaces format, and other causal LMs.

A checkpoint is an embedded one (`mini`, `mini-2`), a local directory, or a hub id:

    from peft_mamba.checkpoints import AutoMambaForCausalLM, describe
    model = AutoMambaForCausalLM.from_pretrained("mini")
    print(describe(model))

`source` finds its files, `original` converts the original format, `loading` reads and checks.
"""

from .loading import AutoMambaForCausalLM, describe, load_config
from .source import EMBEDDED, CheckpointError, resolve, tokenizer_source

__all__ = [
    "EMBEDDED",
    "AutoMambaForCausalLM",
    "CheckpointError",
    "describe",
    "load_config",
    "resolve",
    "tokenizer_source",
]
