"""`mamba-study run`: do what is missing of a study."""

from __future__ import annotations

import _thread
import os
import sys
from pathlib import Path
from typing import Any

import click

INTERRUPTED = 130


@click.command("run")
@click.argument("recipe")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of the study. [default: mamba-studies/RECIPE]",
)
@click.option("--seeds", type=click.IntRange(min=1), help="How many seeds, in place of what the recipe says.")
@click.option("--device", help="cpu, cuda, cuda:1, …  Default cuda where there is one.")
@click.option("--retry-failed", is_flag=True, help="Also do those again that failed.")
@click.option(
    "--extend", is_flag=True, help="Take a changed recipe to a study that is there; runs in both stay finished."
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="This process, or Ray's workers.",
)
@click.option("--address", help="Of a Ray cluster: auto, HOST:6379, ray://HOST:10001. [default: one on this machine]")
@click.option(
    "--storage",
    metavar="URL",
    help="Where Ray's workers leave results (s3://…, any fsspec URL) if they do not share the study's directory.",
)
def run_command(
    recipe: str,
    output: Path | None,
    seeds: int | None,
    device: str | None,
    retry_failed: bool,
    extend: bool,
    engine: str,
    address: str | None,
    storage: str | None,
) -> None:
    """Do what is missing of a study, and say how it stands.

    RECIPE is the name of one that comes along, a YAML file, or the directory of a study that is to go on. Whatever
    ended an earlier run, this one goes on from there: finished runs are not repeated, a fine-tuning resumes from its
    last checkpoint. Several of these commands may work on one study. A run that fails is recorded and does not stop
    the others.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from ..studies.claims import Claims
    from ..studies.progress import ShowRuns, own_console
    from ..studies.recipe import Recipe, builtin_names
    from ..studies.runner import ending_on_sigterm, run_study
    from ..studies.runner import retry_failed as forget
    from ..studies.store import Study
    from .errors import explained

    if engine == "local" and (address or storage):
        raise click.UsageError("--address and --storage go with --engine ray.")
    with explained():
        if Path(recipe).is_dir() and recipe not in builtin_names():  # of a directory with such a name: ./icl
            if seeds or output or extend:
                raise click.UsageError(f"{recipe} is a study with a recipe of its own; give the recipe to change it.")
            study = Study.open(Path(recipe))
        else:
            asked = Recipe.load(recipe, seeds)
            study = Study.begin(output or Path("mamba-studies") / Path(recipe).stem, asked, extend=extend)
        used: Any = _engine(engine, study, device, address, storage)
        console = own_console()
        shown = ShowRuns(study, console, _kind_of(device))
        console.print(f"{study.recipe.kind}: {len(study.runs)} runs in {study.path}", highlight=False, soft_wrap=True)
        try:
            with Claims(study.path, lost=lambda run: _thread.interrupt_main()) as claims, ending_on_sigterm(), used:
                if retry_failed:
                    forget(study, claims)
                tally = run_study(study, used, shown, claims)
        except KeyboardInterrupt:
            shown.close()
            done = len(study.finished())
            console.print(
                f"Stopped with {done} of {len(study.runs)} runs finished. Go on:\n  mamba-study run {study.path}",
                highlight=False,
                soft_wrap=True,
            )
            sys.exit(INTERRUPTED)
        finally:
            shown.close()
    line = f"{tally.finished} of {len(study.runs)} runs finished"
    if tally.failed:
        line += f", {tally.failed} failed, {tally.blocked} wait for them: mamba-study status {study.path}"
    console.print(f"{line}. Report:\n  mamba-study report {study.path}", highlight=False, soft_wrap=True)
    sys.exit(1 if tally.failed else 0)


def _engine(name: str, study: Any, device: str | None, address: str | None, storage: str | None) -> Any:
    if name == "local":
        from ..studies.runner import LocalEngine

        if device is not None:
            from ..stability import torch_device

            torch_device(device)
        return LocalEngine(device)
    from ..studies.ray_engine import RayEngine

    return RayEngine(study, device, address, storage)


def _kind_of(device: str | None) -> str:
    import torch

    return "CPU" if device == "cpu" or not torch.cuda.is_available() else "H200"
