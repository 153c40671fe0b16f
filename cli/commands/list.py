"""`mamba-study list`: the recipes that come along."""

from __future__ import annotations

import click


@click.command("list")
@click.option("--show", metavar="NAME", help="Print this recipe, to be copied and edited.")
def list_command(show: str | None) -> None:
    """The recipes that come along, the papers' and a mini of each that runs anywhere.

    A recipe of your own is a copy: mamba-study list --show icl > my.yaml
    """
    import yaml
    from rich.console import Console
    from rich.table import Table

    from ..studies.recipe import builtin_names, builtin_text

    if show is not None:
        if show not in builtin_names():
            raise click.BadParameter(f"{show!r} is not one of {', '.join(builtin_names())}.", param_hint="--show")
        click.echo(builtin_text(show), nl=False)
        return
    table = Table("recipe", "what it answers", box=None, padding=(0, 2, 0, 0))
    for name in builtin_names():
        table.add_row(name, yaml.safe_load(builtin_text(name))["about"])
    Console().print(table)
