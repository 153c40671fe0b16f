"""The documents of the benchmark from the files beside this one, as lm-eval's `custom_dataset` asks for them.

lm-eval loads this module by its path, apart from the package: no relative imports here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

DATA = Path(__file__).parent / "data"


def load(name: str, **metadata: Any) -> datasets.DatasetDict:
    """Splits "fewshot" and "test" of the task `name`. lm-eval passes the task's metadata too: no say here."""
    del metadata

    def split(part: str) -> datasets.Dataset:
        text = (DATA / f"{name}.{part}.jsonl").read_text(encoding="utf-8")
        return datasets.Dataset.from_list([json.loads(line) for line in text.splitlines()])

    return datasets.DatasetDict(fewshot=split("fewshot"), test=split("test"))


# Functions, where the YAML files of the real tasks have templates: lm-eval compiles a template anew for every
# document and shot, which cost more than these models do.


def question(doc: dict[str, Any]) -> str:
    return f"Question: {doc['question']}\nAnswer:"


def arc_choices(doc: dict[str, Any]) -> list[str]:
    return doc["choices"]["text"]


def arc_label(doc: dict[str, Any]) -> int:
    return doc["choices"]["label"].index(doc["answerKey"])


def goal(doc: dict[str, Any]) -> str:
    return f"Question: {doc['goal']}\nAnswer:"


def solutions(doc: dict[str, Any]) -> list[str]:
    return [doc["sol1"], doc["sol2"]]


def winogrande_label(doc: dict[str, Any]) -> int:
    """The gold context: where a text is expected, lm-eval reads an integer as the index of a context."""
    return int(doc["answer"]) - 1


def winogrande_contexts(doc: dict[str, Any]) -> list[str]:
    start = doc["sentence"].partition("_")[0]
    return [start + doc["option1"], start + doc["option2"]]


def winogrande_ending(doc: dict[str, Any]) -> str:
    return doc["sentence"].partition("_")[2].strip()


def passage(doc: dict[str, Any]) -> str:
    return doc["text"].rpartition(" ")[0]


def last_word(doc: dict[str, Any]) -> str:
    return " " + doc["text"].rpartition(" ")[2]
