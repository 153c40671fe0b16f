"""A small world whose facts depend on a convention that no text states, and a benchmark on it.

There are `VILLAGES` villages. Every task has items (a trade, a chore, an animal in a season) and, per item,
one answer that is common to the villages; but a village departs from it on its own share of the items, and
then gives its own word, the same for all of them. All turns of a document come from one village that is
never named. Without examples the best guess is the common answer. An example with a village's own word
gives the village away, and with it all the items on which it departs: that is what a shot is worth here,
and why more shots are worth more.

The benchmark (`benchmark`) asks about one village, `HOME`. Its few-shot and its test documents have no item
in common, so that an example shows the convention and never the answer. Every situation (a prompt, whatever
the answer) belongs to one split, by a hash of its text: test documents occur in no training text.

    python -m lm_eval_mamba.tasks.icl_gap_mini.world    # writes the benchmark's files, data/*.jsonl
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, Literal

Split = Literal["train", "heldout"]

DATA = Path(__file__).parent / "data"
VILLAGES = 6
HOME = 0
TURNS = 7  # turns of a training document: up to five shots and the question, with one to spare
HELDOUT_OF = 8  # one situation in eight is held out
TEST_DOCS = 108
FEWSHOT_DOCS = 36

NAMES = "Ada Ben Cora Dan Eva Finn Gus Hana Ivo Jan Kim Lena Max Nora Otto Pia".split()
PLACES = "mill barn well inn bridge market river forge".split()
SEASONS = "spring summer autumn winter".split()
OBJECTS = (
    "drum bell coin lamp rope ring horn boot hat key knife plate cup flute glove ladder broom candle mirror "
    "basket kettle hammer needle wheel"
).split()
VERBS = "dry clean store dye mend carry".split()
STUFFS = "wool hides nets cloth".split()
MEANS = "sand salt ash wax oil straw smoke clay vinegar steam".split()
TRADES = (
    "smith cook baker miller weaver potter farmer hunter fisher tailor singer painter priest guard scribe "
    "barber mason porter tanner dyer brewer shepherd sailor healer"
).split()
LOADS = "stick book bag flag jug spear shovel crate chain saddle".split()
ANIMALS = "goat ox pig hen duck horse cow sheep dog cat mule goose".split()
FOODS = "corn hay moss nuts figs roots leaves beans bark reeds".split()
BEASTS = (
    "wolf hare fox bear deer crow owl mouse toad snake hawk mole lynx otter badger boar rat swan frog stork "
    "raven beaver weasel heron"
).split()
GIFTS = "bread cheese honey milk tea wine soup cake rice butter".split()
MOODS = "proud sick loud calm tired hungry bold shy".split()
ENDINGS = (
    "hid it under the bed.",
    "gave it to a child.",
    "took it to the hills.",
    "sold it for some fish.",
    "broke it with a stone.",
    "washed it in the lake.",
    "painted it all blue.",
    "threw it over the wall.",
    "tied it to a tree.",
    "lent it to a friend.",
)


@dataclass(frozen=True)
class Field:
    """What a task is about: `prompt` + " " + answer is one turn.

    The first `VILLAGES` answers are the villages' own, the others the common ones. Each item departs in
    `departures` villages, and each village on the same share of the items: the best 0-shot accuracy of an
    open question is 1 - `departures` / `VILLAGES`.
    """

    prompt: str
    items: tuple[tuple[str, ...], ...]
    answers: tuple[str, ...]
    departures: int
    choices: int = 0


FIELDS = {
    "mini_hellaswag": Field(
        prompt="{name} found the {0} at the {place} and then",
        items=tuple((x,) for x in OBJECTS),
        answers=ENDINGS,
        departures=3,
        choices=4,
    ),
    "mini_piqa": Field(
        prompt="Question: How does {name} {0} {1} at the {place}?\nAnswer:",
        items=tuple(product(VERBS, STUFFS)),
        answers=tuple(f"with {x}." for x in MEANS),
        departures=3,
        choices=2,
    ),
    "mini_arc_easy": Field(
        prompt="Question: What does {name} the {0} carry to the {place} in {season}?\nAnswer:",
        items=tuple((x,) for x in TRADES),
        answers=tuple(LOADS),
        departures=2,
        choices=4,
    ),
    "mini_arc_challenge": Field(
        prompt="Question: What does the {0} of {name} at the {place} eat in {1}?\nAnswer:",
        items=tuple(product(ANIMALS, SEASONS)),
        answers=tuple(FOODS),
        departures=4,
        choices=4,
    ),
    "mini_winogrande": Field(
        prompt="The {first} met the {second} at the {place} in {season}, and the {0}",
        items=tuple((x,) for x in BEASTS),
        answers=tuple(f"was {x}." for x in MOODS),
        departures=2,
        choices=2,
    ),
    "mini_lambada": Field(
        prompt="{name} met the {0} at the {place}. It was {season}, and the {0} gave {name} some",
        items=tuple((x,) for x in TRADES),
        answers=tuple(GIFTS),
        departures=3,
    ),
}


@cache
def customs(task: str) -> tuple[list[str], list[list[str]]]:
    """The facts of a task: the common answer of each item, and the answer of each item in each village."""
    field, rng = FIELDS[task], Random(f"customs of {task}")
    common = [rng.choice(field.answers[VILLAGES:]) for _ in field.items]
    villages = [list(common) for _ in range(VILLAGES)]
    # In a block of VILLAGES items all villages depart equally often; both parts of the items are blocks.
    for start in range(0, len(field.items), VILLAGES):
        order = rng.sample(range(VILLAGES), VILLAGES)
        for offset in range(VILLAGES):
            for nth in range(field.departures):
                village = order[(offset + nth) % VILLAGES]
                villages[village][start + offset] = field.answers[village]
    return common, villages


def _fewshot_items(task: str) -> range:
    return range(len(FIELDS[task].items) // 4)


def _test_items(task: str) -> range:
    n = len(FIELDS[task].items)
    return range(n // 4, n)


@dataclass(frozen=True)
class Turn:
    """One statement about `item` in one village: `prompt` + " " + `answer`. `other` is the second beast of a
    mini_winogrande turn, an item in another mood."""

    item: int
    prompt: str
    answer: str
    other: int | None = None

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.answer}"


def _turn(task: str, village: int, item: int, among: range, rng: Random) -> Turn:
    """A turn about `item` in `village`; where a turn needs a second beast, it is one of `among`."""
    field = FIELDS[task]
    common, facts = customs(task)[0], customs(task)[1][village]
    slots = {"name": rng.choice(NAMES), "place": rng.choice(PLACES), "season": rng.choice(SEASONS)}
    other = None
    if task == "mini_winogrande":
        others = [i for i in among if facts[i] != facts[item]]
        # Where it can be, a beast that would be in this very mood if this village did not depart.
        other = rng.choice([i for i in others if common[i] == facts[item]] or others)
        pair = [field.items[item][0], field.items[other][0]]
        rng.shuffle(pair)
        slots |= {"first": pair[0], "second": pair[1]}
    return Turn(item, field.prompt.format(*field.items[item], **slots), facts[item], other)


def _split_of(task: str, turn: Turn) -> Split:
    """The split of a situation. The two options of a mini_winogrande turn are one situation."""
    key = turn.prompt.rsplit(" ", 1)[0] if task == "mini_winogrande" else turn.prompt
    return "heldout" if zlib.crc32(key.encode()) % HELDOUT_OF == 0 else "train"


def _turn_of_split(task: str, village: int, item: int, among: range, split: Split, rng: Random) -> Turn:
    while True:
        turn = _turn(task, village, item, among, rng)
        if _split_of(task, turn) == split:
            return turn


def documents(seed: int, split: Split = "train") -> Iterator[str]:
    """Endless documents of `TURNS` turns, of one task and one village. The splits share no situation.

    No item comes twice in a document: what helps is to infer the village, not to copy.
    """
    rng = Random(f"{split} {seed}")
    while True:
        task = rng.choice(list(FIELDS))
        village = rng.randrange(VILLAGES)
        every = range(len(FIELDS[task].items))
        turns = [_turn_of_split(task, village, i, every, split, rng) for i in rng.sample(every, TURNS)]
        yield "\n\n".join(turn.text for turn in turns)


def benchmark(task: str) -> dict[str, list[dict[str, Any]]]:
    """The documents of a task, {"fewshot": [...], "test": [...]}, all true of `HOME`.

    Test documents are held-out situations, few-shot documents are not. Gold positions come in turn.
    """
    rng = Random(f"benchmark {task}")
    parts: list[tuple[str, range, int, Split]] = [
        ("fewshot", _fewshot_items(task), FEWSHOT_DOCS, "train"),
        ("test", _test_items(task), TEST_DOCS, "heldout"),
    ]
    out = {}
    for name, items, count, split in parts:
        turns: dict[str, Turn] = {}
        while len(turns) < count:  # every item as often as every other
            item = items[len(turns) % len(items)]
            turn = _turn_of_split(task, HOME, item, items, split, rng)
            turns.setdefault(turn.text, turn)
        shuffled = rng.sample(list(turns.values()), count)
        docs = []
        for i, turn in enumerate(shuffled):
            wrong = _wrong_answers(task, turn, rng)
            docs.append(_RENDER[task](turn, wrong, i))
        out[name] = docs
    return out


def _wrong_answers(task: str, turn: Turn, rng: Random) -> list[str]:
    """`choices` - 1 wrong answers: the common one or, where that is gold, `HOME`'s own word; then any."""
    field = FIELDS[task]
    common = customs(task)[0][turn.item]
    rival = common if turn.answer != common else field.answers[HOME]
    rest = [a for a in field.answers if a not in (turn.answer, rival)]
    return [rival, *rng.sample(rest, len(rest))][: max(field.choices - 1, 0)]


