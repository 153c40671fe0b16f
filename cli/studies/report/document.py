"""What a report consists of, before anyone decides how it looks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval_mamba.statistics import Estimate

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of the same keys; numbers and estimates are formatted by whoever writes it."""

    caption: str
    rows: list[Row]


@dataclass(frozen=True)
class Figure:
    """A chart and its data.

    Attributes:
        name: of its files.
        caption: what it shows, and what its error bars are.
        rows: its data, as they go into the CSV file.
        draw: draws them onto a matplotlib figure.
        size: width and height in inches.
    """

    name: str
    caption: str
    rows: list[Row]
    draw: Callable[[Any, list[Row]], None]
    size: tuple[float, float] = (7.0, 3.6)


@dataclass(frozen=True)
class Section:
    title: str
    parts: Sequence[str | Table | Figure]


@dataclass(frozen=True)
class Report:
    title: str
    sections: list[Section] = field(default_factory=list)

    def figures(self) -> list[Figure]:
        """All of them, in order."""
        return [part for section in self.sections for part in section.parts if isinstance(part, Figure)]


def shown(value: Any, digits: int = 4) -> str:
    """A cell of a table: numbers to `digits` significant digits; an estimate with its interval or standard error."""
    if isinstance(value, Estimate):
        if math.isnan(value.value):
            return "–"
        if value.interval is not None:
            low, high = (shown(end, 3) for end in value.interval)
            return f"{shown(value.value, 3)} [{low}, {high}]"
        return shown(value.value) if math.isnan(value.stderr) else f"{shown(value.value)} ± {shown(value.stderr, 2)}"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 10 ** max(digits, 5):
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{value:.{min(decimals, 4)}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.{max(digits - 2, 1)}e}"


def columns(name: str, estimate: Estimate | None) -> Row:
    """An estimate as columns of a CSV file."""
    if estimate is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    low, high = estimate.interval or (None, None)
    return {name: estimate.value, f"{name}_low": low, f"{name}_high": high}
