"""Packed batches of one size: the same documents, and a filler that no figure and no loss counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval_mamba.cli import finetune
from lm_eval_mamba.cli.measures import Meter
from lm_eval_mamba.cli.packed import FILLER, FullBatches
from lm_eval_mamba.cli.settings import ModelFacts, SettingsError, resolve
from rich.console import Console
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .test_settings import PLAIN

ROWS, LENGTH, TOKEN = 3, 12, 7
row = st.lists(st.integers(1, LENGTH), min_size=1, max_size=4).filter(lambda lengths: sum(lengths) <= LENGTH)


def example(lengths):
    ids = list(range(10, 10 + sum(lengths)))
    return {"input_ids": ids, "labels": [-100 if i % 3 else i for i in ids], "seq_lengths": lengths}


@given(st.lists(row, min_size=1, max_size=ROWS))
def test_full_batches_have_one_size_and_the_same_documents(rows):
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    examples = [example(lengths) for lengths in rows]
    bare, batch = collate(examples), FullBatches(collate, ROWS, LENGTH, TOKEN)(examples)
    tokens = bare["input_ids"].numel()
    filler = batch.pop(FILLER, 0)
    full = len(rows) == ROWS
    assert filler == (ROWS * LENGTH - tokens if full else 0)
    for name in ("input_ids", "labels", "position_ids", "seq_idx"):
        assert torch.equal(batch[name][:, :tokens], bare[name]), name
        assert batch[name].shape == (1, tokens + filler)
    assert (batch["labels"][:, tokens:] == -100).all() and (batch["input_ids"][:, tokens:] == TOKEN).all()
    assert len(batch["cu_seq_lens_q"]) == len(bare["cu_seq_lens_q"]) + bool(filler)


def test_the_filler_is_not_among_the_tokens():
    meter = Meter(torch.device("cpu"))
    meter.batch({"input_ids": torch.zeros(1, 36)}, filler=5)
    meter.batch({"input_ids": torch.zeros(2, 4), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])})
    meter.now()
    assert (meter.tally.tokens, meter.tally.positions) == (31 + 4, 36 + 8)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_graphs_are_for_adapters_of_mamba(family):
    facts = ModelFacts(family, 130_000_000)
    assert resolve(PLAIN, {}, facts).settings.cuda_graphs is True
    assert resolve({**PLAIN, "cuda_graphs": False}, {}, facts).settings.cuda_graphs is False
    assert resolve({**PLAIN, "preset": "full"}, {}, facts).settings.cuda_graphs is None
    assert resolve({**PLAIN, "gradient_checkpointing": True}, {}, facts).settings.cuda_graphs is None
    assert resolve(PLAIN, {}, ModelFacts("gpt_neox", 160_000_000)).settings.cuda_graphs is None


@pytest.mark.parametrize(
    ("given", "family", "said"),
    [
        ({"preset": "full"}, "mamba", "not --preset full"),
        ({"gradient_checkpointing": True}, "mamba2", "--recompute block"),
        ({}, "gpt_neox", "this is gpt_neox"),
    ],
)
def test_graphs_that_would_do_nothing_are_refused(given, family, said):
    with pytest.raises(SettingsError, match=f"--cuda-graphs: .*{said}"):
        resolve({**PLAIN, **given, "cuda_graphs": True}, {}, ModelFacts(family, 130_000_000))


@pytest.mark.parametrize(
    ("device", "processes", "asked", "used"),
    [
        ("cuda", 1, True, True),
        ("cuda", 2, True, False),
        ("cuda", 1, False, False),
        ("cpu", 1, True, False),
    ],
)
def test_graphs_are_for_one_gpu(monkeypatch, capsys, device, processes, asked, used):
    switched = []
    monkeypatch.setattr(finetune, "use_cuda_graphs", switched.append)
    settings = resolve({**PLAIN, "cuda_graphs": asked}, {}, ModelFacts("mamba", 130_000_000)).settings
    process = SimpleNamespace(device=torch.device(device), num_processes=processes)
    settings = finetune._with_graphs("model", settings, process, Console())
    assert bool(switched) == used
    assert ("off, they are for one device" in capsys.readouterr().out) == (processes > 1)
    assert settings.cuda_graphs is (asked and processes == 1)
