"""The embedded benchmark and checkpoints: the recipe makes these files, and shots help for its reason."""

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import lm_eval
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval_mamba.tasks.icl_gap_mini import train as recipe
from lm_eval_mamba.tasks.icl_gap_mini import world
from lm_eval_mamba.tasks.icl_gap_mini.tokenizer import train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_mamba.embedded

EMBEDDED = Path(peft_mamba.embedded.__file__).parent
CHECKPOINTS = {"mini": "mamba", "mini-2": "mamba2"}
TASKS = list(world.FIELDS)
MULTIPLE_CHOICE = [task for task in TASKS if world.FIELDS[task].choices]


def shipped(task: str, split: str) -> list[dict]:
    lines = (world.DATA / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def choices_and_gold(task: str, doc: dict) -> tuple[list[str], int]:
    if task == "mini_hellaswag":
        return doc["choices"], doc["label"]
    if task == "mini_piqa":
        return [doc["sol1"], doc["sol2"]], doc["label"]
    if task == "mini_winogrande":
        return [doc["option1"], doc["option2"]], int(doc["answer"]) - 1
    return doc["choices"]["text"], doc["choices"]["label"].index(doc["answerKey"])


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=str(world.DATA.parent), include_defaults=False)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request) -> Path:
    return EMBEDDED / request.param


@pytest.mark.parametrize("task", TASKS)
def test_files_are_what_the_generator_makes(task):
    for split, docs in world.benchmark(task).items():
        assert (world.DATA / f"{task}.{split}.jsonl").read_text(encoding="utf-8") == world.to_jsonl(docs)


@pytest.mark.parametrize("task", MULTIPLE_CHOICE)
@pytest.mark.parametrize("split", ["fewshot", "test"])
def test_documents_are_well_formed(task, split):
    docs = [choices_and_gold(task, doc) for doc in shipped(task, split)]
    for choices, gold in docs:
        assert len(set(choices)) == len(choices) == world.FIELDS[task].choices
        assert 0 <= gold < len(choices)
    positions = Counter(gold for _, gold in docs)
    assert set(positions.values()) == {len(docs) // world.FIELDS[task].choices}


@pytest.mark.parametrize("task", TASKS)
def test_no_document_comes_twice(task):
    rows = [json.dumps(doc) for split in ("fewshot", "test") for doc in shipped(task, split)]
    assert len(rows) == len(set(rows)) == world.TEST_DOCS + world.FEWSHOT_DOCS


@pytest.mark.parametrize("task", TASKS)
def test_shots_show_the_convention_and_never_the_answer(task):
    """No item of a test document is in a few-shot document; and home departs on the stated share of both."""
    field = world.FIELDS[task]
    common, villages = world.customs(task)
    items = {"fewshot": world._fewshot_items(task), "test": world._test_items(task)}
    for split, part in items.items():
        departing = sum(villages[world.HOME][i] != common[i] for i in part)
        assert departing * world.VILLAGES == field.departures * len(part)
        others = [field.items[i] for i in set(range(len(common))) - set(part)]
        for doc in shipped(task, split):
            words = set(re.findall(r"\w+", " ".join(str(v) for k, v in doc.items() if k != "choices")))
            assert not any(words >= set(item) for item in others)


def turns_of(manager: TaskManager, task: str, num_fewshot: int) -> list[str]:
    """The prompt of each test document, as lm-eval builds it; with the gold option, if an option is in it."""
    loaded = manager.load([task])["tasks"][task]
    loaded.set_fewshot_seed(1234)
    prompts = []
    for doc in loaded.eval_docs:
        context = loaded.fewshot_context(doc, num_fewshot)
        prompts.append(context[loaded.doc_to_text(doc)] if isinstance(context, list) else context)
    return prompts


def prompts_of(split: str, documents: int) -> set[str]:
    """The turns of some documents, without their answers."""
    answers = "|".join(re.escape(answer) for field in world.FIELDS.values() for answer in field.answers)
    texts = islice(world.documents(1, split), documents)
    return {re.sub(f" ({answers})$", "", turn) for text in texts for turn in text.split("\n\n")}


def test_splits_share_no_situation_and_test_documents_are_held_out(manager):
    """Neither with their gold answer nor with another: the prompt itself is in no training text."""
    train, held_out = prompts_of("train", 6000), prompts_of("heldout", 6000)
    assert len(train) > 20_000 and not train & held_out
    tests = {prompt for task in TASKS for prompt in turns_of(manager, task, num_fewshot=0)}
    assert len(tests & held_out) > len(tests) / 2
    assert not tests & train


@pytest.mark.parametrize("task", TASKS)
def test_prompts_read_like_the_training_text(task, manager):
    field = world.FIELDS[task]
    prompt = re.sub(r"\\\{\w+\\\}", r"(\\w+)", re.escape(field.prompt))
    answer = "|".join(re.escape(a) for a in field.answers)
    for text in turns_of(manager, task, num_fewshot=5):
        *shots, question = text.split("\n\n")
        assert len(shots) == 5
        assert all(re.fullmatch(f"{prompt} ({answer})", shot) for shot in shots)
        assert re.fullmatch(prompt, question)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED / "mini")


