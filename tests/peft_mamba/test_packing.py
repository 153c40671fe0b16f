"""Documents packed into rows are what they are apart: losses and gradients, called directly and by TRL."""

from __future__ import annotations

import copy
import json
from functools import cache
from importlib.resources import files

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from peft_mamba import MambaLoraConfig, kernels, use_mixers

from .tiny import randomise_adapters, relative_rms, tiny_model, tokens

FAMILIES = ("mamba", "mamba2")
MODELS = (*FAMILIES, "mini", "mini-2")
IMPLEMENTATIONS = ("reference", "torch")
# Longer than a chunk of the block form of SSD, alone and with others; one token; all of it; rows that differ.
EXAMPLES = ([[1, 70, 1, 2, 66]], [[9], [1, 1, 7], [4, 5]], [[90], [20, 70]])


@cache
def embedded(name: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(str(files("peft_mamba.embedded").joinpath(name)))


@cache
def trained(name: str, training: str) -> tuple[nn.Module, nn.Module]:
    """A model in float32 and in float64: to be trained in full, or by a LoRA that includes the embeddings."""
    model = copy.deepcopy(embedded(name)) if name.startswith("mini") else tiny_model(name)
    if training == "full":
        use_mixers(model)
    else:
        model = get_peft_model(model, MambaLoraConfig(preset=training, r=2, lora_alpha=4))
        randomise_adapters(model)
    return model.train(), copy.deepcopy(model).double().train()


def packed(rows: list[list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random documents of these lengths, packed: no loss on their first tokens."""
    position_ids = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])
    input_ids = tokens(*position_ids.shape, seed=seed)
    seq_idx = torch.stack(
        [torch.arange(len(row), dtype=torch.int32).repeat_interleave(torch.tensor(row)) for row in rows]
    )
    labels = input_ids.masked_fill(position_ids == 0, -100)
    return {"input_ids": input_ids, "labels": labels, "seq_idx": seq_idx, "position_ids": position_ids}


def without(batch: dict, *names: str) -> dict:
    return {name: value for name, value in batch.items() if name not in names}


def documents(input_ids: torch.Tensor, rows: list[list[int]]) -> list[torch.Tensor]:
    return [part for ids, row in zip(input_ids, rows, strict=True) for part in ids[None].split(row, dim=1)]


def loss_apart(model: nn.Module, alone: list[torch.Tensor]) -> torch.Tensor:
    """The loss per token of documents, each in a forward of its own."""
    losses = [
        F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum") for ids in alone if ids.shape[1] > 1
    ]
    return sum(losses, torch.tensor(0.0)) / sum(ids.shape[1] - 1 for ids in alone)


def logits_apart(model: nn.Module, rows: list[list[int]], input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(ids, use_cache=False).logits[0] for ids in documents(input_ids, rows)])


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal(model: nn.Module, loss: torch.Tensor, exact: nn.Module, alone: list[torch.Tensor], tolerance=1e-5):
    """Loss and every gradient of `model`, relative to those that `exact` gives for the documents alone."""
    expected = loss_apart(exact, alone)
    assert abs(loss.item() - expected.item()) < max(tolerance, 1e-6) * abs(expected.item())  # the loss is in float32
    actual, expected_gradients = gradients(model, loss), gradients(exact, expected)
    assert actual.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert relative_rms(actual[name], gradient) < tolerance, name


@st.composite
def packings(draw) -> list[list[int]]:
    """Rows of one length, cut into documents in different places."""
    length = draw(st.integers(2, 150))
    cuts = st.sets(st.integers(1, length - 1), max_size=5)
    edges = [[0, *sorted(draw(cuts)), length] for _ in range(draw(st.integers(1, 3)))]
    return [[after - before for before, after in zip(row, row[1:], strict=False)] for row in edges]


@pytest.mark.parametrize("training", ["full", "sll"])
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=5, deadline=None)
@example(rows=EXAMPLES[0], given_as="seq_idx", implementation="torch")
@example(rows=EXAMPLES[1], given_as="position_ids", implementation="reference")
@given(
    rows=packings(),
    given_as=st.sampled_from(["seq_idx", "position_ids"]),
    implementation=st.sampled_from(IMPLEMENTATIONS),
)
def test_packed_is_apart(name, training, rows, given_as, implementation):
    """Gradients in float64, where nothing but a leak could part them: in float32 some cancel to little but rounding."""
    assume(any(length > 1 for row in rows for length in row))
    model, exact = trained(name, training)
    batch = packed(rows, seed=len(rows))
    kept = without(batch, *{"seq_idx", "position_ids"} - {given_as})
    alone = documents(batch["input_ids"], rows)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setenv(kernels.ENVIRONMENT_VARIABLE, implementation)
        assert model(**kept).loss.item() == pytest.approx(loss_apart(exact, alone).item(), rel=1e-5)
        with torch.enable_grad():
            loss = exact(**kept).loss
    assert_equal(exact, loss, exact, alone, tolerance=1e-9)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("training", ["full", "sll"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_is_apart_in_float32(name, training, implementation, monkeypatch):
    monkeypatch.setenv(kernels.ENVIRONMENT_VARIABLE, implementation)
    model, exact = trained(name, training)
    for rows in EXAMPLES:
        batch = packed(rows)
        loss = model(**batch).loss
        assert_equal(model, loss, exact, documents(batch["input_ids"], rows))


@pytest.mark.parametrize("training", ["full", "sll"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_by_trl_is_apart(name, training):
    """TRL's own collator and loss, which calls the backbone past the causal LM's forward."""
    model, exact = trained(name, training)
    model = copy.deepcopy(model)  # the models are shared by the tests of this file
    add_fused_lm_head(model.get_base_model() if training != "full" else model)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    for lengths in (EXAMPLES[0][0], [31], [8, 3, 1, 20, 2]):
        alone = list(tokens(1, sum(lengths)).split(lengths, dim=1))
        batch = collate([{"input_ids": ids[0].tolist()} for ids in alone])
        assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
        assert_equal(model, model(**batch, fused_lm_head=True, use_cache=False).loss, exact, alone)


@pytest.mark.parametrize("name", ["mini", "mini-2"])
def test_sft_trainer_packs_without_leaks(name, tmp_path):
    """The first loss that it logs is the one per token of the documents apart; the trained model has learned them."""
    lines = files("lm_eval_mamba.tasks.icl_gap_mini").joinpath("data/mini_lambada.test.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines[:8]]
    options = SFTConfig(
        str(tmp_path),
        packing=True,
        max_length=128,
        per_device_train_batch_size=8,
        max_steps=3,
        learning_rate=1e-3,
        bf16=False,
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    model = copy.deepcopy(embedded(name))
    trainer = SFTTrainer(
        model, options, train_dataset=Dataset.from_dict({"text": texts}), peft_config=MambaLoraConfig(preset="sll", r=2)
    )
    alone = [
        torch.tensor([trainer.processing_class(text + trainer.processing_class.eos_token)["input_ids"]])
        for text in texts
    ]
    assert len(trainer.train_dataset) < len(texts)
    with torch.no_grad():
        expected = loss_apart(embedded(name), alone)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", MODELS)
def test_packed_is_apart_under_autocast(name):
    model, exact = trained(name, "sll")
    batch = packed(EXAMPLES[0])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    assert_equal(model, loss, exact, documents(batch["input_ids"], EXAMPLES[0]), tolerance=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_mixes_packed_documents(family):
    """Fails when upstream hands the boundaries to its mixers, so that our hooks can go."""
    model = tiny_model(family)
    batch = without(packed(EXAMPLES[0]), "labels")
    with torch.no_grad():
        leaking = model(**batch).logits
        assert torch.equal(leaking, model(batch["input_ids"]).logits), "seq_idx has an effect: do it their way"
        alone = torch.cat([model(ids).logits for ids in documents(batch["input_ids"], EXAMPLES[0])], dim=1)
        assert relative_rms(leaking, alone) > 0.05
        use_mixers(model)
        assert relative_rms(model(**batch).logits, alone) < 1e-5
