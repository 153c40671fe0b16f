"""The group `divergence_mini` in one run against three runs of one precision each over the same requests.

    python benchmarks/divergence.py [mini | mini-2]

24 documents a task, one process; each run loads its model, builds its contexts and aggregates as lm_eval does. Runs
alternate; the median of 3 rounds after one warm-up of each.
"""

import logging
import platform
import statistics
import sys
import time
from importlib.metadata import version
from importlib.resources import files

import lm_eval
import lm_eval.evaluator
import torch
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager

from lm_eval_mamba.backend import MambaAMP

ROUNDS, BATCH, LIMIT = 3, 64, 24
PRECISIONS = ("fp32", "fp16", "bf16")
EMBEDDED = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande")


def seconds(pretrained: str, dtype: str | None, tasks: list[str | Group], manager: TaskManager) -> float:
    loaded = manager.load(tasks)
    start = time.perf_counter()
    model = MambaAMP(pretrained=pretrained, dtype=dtype, batch_size=BATCH)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(1234)
    lm_eval.evaluator.evaluate(model, loaded, limit=LIMIT, log_samples=False)
    return time.perf_counter() - start


def main() -> None:
    logging.disable(logging.WARNING)
    pretrained = sys.argv[1] if len(sys.argv) > 1 else "mini"
    manager = TaskManager(include_path=str(files("lm_eval_mamba.tasks")), include_defaults=False)

    def benchmark(name: str) -> Group:
        """The same requests in one precision: a subgroup of icl_gap_mini, which has a sixth task."""
        return manager.load(["icl_gap_mini"])["groups"][f"icl_gap_mini_{name}"]

    together, apart = [], []
    for _ in range(ROUNDS + 1):
        together.append(seconds(pretrained, None, ["divergence_mini"], manager))
        apart.append(
            sum(seconds(pretrained, dtype, [benchmark(name) for name in EMBEDDED], manager) for dtype in PRECISIONS)
        )
    ours, peer = statistics.median(together[1:]), statistics.median(apart[1:])
    print(
        f"{pretrained}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, lm_eval {version('lm_eval')}, batch {BATCH}, {LIMIT} documents a task"
    )
    print(f"three runs of one precision {peer:.1f} s, the group {ours:.1f} s, {ours / peer:.2f}x")


if __name__ == "__main__":
    main()
