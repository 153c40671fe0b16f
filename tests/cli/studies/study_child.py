"""What a process of the fork server runs: mamba-study, its output into a file; importable, as conftest is not."""

import os

PRELOAD = ["lm_eval_mamba.cli.finetune", "lm_eval_mamba.cli.study", "lm_eval.evaluator", "lm_eval_mamba.backend"]


def run(arguments: list[str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from lm_eval_mamba.cli.study import main

    main(arguments, prog_name="mamba-study")
