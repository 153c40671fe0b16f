"""`mamba-study status`: how a study stands."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("status")
@click.argument("study", type=click.Path(exists=True, file_okay=False, path_type=Path))
def status_command(study: Path) -> None:
    """Every run of STUDY, a directory: finished, running, missing, failed and why, or blocked by a failed one."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..studies.claims import Claims
    from ..studies.progress import duration
    from ..studies.runner import states
    from ..studies.store import Study
    from .errors import explained

    with explained():
        found = Study.open(study)
    claims = Claims(found.path)
    now = states(found, lambda run: claims.held_by(run.id) is not None)
    table = Table("", "run", "", title=f"{found.recipe.kind}: {found.recipe.about}", title_justify="left")
    seconds = 0.0
    for run in found.runs:
        state, said = now[run.id], ""
        if (done := found.result(run)) is not None:
            said = f"{duration(done.record['seconds'])}, {done.record['device']}"
            seconds += done.record["seconds"]
        elif (problem := found.error(run)) is not None:
            log = found.directory(run) / "log.txt"
            said = f"{problem['error'].splitlines()[0]} (attempt {problem['attempts']}; {log})"
        elif state == "running":
            said = str(claims.held_by(run.id) or "")
        table.add_row(state, Text(run.name), Text(said))
    console = Console()
    console.print(table)
    counts = {state: list(now.values()).count(state) for state in dict.fromkeys(now.values())}
    summary = ", ".join(f"{count} {state}" for state, count in counts.items())
    console.print(f"{summary}; finished ones took {duration(seconds)}.", highlight=False, soft_wrap=True)
