"""The forms in which people have training data, and how a row of each becomes one that TRL's SFTTrainer trains on.

| form | columns | becomes |
|---|---|---|
| alpaca | `instruction`, `output`, optional `input` | prompt and completion, each of messages |
| messages | `messages` of {role, content} | messages |
| sharegpt | `conversations` of {from, value} (OpenHermes), or of alternating strings (LIMA) | messages |
| prompt-completion | `prompt`, `completion`, both strings or both messages | the same |
| text | `text` | the same |

The first form of this table whose columns are there is taken (tatsu-lab/alpaca has a `text` as well); other columns are
left out. An Alpaca `input` is put below the instruction under a line "### Input:", as Alpaca does.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from trl.data_utils import maybe_convert_to_chatml

from .sources import DataError

logger = logging.getLogger(__name__)

COLUMNS = {
    "alpaca": ("instruction", "output"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
# `datasets` keeps the rows that a function of a module made, whatever becomes of its code: this tells it.
CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
TEXT = Value("string")
MESSAGES = List({"role": TEXT, "content": TEXT})
Row = dict[str, Any]
Message = dict[str, str]


def converted(rows: Dataset, where: str) -> tuple[Dataset, str]:
    """The rows as SFTTrainer takes them, checked, and the form they came in. `where` is for messages."""
    columns = rows.column_names
    form = next((form for form, needed in COLUMNS.items() if set(needed) <= set(columns)), None)
    if form is None:
        accepted = "; ".join(f"{form}: {', '.join(needed)}" for form, needed in COLUMNS.items())
        raise DataError(
            f"{where} has the columns {', '.join(columns)}, which are of no form that is known. Accepted are "
            f"{accepted}. Rename the columns."
        )
    read = READERS[form]
    features: dict[str, Any] = {"messages": MESSAGES}
    if form == "alpaca" or form == "prompt-completion":
        strings = form == "prompt-completion" and not isinstance(rows[0]["prompt"], list)
        features = dict.fromkeys(("prompt", "completion"), TEXT if strings else MESSAGES)
    elif form == "text":
        features = {"text": TEXT}
    converted = rows.map(
        partial(_convert, read=read, columns=tuple(features), where=where, code=CODE),
        with_indices=True,
        remove_columns=columns,
        features=Features({**features, "kept": Value("bool")}),
        desc="Reading rows",
    )
    kept = converted.filter(lambda kept: kept, input_columns="kept").remove_columns("kept")
    if not len(kept):
        raise DataError(f"none of the {len(rows)} rows of {where} has a response to train on")
    if dropped := len(rows) - len(kept):
        logger.warning("%s: %d of %d rows have no response and are left out", where, dropped, len(rows))
    return kept, form


def _convert(
    row: Row, index: int, *, read: Callable[[Row], Row | None], columns: Iterable[str], where: str, code: str
) -> Row:
    """A row as SFTTrainer takes it, with `kept` False where it has no response. `code` is for the cache alone."""
    del code
    try:
        converted = read(row)
    except DataError as error:
        raise DataError(f"{where}, row {index}: {error}. Correct the row or leave it out.") from None
    if converted is None:
        return {**dict.fromkeys(columns), "kept": False}
    return {**converted, "kept": True}


def _alpaca(row: Row) -> Row | None:
    instruction, output = _string(row, "instruction"), _string(row, "output")
    extra = _string(row, "input") if row.get("input") is not None else ""
    if not output.strip():
        return None  # tatsu-lab/alpaca has such rows
    if not instruction.strip():
        raise DataError("the instruction is empty")
    if extra.strip():
        instruction = f"{instruction}\n\n### Input:\n{extra}"
    return {
        "prompt": [{"role": "user", "content": instruction}],
        "completion": [{"role": "assistant", "content": output}],
    }


def _conversation(row: Row) -> Row | None:
    messages = row["messages"] if "messages" in row else row["conversations"]
    if isinstance(messages, list) and messages and isinstance(messages[0], str):  # LIMA
        if len(messages) == 1:
            return None  # as every row of its test split: a question without an answer
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    checked = _messages(messages)
    if all(message["role"] != "assistant" for message in checked):
        raise DataError("the conversation has no message of the assistant")
    return {"messages": checked}


def _prompt_completion(row: Row) -> Row | None:
    if not isinstance(row["prompt"], list):
        prompt, completion = _string(row, "prompt"), _string(row, "completion")
        if not completion.strip():
            raise DataError("the completion is empty")
        return {"prompt": prompt, "completion": completion}
    if not isinstance(row["completion"], list):
        raise DataError("the prompt is a list of messages and the completion is not")
    checked = _messages([*row["prompt"], *row["completion"]])
    start = len(checked) - len(row["completion"])
    if not 0 < start < len(checked) or checked[start]["role"] != "assistant":
        raise DataError("the prompt must end with a user's message and the completion begin with the assistant's")
    return {"prompt": checked[:start], "completion": checked[start:]}


def _text(row: Row) -> Row | None:
    text = _string(row, "text")
    return {"text": text} if text.strip() else None  # files of lines have empty ones


READERS: dict[str, Callable[[Row], Row | None]] = {
    "alpaca": _alpaca,
    "messages": _conversation,
    "sharegpt": _conversation,
    "prompt-completion": _prompt_completion,
    "text": _text,
}


def _string(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{column} is {value!r}, expected a string")
    return value


def _messages(messages: Any) -> list[Message]:
    """The messages with the roles system, user and assistant, without an empty system message.

    Raises DataError unless they are: at most one system message, then user and assistant in turn, none empty.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"the conversation is {messages!r}, expected a list of messages")
    if not all(isinstance(message, dict) for message in messages):
        raise DataError("a message is not of the form {role, content} or {from, value}")
    checked: list[Message] = []
    for place, message in enumerate(maybe_convert_to_chatml({"messages": messages})["messages"]):
        said, content = message.get("role"), message.get("content")
        role = ROLES.get(said) if isinstance(said, str) else None
        if role is None:
            raise DataError(f"message {place} has the role {said!r}, expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"message {place} ({said}) is {content!r}, expected a string")
        if role == "system" and place == 0:
            if content.strip():
                checked.append({"role": role, "content": content})
            continue
        expected = "assistant" if checked and checked[-1]["role"] == "user" else "user"
        if role != expected:
            raise DataError(f"message {place} is of the role {said!r} where the {expected} has to speak")
        if not content.strip():
            raise DataError(f"message {place} ({said}) is empty")
        checked.append({"role": role, "content": content})
    return checked
