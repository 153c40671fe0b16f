"""`mamba-study report`: tables and figures of what has finished."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("study", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="Directory for it. [default: STUDY/report]"
)
def report_command(study: Path, output: Path | None) -> None:
    """Tables and figures of what has finished of STUDY, a directory.

    Writes report.md, report.html, which is one file with everything in it, and each figure as SVG with its data as CSV.
    """
    from ..studies.report.write import write_report
    from ..studies.store import Study
    from .errors import explained

    with explained():
        found = Study.open(study)
        for path in write_report(found, output or found.path / "report"):
            click.echo(path)
