"""The recipe of the embedded checkpoints: an ordinary language-model training loop on the world's documents.

The defaults are what made the shipped ones (README.md has the losses and times):

    python -m lm_eval_mamba.tasks.icl_gap_mini.train --family mamba --out mini --device cuda
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from .tokenizer import train_tokenizer
from .world import documents

DOCUMENTS = 24_000
STEPS = 800
BATCH_SIZE = 256
LEARNING_RATE = 4e-3
WARM_UP = 100  # steps
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
TOKENIZER_DOCUMENTS = 5_000


def new_model(family: str, tokenizer: PreTrainedTokenizerFast) -> MambaForCausalLM | Mamba2ForCausalLM:
    """An untrained model, fp32, of 64 channels and two layers, its vocabulary padded to a multiple of 8."""
    common: dict[str, Any] = {
        "vocab_size": math.ceil(len(tokenizer) / 8) * 8,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    if family == "mamba":
        return MambaForCausalLM(MambaConfig(state_size=8, **common))
    # causal_conv1d wants strides in multiples of 8 (so num_heads too), a Triton dot at least 16 channels.
    heads: dict[str, Any] = {"num_heads": 8, "head_dim": 16, "n_groups": 1}
    return Mamba2ForCausalLM(Mamba2Config(state_size=32, chunk_size=64, **heads, **common))


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> torch.Tensor:
    """(documents, length) token ids, each document ended by eos and padded on the right with -100."""
    ids = tokenizer(list(texts))["input_ids"]
    rows = [torch.tensor([*row, tokenizer.eos_token_id]) for row in ids]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def shuffled_batches(n: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless batches of `size` indices below `n`, in a new order each epoch; an epoch's rest is dropped."""
    while True:
        yield from torch.randperm(n, generator=generator)[: n - n % size].split(size)


def train(
    family: str,
    *,
    seed: int = 0,
    device: str = "cpu",
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
    n_documents: int = DOCUMENTS,
) -> tuple[MambaForCausalLM | Mamba2ForCausalLM, PreTrainedTokenizerFast, list[float]]:
    """Trains from scratch: AdamW, linear warm-up, cosine to zero, clipping; the loss is over all tokens.

    Returns the model, its tokenizer and the loss of each step (nats per token).
    """
    # One tokenizer for both families and all seeds.
    tokenizer = train_tokenizer(islice(documents(0), TOKENIZER_DOCUMENTS))
    data = encode(tokenizer, islice(documents(seed), n_documents)).to(device)
    torch.manual_seed(seed)
    model = new_model(family, tokenizer).to(device).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2 and not hasattr(p, "_no_weight_decay")]
    taken = {id(p) for p in matrices}
    vectors = [p for p in model.parameters() if id(p) not in taken]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)

    def schedule(step: int) -> float:
        return min((step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * step / steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    order = shuffled_batches(len(data), batch_size, torch.Generator().manual_seed(seed))
    losses: list[torch.Tensor] = []
    for step, rows in enumerate(islice(order, steps)):
        labels = data[rows.to(device)]
        loss = model(input_ids=labels.clamp(min=0), labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
    return model.eval(), tokenizer, torch.stack(losses).tolist()


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--family", choices=["mamba", "mamba2"], required=True)
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="documents per step")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="peak learning rate")
    args = parser.parse_args()

    start = time.perf_counter()
    model, tokenizer, losses = train(
        args.family,
        seed=args.seed,
        device=args.device,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.lr,
    )
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    last = losses[-100:]
    seconds = time.perf_counter() - start
    print(f"{args.out}: loss {sum(last) / len(last):.4f} over the last {len(last)} steps, {seconds:.0f} s")


if __name__ == "__main__":
    main()
