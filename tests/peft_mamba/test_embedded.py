"""The embedded models fine-tune with each preset and improve on text that they were not tuned on."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_mamba import MambaLoraConfig

EMBEDDED = {"mini": "mamba", "mini-2": "mamba2"}


@cache
def batches(checkpoint: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of the benchmark's village, to tune on and held out: its convention is in both, no text is."""
    data = files("lm_eval_mamba.tasks.icl_gap_mini").joinpath("data")
    texts = []
    for split in ("fewshot", "test"):
        for line in data.joinpath(f"mini_lambada.{split}.jsonl").read_text().splitlines():
            texts.append(json.loads(line)["text"])
        for line in data.joinpath(f"mini_piqa.{split}.jsonl").read_text().splitlines():
            doc = json.loads(line)
            texts.append(f"{doc['goal']} {doc['sol1'] if doc['label'] == 0 else doc['sol2']}")
    tokenizer = AutoTokenizer.from_pretrained(str(files("peft_mamba.embedded").joinpath(checkpoint)))
    ids = tokenizer(sorted(set(texts)), padding=True, padding_side="right", return_tensors="pt")
    rows = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    return rows[::4], rows[1::4]


def loss_on(model, rows):
    return model(rows.clamp_min(0), attention_mask=(rows >= 0).long(), labels=rows).loss


@pytest.mark.parametrize("preset", ["all", "sll", "w", "not-w"])
@pytest.mark.parametrize("checkpoint", EMBEDDED)
def test_fine_tuning_improves_on_held_out_text(checkpoint, preset):
    model = AutoModelForCausalLM.from_pretrained(str(files("peft_mamba.embedded").joinpath(checkpoint)))
    assert model.config.model_type == EMBEDDED[checkpoint]
    train, held_out = batches(checkpoint)
    cap = {"dt_proj": 4} if checkpoint == "mini" and preset in ("all", "not-w") else {}  # it has 4 inputs
    config = MambaLoraConfig(preset=preset, r=8, lora_alpha=16, rank_pattern=cap)
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    with torch.no_grad():
        before = loss_on(model.eval(), held_out).item()
    model.train()
    for _ in range(8):
        loss_on(model, train).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = loss_on(model.eval(), held_out).item()
    assert after < before - 0.2
