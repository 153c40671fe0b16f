"""How figures look: colours that are told apart by everyone, and by themselves on paper and on a dark page.

Figures are drawn with matplotlib in placeholder colours, and the placeholders in the SVG become CSS variables: one file
serves a light page, a dark one and print. Text stays text.
"""

from __future__ import annotations

import io
import re
from typing import Any

from .document import Figure

# Okabe and Ito's palette, for light pages, and the same hues lighter or darker where a dark page needs it.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#3a9bd9", "#5f5f5f")
DARK = ("#56b4e9", "#ff8c42", "#2fc79b", "#e79cc4", "#f0e442", "#a3d4f5", "#bdbdbd")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, GRID, SPIKE = "#010203", "#010204", "#010205"  # of text and axes, of grid lines, of the line at one point
_PLACEHOLDERS = tuple(f"#0a0b{i:02x}" for i in range(len(LIGHT)))

CSS = (
    ":root{--ink:#1b1b1b;--grid:#d5d5d5;--spike:#b00020;"
    + "".join(f"--c{i}:{colour};" for i, colour in enumerate(LIGHT))
    + "}@media screen and (prefers-color-scheme:dark){:root{--ink:#e8e8e8;--grid:#4a4a4a;--spike:#ff6b81;"
    + "".join(f"--c{i}:{colour};" for i, colour in enumerate(DARK))
    + "}}"
)


class ReportError(RuntimeError):
    """A report that cannot be made here; the message says what to do."""


def colour(index: int) -> str:
    """Of a series, to draw with."""
    return _PLACEHOLDERS[index % len(_PLACEHOLDERS)]


def marker(index: int) -> str:
    """Of a series: a second sign beside its colour."""
    return MARKERS[index % len(MARKERS)]


def svg(figure: Figure) -> str:
    """The figure as an SVG element that takes its colours from the CSS variables of the page that it is in.

    Raises:
        ReportError: matplotlib is missing; says how to get it.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ReportError('Figures need matplotlib: pip install "lm-eval-mamba[study]"') from error

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": figure.name,  # ids that differ from those of other figures, and are the same each time
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "axes.linewidth": 0.7,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": GRID,
        "grid.linewidth": 0.5,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    }
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=figure.size, layout="constrained")
        figure.draw(canvas, figure.rows)
        written = io.StringIO()
        saving: Any = {"format": "svg", "bbox_inches": "tight", "pad_inches": 0.05}
        canvas.savefig(written, metadata={"Date": None, "Creator": None}, **saving)
    return _themed(written.getvalue())


def standalone(element: str) -> str:
    """The same as a file of its own."""
    start = element.index(">", element.index("<svg")) + 1
    return '<?xml version="1.0" encoding="utf-8"?>\n' + element[:start] + f"<style>{CSS}</style>" + element[start:]


def _themed(text: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?)height="[^"]*"\s*', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)width="[^"]*"\s*', r"\1", text, count=1)
    names = {INK: "--ink", GRID: "--grid", SPIKE: "--spike"} | {c: f"--c{i}" for i, c in enumerate(_PLACEHOLDERS)}
    # A variable is none of the values that a presentation attribute may have; in a style it is.
    text = re.sub(r'\b(fill|stroke)="(#0[0-9a-f]{5})"', r'style="\1: \2"', text)
    for placeholder, name in names.items():
        text = text.replace(placeholder, f"var({name})")
    # DejaVu, whose metrics were used, is seldom where the page is read.
    return re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1'DejaVu Sans', Verdana, sans-serif", text)


def legend(axes: Any, **options: Any) -> None:
    """Above the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        options = {"loc": "lower left", "bbox_to_anchor": (0, 1.01), "ncols": min(len(labels), 5)} | options
        axes.legend(handles, labels, **options)
