"""The charts of the reports: bars, curves, bubbles and bands, drawn from the rows that also go into their CSV files."""

from __future__ import annotations

import math
from typing import Any

from .document import Row
from .theme import SPIKE, colour, legend, marker


def bars(
    canvas: Any,
    rows: list[Row],
    *,
    group: str,
    series: str,
    value: str,
    label: str,
    line: float | None = None,
    line_label: str = "",
    points: str | None = None,
) -> None:
    """Bars in groups, one a series, with intervals (`<value>_low`, `<value>_high`) where there are.

    Args:
        line: where a horizontal line is. points: a row's key with values of single seeds, drawn as dots.
    """
    axes = canvas.subplots()
    groups = list(dict.fromkeys(row[group] for row in rows))
    names = list(dict.fromkeys(row[series] for row in rows))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        mine = [row for row in rows if row[series] == name and _known(row[value])]
        places = [groups.index(row[group]) + (i - (len(names) - 1) / 2) * width for row in mine]
        axes.bar(places, [row[value] for row in mine], width * 0.92, color=colour(i), label=str(name), zorder=2)
        _errors(axes, places, mine, value)
        for place, row in zip(places, mine, strict=True):
            seeds = row.get(points) or [] if points else []
            if len(seeds) > 1:
                axes.plot([place] * len(seeds), seeds, ".", color="#010203", markersize=4, zorder=4)
    if line is not None:
        axes.axhline(line, color=SPIKE, linestyle="--", linewidth=1, label=line_label, zorder=3)
    axes.set_xticks(range(len(groups)), groups, **_tilted(groups))
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel(label)
    legend(axes)


def curves(
    canvas: Any, rows: list[Row], *, panel: str, series: str, x: str, value: str, label: str, x_label: str
) -> None:
    """Lines, one a series, in panels beside each other, with intervals."""
    panels = list(dict.fromkeys(row[panel] for row in rows))
    names = list(dict.fromkeys(row[series] for row in rows))
    all_axes = canvas.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, title in zip(all_axes, panels, strict=True):
        for i, name in enumerate(names):
            mine = [row for row in rows if row[series] == name and row[panel] == title and _known(row[value])]
            shift = (i - (len(names) - 1) / 2) * 0.06
            places = [row[x] + shift for row in mine]
            if mine:
                axes.plot(places, [row[value] for row in mine], color=colour(i), marker=marker(i), label=str(name))
                _errors(axes, places, mine, value, colour(i))
        axes.axhline(0, color="#010203", linewidth=0.7)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(x_label)
        axes.set_xticks(sorted({row[x] for row in rows}))
    all_axes[0].set_ylabel(label)
    handles: dict[str, Any] = {}
    for axes in all_axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    canvas.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=min(len(handles), 4), frameon=False
    )


def bubbles(
    canvas: Any, rows: list[Row], *, panel: str, x: str, value: str, size: str, hue: str, label: str, x_label: str
) -> None:
    """Circles over a logarithmic axis: size by one number, colour by another, with error bars."""
    panels = list(dict.fromkeys(row[panel] for row in rows))
    hues = sorted({row[hue] for row in rows})
    sizes = sorted({row[size] for row in rows})
    all_axes = canvas.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    scale = {each: 30 + 170 * (i / max(len(sizes) - 1, 1)) for i, each in enumerate(sizes)}
    for axes, title in zip(all_axes, panels, strict=True):
        for i, name in enumerate(hues):
            mine = [row for row in rows if row[panel] == title and row[hue] == name and _known(row[value])]
            places = [row[x] for row in mine]
            areas = [scale[row[size]] for row in mine]
            axes.scatter(
                places, [row[value] for row in mine], areas, color=colour(i), alpha=0.55, linewidth=0, zorder=3
            )
            _errors(axes, places, mine, value, colour(i))
            axes.scatter([], [], 60, color=colour(i), label=f"{hue.replace('_', ' ')} {name}")
        axes.set_xscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(x_label)
        for each in sizes:
            axes.scatter([], [], scale[each], facecolor="none", edgecolor="#010203", label=f"{size} {each}")
    all_axes[0].set_ylabel(label)
    handles, labels = all_axes[0].get_legend_handles_labels()
    _legend_above(canvas, handles, labels)


