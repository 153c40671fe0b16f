"""Writes a study's report: Markdown, one self-contained HTML file, and each figure as SVG with its data as CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from ...outputs import write_atomically
from ..kinds import KINDS
from ..runner import states
from ..store import Study
from .document import Figure, Report, Row, Section, Table
from .html import page
from .markdown import text
from .theme import standalone, svg


def write_report(study: Study, output: Path) -> list[Path]:
    """The files written, the page first.

    Raises:
        ReportError: matplotlib is missing.
    """
    finished = study.finished()
    report = KINDS[study.recipe.kind].report(study.recipe, finished)
    report = Report(report.title, [*report.sections, provenance(study)])
    drawings = {figure.name: svg(figure) for figure in report.figures()}
    (output / "figures").mkdir(parents=True, exist_ok=True)
    files = {output / "report.html": page(study.recipe.about, report, drawings)}
    files[output / "report.md"] = text(study.recipe.about, report)
    for figure in report.figures():
        files[output / "figures" / f"{figure.name}.svg"] = standalone(drawings[figure.name])
        files[output / "figures" / f"{figure.name}.csv"] = as_csv(figure)
    for path, contents in files.items():
        write_atomically(path, contents)
    return list(files)


def as_csv(figure: Figure) -> str:
    """A figure's rows; numbers in full, nothing where a value is unknown."""
    written = io.StringIO()
    names = list(dict.fromkeys(name for row in figure.rows for name in row))
    writer = csv.DictWriter(written, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in figure.rows)
    return written.getvalue()


def _cell(value: Any) -> Any:
    return " ".join(map(repr, value)) if isinstance(value, list) else value


def provenance(study: Study) -> Section:
    """What is missing, what failed, and what the results were made with, in so far as it differs among them."""
    now = states(study)
    counts = {state: list(now.values()).count(state) for state in dict.fromkeys(now.values())}
    parts: list[Any] = [f"Runs: {', '.join(f'{n} {state}' for state, n in counts.items())}."]
    failed = [(run, study.error(run)) for run in study.runs if now[run.id] == "failed"]
    if failed:
        rows = [{"run": run.name, "error": (error or {})["error"].splitlines()[0]} for run, error in failed]
        parts.append(Table("Failed; what they would have shown is missing above.", rows))
    made = _made_with(study)
    mixed = {name: found for name, found in made.items() if len(found) > 1 and name != "device"}
    if mixed:
        counted = {name: ", ".join(f"{v} ({n} runs)" for v, n in found.items()) for name, found in mixed.items()}
        parts.append(
            "**Results of different versions are mixed here:** "
            + "; ".join(f"{name} {found}" for name, found in counted.items())
            + ". To have all of one version, run the study in a new directory."
        )
    used = "; ".join(f"{name} {', '.join(map(str, found))}" for name, found in made.items())
    parts.append(f"Made with: {used}." if made else "Nothing has finished.")
    if study.pins.stored:
        parts.append(Table("What names stood for.", [{"name": n, "pin": p} for n, p in study.pins.stored.items()]))
    return Section("How it was made", parts)


def _made_with(study: Study) -> dict[str, dict[str, int]]:
    """Package, or device, to what it was and in how many runs."""
    found: dict[str, dict[str, int]] = {}
    for each in study.finished():
        shown: Row = {name: version for name, version in each.record["versions"].items() if version is not None}
        shown["device"] = each.record["device"]
        for name, value in shown.items():
            counts = found.setdefault(name, {})
            counts[str(value)] = counts.get(str(value), 0) + 1
    return found