@given(text=st.text())
def test_tokenizer_round_trips_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_word_of_the_world_is_one_token(tokenizer):
    words = set(re.findall(r" ?\w+", "\n".join(islice(world.documents(3), 3000))))
    assert len(words) > 150
    assert [word for word in words if len(tokenizer.tokenize(word)) > 1] == []


def test_the_recipe_makes_this_tokenizer(tokenizer):
    again = train_tokenizer(islice(world.documents(0), recipe.TOKENIZER_DOCUMENTS))
    assert again.backend_tokenizer.get_vocab() == tokenizer.backend_tokenizer.get_vocab()
    text = next(world.documents(4, "heldout"))
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_both_checkpoints_have_one_tokenizer():
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (EMBEDDED / "mini" / name).read_bytes() == (EMBEDDED / "mini-2" / name).read_bytes()


def test_five_shots_are_short(tokenizer, manager):
    prompts = [prompt for task in TASKS for prompt in turns_of(manager, task, num_fewshot=5)]
    assert max(len(ids) for ids in tokenizer(prompts)["input_ids"]) <= 150


def test_checkpoint_loads_whole(checkpoint):
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert model.config.model_type == CHECKPOINTS[checkpoint.name]
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert len(tokenizer) <= model.config.vocab_size
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_checkpoints_are_small():
    sizes = [file.stat().st_size for name in CHECKPOINTS for file in (EMBEDDED / name).iterdir()]
    assert sum(sizes) < 4e6


def test_shots_help(checkpoint, manager):
    """The premise of the benchmark, on the two tasks that are cheapest to score."""
    tasks = ["mini_arc_challenge", "mini_lambada"]
    model = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=64)
    accuracy = {}
    for shots in (0, 5):
        results = lm_eval.simple_evaluate(
            model, tasks=tasks, task_manager=manager, num_fewshot=shots, limit=36, bootstrap_iters=0
        )["results"]
        accuracy[shots] = [results[task]["acc,none"] for task in tasks]
    for zero, five in zip(accuracy[0], accuracy[5], strict=True):
        assert 0.2 < zero < five - 0.1


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_few_steps_lower_the_loss(family, monkeypatch):
    monkeypatch.setattr(recipe, "TOKENIZER_DOCUMENTS", 200)
    monkeypatch.setattr(recipe, "WARM_UP", 1)
    monkeypatch.setattr(world, "TURNS", 1)  # the CPU's path goes step by step through time, and back
    _, _, losses = recipe.train(family, steps=6, batch_size=8, n_documents=24)
    assert losses[-1] < losses[0] - 0.3
