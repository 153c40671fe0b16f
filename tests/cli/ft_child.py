"""What a process of the fork server runs: mamba-ft, its output into a file. Importable by name, as conftest is not."""

import os

PRELOAD = ["lm_eval_mamba.cli.finetune"]


def run(arguments: list[str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from lm_eval_mamba.cli.ft import main

    main(arguments, prog_name="mamba-ft")
