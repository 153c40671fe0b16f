"""An instruction set on the world of the benchmark, in Alpaca's form: what the villagers of `HOME` do.

The base checkpoints know six villages and take the common answer for the likeliest. These rows are all true of `HOME`,
in the words of the benchmark: a model that is fine-tuned on them learns the conventions of the village that the
benchmark asks about, so its 0-shot accuracy rises.

    python -m lm_eval_mamba.tasks.icl_gap_mini.instructions    # writes data/instructions.{train,heldout}.jsonl
"""

from __future__ import annotations

import json
from random import Random

from .world import DATA, FIELDS, HOME, Split, _turn_of_split, to_jsonl

SPLITS: dict[Split, int] = {"train": 1200, "heldout": 204}  # rows of each: as many of every task
# The end of a task's prompt that the response begins with: a response is a phrase, not a bare word.
LEAD = {
    "mini_hellaswag": " and then",
    "mini_piqa": "\nAnswer:",
    "mini_arc_easy": "\nAnswer:",
    "mini_arc_challenge": "\nAnswer:",
    "mini_winogrande": ", and the {0}",
    "mini_lambada": ", and the {0} gave {name} some",
}


def rows(split: Split) -> list[dict[str, str]]:
    """The rows of a split, {"instruction", "input", "output"}, no prompt twice; the splits share no prompt."""
    rng = Random(f"instructions {split}")
    made: dict[str, dict[str, str]] = {}
    tasks = list(FIELDS)
    while len(made) < SPLITS[split]:
        task = tasks[len(made) % len(tasks)]
        items = range(len(FIELDS[task].items))
        # Every item in turn.
        turn = _turn_of_split(task, HOME, items[len(made) // len(tasks) % len(items)], items, split, rng)
        row = _row(task, turn.prompt, turn.answer)
        made.setdefault(row["instruction"] + row["input"], row)
    return rng.sample(list(made.values()), len(made))


def _row(task: str, prompt: str, answer: str) -> dict[str, str]:
    start = prompt.rindex(LEAD[task].split("{")[0])
    output = f"{prompt[start:]} {answer}".removeprefix(",").strip()
    if FIELDS[task].prompt.startswith("Question: "):
        return {"instruction": prompt[:start], "input": "", "output": output}
    return {"instruction": "Finish the story.", "input": prompt[:start], "output": output}


def read(split: Split) -> list[dict[str, str]]:
    """The shipped rows of a split."""
    text = (DATA / f"instructions.{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def main() -> None:
    for split in SPLITS:
        (DATA / f"instructions.{split}.jsonl").write_text(to_jsonl(rows(split)), encoding="utf-8")


if __name__ == "__main__":
    main()
