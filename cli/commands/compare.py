"""`mamba-study compare`: what separates two evaluations.

mamba-study compare fp32/results_….json bf16/results_….json --output report.json
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from lm_eval_mamba.compare import Comparison, as_dict, compare, published
from lm_eval_mamba.results import ResultsError, read
from lm_eval_mamba.statistics import Estimate
from peft_mamba.precision import PrecisionError


@click.command("compare")
@click.argument("a", type=click.Path(exists=True, path_type=Path))
@click.argument("b", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--precision-a", metavar="NAME", help="Of a divergence result A: fp32, fp16 or bf16. Default its reference."
)
@click.option("--precision-b", metavar="NAME", help="The same of B.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the report as JSON, too.")
@click.option(
    "--published", "model", metavar="MODEL", help="Put the papers' divergences beside it: Mamba/130M, a family, or all."
)
def compare_command(
    a: Path, b: Path, precision_a: str | None, precision_b: str | None, output: Path | None, model: str | None
) -> None:
    """Divergence of B from the reference A: result files of lm_eval, or directories of them.

    Both runs answered the same tasks, at the same shots. With samples (lm_eval --log_samples) beside the results, each
    figure has a paired 95% interval over documents.
    """
    try:
        beside = published(model) if model else {}
        comparisons = compare(read(a, precision_a), read(b, precision_b))
    except (ResultsError, PrecisionError) as error:
        raise click.ClickException(str(error)) from error
    console = Console()
    for comparison in comparisons:
        console.print(_table(comparison))
        for note in comparison.notes:
            console.print(f"note: {note}", highlight=False, soft_wrap=True)
    for name, rows in beside.items():
        console.print(_published_table(name, rows))
    if output is not None:
        report: dict[str, Any] = {
            "a": {"path": str(a), "precision": precision_a},
            "b": {"path": str(b), "precision": precision_b},
            "comparisons": [as_dict(comparison) for comparison in comparisons],
            "published": beside,
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _table(comparison: Comparison) -> Table:
    shots = ", ".join(map(str, comparison.shot_counts))
    table = Table(title=f"{comparison.name}: {comparison.documents} documents at {shots} shots", title_justify="left")
    for column in ("", "A", "B", "B against A", "stderr", "95% interval"):
        table.add_column(column, justify="left" if not column else "right")
    for row in comparison.rows:
        difference = row.difference
        stderr = _number(difference.stderr) if difference else ""
        table.add_row(row.name, _value(row.a), _value(row.b), _value(difference), stderr, _interval(difference))
    return table


def _published_table(name: str, rows: list[dict[str, str]]) -> Table:
    table = Table(title=f"published divergence, {name} (points)", title_justify="left")
    for column in rows[0] if rows else ():
        table.add_column(column)
    for row in rows:
        table.add_row(*row.values())
    return table


def _value(estimate: Estimate | None) -> str:
    return "" if estimate is None else _number(estimate.value)


def _interval(estimate: Estimate | None) -> str:
    if estimate is None or estimate.interval is None:
        return ""
    low, high = map(_number, estimate.interval)
    return f"{low} to {high}"


def _number(x: float) -> str:
    return "N/A" if math.isnan(x) else f"{x:.4g}"
