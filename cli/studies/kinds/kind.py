"""What a kind of study is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..pins import Pins
from ..recipe import PRECISIONS, Key, Recipe, batch_size, choices, number, texts
from ..report.document import Report
from ..results import Finished
from ..runs import Run


@dataclass(frozen=True)
class Kind:
    """A kind of study.

    Attributes:
        about: what it answers, in a line.
        keys: of its recipes, beside study, about, models and seeds.
        plan: the runs that a recipe asks for; those that they need may be left out.
        report: what the finished runs say.
    """

    name: str
    about: str
    keys: dict[str, Key]
    plan: Callable[[Recipe, Pins], list[Run]]
    report: Callable[[Recipe, list[Finished]], Report]


def scoring_keys(*tasks: str) -> dict[str, Key]:
    """Keys of kinds that score: which tasks (`tasks` by default), in which batches, how many documents of each."""
    return {
        "tasks": Key(texts, list(tasks), required=not tasks),
        "batch_size": Key(batch_size, 64),
        "limit": Key(number(1)),
    }


PRECISION_LIST = choices(PRECISIONS)
FINETUNE = Key(lambda entry, base: None)  # read by `Recipe` itself