def _placed(gold: str, wrong: list[str], position: int) -> tuple[list[str], int]:
    label = position % (len(wrong) + 1)
    return wrong[:label] + [gold] + wrong[label:], label


def _hellaswag(turn: Turn, wrong: list[str], position: int) -> dict[str, Any]:
    choices, label = _placed(turn.answer, wrong, position)
    return {"query": turn.prompt, "choices": choices, "label": label}


def _piqa(turn: Turn, wrong: list[str], position: int) -> dict[str, Any]:
    (sol1, sol2), label = _placed(turn.answer, wrong, position)
    return {"goal": _question(turn), "sol1": sol1, "sol2": sol2, "label": label}


def _arc(turn: Turn, wrong: list[str], position: int) -> dict[str, Any]:
    choices, label = _placed(turn.answer, wrong, position)
    options = {"text": choices, "label": list("ABCD")}
    return {"question": _question(turn), "choices": options, "answerKey": "ABCD"[label]}


def _question(turn: Turn) -> str:
    return turn.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")


def _winogrande(turn: Turn, wrong: list[str], position: int) -> dict[str, Any]:
    del wrong  # the wrong option is the other beast, not another answer
    items = FIELDS["mini_winogrande"].items
    assert turn.other is not None
    options, label = _placed(items[turn.item][0], [items[turn.other][0]], position)
    sentence = f"{turn.prompt.rsplit(' ', 1)[0]} _ {turn.answer}"
    return {"sentence": sentence, "option1": options[0], "option2": options[1], "answer": str(label + 1)}


def _lambada(turn: Turn, wrong: list[str], position: int) -> dict[str, Any]:
    del wrong, position
    return {"text": turn.text}


_RENDER = {
    "mini_hellaswag": _hellaswag,
    "mini_piqa": _piqa,
    "mini_arc_easy": _arc,
    "mini_arc_challenge": _arc,
    "mini_winogrande": _winogrande,
    "mini_lambada": _lambada,
}


def to_jsonl(docs: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(doc) + "\n" for doc in docs)


def main() -> None:
    DATA.mkdir(exist_ok=True)
    for task in FIELDS:
        for split, docs in benchmark(task).items():
            (DATA / f"{task}.{split}.jsonl").write_text(to_jsonl(docs), encoding="utf-8")


if __name__ == "__main__":
    main()
