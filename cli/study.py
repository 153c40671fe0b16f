"""`mamba-study`: the papers' experiments, and what comes after an evaluation.

mamba-study run icl-mini -o icl/
mamba-study report icl/
mamba-study compare fp32/results_….json bf16/results_….json --output report.json
"""

from __future__ import annotations

import click

from .commands.compare import compare_command
from .commands.list import list_command
from .commands.plan import plan_command
from .commands.report import report_command
from .commands.run import run_command
from .commands.status import status_command
from .stability import stability_command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
def main() -> None:
    """The papers' experiments on models of yours: a recipe is planned, run, and reported.

    Whatever stops a run, the next one goes on; `list` shows the recipes.
    """


for command in (
    list_command,
    plan_command,
    run_command,
    status_command,
    report_command,
    compare_command,
    stability_command,
):
    main.add_command(command)

if __name__ == "__main__":
    main()
