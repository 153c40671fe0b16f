"""Recipes of seconds, `mamba-study` in this process, and in processes of its own that can be killed."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from lm_eval_mamba.cli.studies.recipe import Recipe
from lm_eval_mamba.cli.study import main

sys.path.insert(0, str(Path(__file__).parent))  # the fork server's processes inherit it
import study_child

# Two fine-tunings and their scores.
TINY = """\
study: finetune-divergence
models: [mini]
finetune:
  dataset: {dataset: embedded, split: "train[:48]"}
  preset: [full, sll]
  precision: fp32
  max_steps: 4
  save_steps: 1
tasks: [divergence_mini]
limit: 3
"""


def recipe(text: str, base: Path = Path("/")) -> Recipe:
    return Recipe.parse(text, "my.yaml", base)


def results(study: Path) -> dict[str, int]:
    """Result file to the time at which it was written."""
    return {str(path): path.stat().st_mtime_ns for path in study.glob("runs/*/result.json")}


def figures(report: Path) -> dict[str, str]:
    """What the report's figures show."""
    return {path.name: path.read_text() for path in report.glob("figures/*.csv")}


@pytest.fixture
def study():
    """Run mamba-study in this process: (status, output)."""

    def run(*arguments):
        result = CliRunner().invoke(main, list(map(str, arguments)), env={"COLUMNS": "200"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return run


@pytest.fixture
def child(tmp_path):
    """Start mamba-study in a process of its own: a multiprocessing process, with `log`."""
    children = []
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(study_child.PRELOAD)

    def start(*arguments):
        log = tmp_path / f"log-{len(children)}"
        process = server.Process(target=study_child.run, args=([str(each) for each in arguments], str(log)))
        process.log = log
        process.start()
        children.append(process)
        return process

    yield start
    for each in children:
        each.kill()
        each.join()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The directory of a TINY study that was done at once, with its report."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "tiny.yaml").write_text(TINY)
    for arguments in (
        ["run", str(folder / "tiny.yaml"), "-o", str(folder / "study")],
        ["report", str(folder / "study")],
    ):
        ran = CliRunner().invoke(main, arguments)
        assert ran.exit_code == 0, ran.output
    return folder / "study"
