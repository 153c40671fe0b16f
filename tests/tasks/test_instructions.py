"""The embedded instruction set: the generator makes these files, they are true of one village, nothing is tested on."""

import json
import re
from collections import Counter
from string import Formatter

import pytest
from lm_eval_mamba.tasks.icl_gap_mini import instructions, world

SPLITS = list(instructions.SPLITS)


def situation(row: dict[str, str]) -> str:
    return row["input"] or row["instruction"].removeprefix("Question: ")


def told(row: dict[str, str]) -> tuple[str, dict[str, str], str]:
    """The task of a row, the slots of that task's prompt, and the answer."""
    texts = [row["instruction"] + "\n" + row["output"], *(row["input"] + sep + row["output"] for sep in (" ", ", "))]
    for task, field in world.FIELDS.items():
        names = [name for _, name, _, _ in Formatter().parse(field.prompt) if name is not None]
        pattern = re.sub(r"\\\{\w+\\\}", r"(\\w+)", re.escape(field.prompt)) + " (.+)"
        for found in filter(None, (re.fullmatch(pattern, text) for text in texts)):
            *slots, answer = found.groups()
            return task, dict(zip(names, slots, strict=True)), answer
    raise AssertionError(f"no task tells {row}")


@pytest.mark.parametrize("split", SPLITS)
def test_files_are_what_the_generator_makes(split):
    shipped = (world.DATA / f"instructions.{split}.jsonl").read_text(encoding="utf-8")
    assert shipped == world.to_jsonl(instructions.rows(split))
    assert instructions.read(split) == [json.loads(line) for line in shipped.splitlines()]


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_true_of_home_and_of_every_item(split):
    items = set()
    for row in instructions.read(split):
        task, slots, answer = told(row)
        words = [list(item) for item in world.FIELDS[task].items]
        item = words.index([slots[str(n)] for n in range(len(words[0]))])
        assert answer == world.customs(task)[1][world.HOME][item]
        items.add((task, item))
    if split == "train":
        assert len(items) == sum(len(field.items) for field in world.FIELDS.values())


@pytest.mark.parametrize("split", SPLITS)
def test_tasks_have_as_many_rows_each(split):
    tasks = Counter(told(row)[0] for row in instructions.read(split))
    assert set(tasks) == set(world.FIELDS) and len(set(tasks.values())) == 1
    assert tasks.total() == instructions.SPLITS[split]


def test_no_prompt_comes_twice():
    prompts = [situation(row) for split in SPLITS for row in instructions.read(split)]
    assert len(prompts) == len(set(prompts))


def test_nothing_of_the_benchmark_is_trained_on():
    trained = {situation(row) for row in instructions.read("train")}
    asked = set()
    for task in world.FIELDS:
        for doc in world.benchmark(task)["test"]:
            text = next(doc[key] for key in ("question", "goal", "query", "sentence", "text") if key in doc)
            asked.add(text if text.endswith("?") else re.split(r" and then|, and", text)[0])
    assert len(asked) > 600 and not asked & trained
    # The same words, so that this comparison could find any.
    assert {re.sub(r"\w+", "", text) for text in asked} == {re.sub(r"\w+", "", text) for text in trained}
