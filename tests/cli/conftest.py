"""`mamba-ft` in this process, and in processes of its own that can be killed."""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from lm_eval_mamba.cli.ft import main

sys.path.insert(0, str(Path(__file__).parent))  # the fork server's processes inherit it
import ft_child

SMALL = ("--device", "cpu", "--split", "train[:64]", "--eval-split", "heldout[:16]")
QUICK = (*SMALL, "--batch-size", "8", "--max-steps", "4", "--logging-steps", "1")


class Child:
    """A mamba-ft in a process of its own, forked from a server that has imported everything already."""

    def __init__(self, log: Path, *arguments) -> None:
        self.log = log
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(ft_child.PRELOAD)
        self.process = server.Process(target=ft_child.run, args=([str(each) for each in arguments], str(log)))
        self.process.start()
        self.pid = self.process.pid

    def alive(self) -> bool:
        return self.process.is_alive()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, str]:
        """Exit status and output, on one line, since rich wraps it."""
        self.process.join(timeout=300)
        assert self.process.exitcode is not None, "mamba-ft hangs"
        return self.process.exitcode, self.log.read_text().replace("\n", "")


@pytest.fixture
def child(tmp_path):
    """Start mamba-ft in a process of its own."""
    children = []

    def start(*arguments) -> Child:
        children.append(Child(tmp_path / f"log-{len(children)}", *arguments))
        return children[-1]

    yield start
    for each in children:
        each.process.kill()
        each.process.join()


@pytest.fixture
def ft(tmp_path):
    """Run mamba-ft in this process: (status, output, run.json or None)."""

    def run(*arguments, output: Path | None = None, quick: bool = True):
        output = output or tmp_path / "out"
        result = CliRunner().invoke(main, [*(QUICK if quick else ()), *map(str, arguments), "-o", str(output)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        figures = output / "run.json"
        return result.exit_code, result.output, json.loads(figures.read_text()) if figures.is_file() else None

    return run
