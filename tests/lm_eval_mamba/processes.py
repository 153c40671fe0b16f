"""One evaluation on two processes, as `accelerate launch` starts them on GPUs (with --cpu it starts one only)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = """
import json, sys, lm_eval
from importlib.resources import files
from lm_eval.tasks import TaskManager
from lm_eval_mamba.backend import MambaAMP

path, model, task, limit = sys.argv[1:]
manager = TaskManager(include_path=str(files("lm_eval_mamba.tasks")), include_defaults=False)
lm = MambaAMP(batch_size=32, pretrained=model)
assert lm.world_size == 2, "this is not a test of two processes"
results = lm_eval.simple_evaluate(lm, tasks=[task], limit=int(limit), bootstrap_iters=10, task_manager=manager)
if lm.rank == 0:
    json.dump(results["groups"], open(path, "w"))
"""


def groups_of_two_processes(tmp_path: Path, model: str, task: str, limit: int, device: str = "cpu") -> dict[str, Any]:
    script, groups = tmp_path / "evaluate.py", tmp_path / "groups.json"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"ACCELERATE_USE_CPU": "1"} if device == "cpu" else {})
    arguments = [*command, groups, model, task, limit]
    done = subprocess.run(
        [str(each) for each in arguments], cwd=tmp_path, env=environment, timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-10_000:]
    return json.loads(groups.read_text())