def bands(canvas: Any, rows: list[Row], *, panel: str, x: str, label: str, x_label: str) -> None:
    """Median, 5% to 95% and the range to the largest, over a logarithmic axis."""
    panels = list(dict.fromkeys(row[panel] for row in rows))
    all_axes = canvas.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, title in zip(all_axes, panels, strict=True):
        mine = [row for row in rows if row[panel] == title]
        places = [row[x] for row in mine]
        columns = {name: [row[name] for row in mine] for name in ("smallest", "low", "median", "high", "largest")}
        axes.fill_between(
            places, columns["smallest"], columns["largest"], color=colour(0), alpha=0.18, linewidth=0, label="all"
        )
        axes.fill_between(
            places, columns["low"], columns["high"], color=colour(0), alpha=0.35, linewidth=0, label="5% to 95%"
        )
        axes.plot(places, columns["median"], color=colour(0), marker="o", markersize=3, label="median")
        axes.plot(places, columns["smallest"], color=colour(1), marker="s", markersize=3, label="|λ_max|")
        axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(x_label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    all_axes[0].set_ylabel(label)
    handles, labels = all_axes[0].get_legend_handles_labels()
    _legend_above(canvas, handles, labels)


def growth(canvas: Any, rows: list[Row], *, panel: str, label: str) -> None:
    """Deviations over time, both axes logarithmic: of the state as a line, of the output dashed; spread as a band."""
    panels = list(dict.fromkeys(row[panel] for row in rows))
    names = list(dict.fromkeys(row["precision"] for row in rows))
    all_axes = canvas.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, title in zip(all_axes, panels, strict=True):
        for i, name in enumerate(names):
            for of, style in (("state", "-"), ("output", "--")):
                mine = [
                    r
                    for r in rows
                    if (r[panel], r["precision"], r["of"]) == (title, name, of) and _known(r["deviation"])
                ]
                places = [row["tokens"] for row in mine]
                axes.plot(
                    places,
                    [r["deviation"] for r in mine],
                    style,
                    color=colour(i),
                    marker=marker(i),
                    markersize=3,
                    label=f"{name} {of}",
                )
                if all(_known(r["deviation_low"]) for r in mine):
                    low, high = ([row[f"deviation_{end}"] for row in mine] for end in ("low", "high"))
                    least = min(row["deviation"] for row in mine) / 10  # no logarithm has 0, where two runs agree
                    low = [max(value, least) for value in low]
                    axes.fill_between(places, low, high, color=colour(i), alpha=0.18, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("tokens read")
    all_axes[0].set_ylabel(label)
    handles, labels = all_axes[0].get_legend_handles_labels()
    _legend_above(canvas, handles, labels, 3)


def _errors(axes: Any, places: list[float], rows: list[Row], value: str, ink: str = "#010203") -> None:
    for place, row in zip(places, rows, strict=True):
        low, high = row.get(f"{value}_low"), row.get(f"{value}_high")
        if _known(low) and _known(high):
            below, above = max(row[value] - low, 0), max(high - row[value], 0)
            look = {"fmt": "none", "color": ink, "ecolor": ink, "elinewidth": 0.9, "capsize": 2, "zorder": 5}
            axes.errorbar([place], [row[value]], [[below], [above]], **look)


def _legend_above(canvas: Any, handles: list[Any], labels: list[str], columns: int = 4) -> None:
    canvas.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), columns), frameon=False)


def _known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _tilted(labels: list[str]) -> dict[str, Any]:
    return {"rotation": 30, "ha": "right"} if sum(map(len, map(str, labels))) > 60 else {}
