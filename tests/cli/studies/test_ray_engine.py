"""A study on a cluster of two nodes, one of which is lost in the middle; results uploaded instead of shared."""

import os
import subprocess
import sys
import time

import pytest
from lm_eval_mamba.cli.studies.ray_engine import _download, _fetch, _upload

from .conftest import TINY, figures, results

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    made.shutdown()


def command(tmp_path, cluster, *arguments):
    (tmp_path / "tiny.yaml").write_text(TINY)
    command = [sys.executable, "-m", "lm_eval_mamba.cli.study", "run", str(tmp_path / "tiny.yaml")]
    command += ["-o", str(tmp_path / "study"), "--engine", "ray", "--address", cluster.address, "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_lost_node_changes_nothing(cluster, tmp_path, study, undisturbed):
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    process = command(tmp_path, cluster)
    deadline = time.monotonic() + 300
    # Both train by then: whichever node is lost has begun something.
    while len(list(tmp_path.glob("study/runs/*/model/checkpoint-*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    cluster.remove_node(nodes[0], allow_graceful=False)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and "4 of 4 runs finished" in output, output
    assert len(results(tmp_path / "study")) == 4
    assert study("report", tmp_path / "study")[0] == 0
    assert figures(tmp_path / "study" / "report") == figures(undisturbed / "report")
    cluster.remove_node(nodes[1])


def test_results_travel_through_storage(tmp_path):
    """What a run leaves on one machine is what the next and the report find on theirs."""
    storage = f"file://{tmp_path}/bucket"
    here, there = tmp_path / "here", tmp_path / "there"
    for name in ("log.txt", "model/adapter/a.bin", "model/checkpoint-3/optimizer.pt", "lm_eval/results_x.json"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    _upload(storage, "run", here)
    _fetch(storage, "run", "model", there)
    assert [path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()] == [
        "model/adapter/a.bin"
    ]
    _download(storage, "run", tmp_path / "driver")
    found = {
        path.relative_to(tmp_path / "driver").as_posix() for path in (tmp_path / "driver").rglob("*") if path.is_file()
    }
    assert found == {"log.txt", "lm_eval/results_x.json"}


def test_an_address_without_a_cluster(tmp_path, study):
    (tmp_path / "tiny.yaml").write_text(TINY)
    arguments = ("run", tmp_path / "tiny.yaml", "-o", tmp_path / "study", "--engine", "ray", "--address", "127.0.0.1:1")
    status, output = study(*arguments)
    assert status == 1 and "127.0.0.1:1: no Ray cluster is there" in output
