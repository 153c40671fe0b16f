"""Several processes score one tree: what each gets, the answers of one process, and who does not come."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_mamba.backend import MambaAMP
from lm_eval_mamba.scoring.processes import divide
from lm_eval_mamba.scoring.tree import PrefixTree

SUBJECTS = ["the old mill by the river turns " * 12, "a cat and two dogs went to sea " * 12]
REQUESTS = [
    (f"{subject}question {i}:", f" answer {choice}") for subject in SUBJECTS for i in range(6) for choice in "ab"
]
SCRIPT = """
import atexit, json, sys, time
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval_mamba.backend import MambaAMP
from lm_eval_mamba.scoring import processes

path, case, pairs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
ended = lambda: open(f"{path}/{lm.rank}.ended", "w").write(str(not dist.is_initialized()))
atexit.register(ended)  # runs after what the backend registers
lm = MambaAMP(pretrained="mini")
# Every second document of two answers, as lm-eval deals them out.
own = [pair for i, pair in enumerate(pairs) if i // 2 % lm.world_size == lm.rank]
instances = lambda pairs: [Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(pairs)]
answers, tokens = [], []
if case == "one stays away":
    processes.PATIENCE = 2.0
    if lm.rank == 1:  # has nothing to score in the first call
        time.sleep(10)
        answers.append([])
if not (case == "one stays away" and lm.rank == 1):
    answers.append(lm.loglikelihood(instances(own)))
    tokens.append(lm.work.run)
if case == "cached":
    lm.cache_hook.dbdict = {}
asked = [] if case == "cached" and lm.rank == 1 else own
answers.append(lm.loglikelihood(instances(asked)) if asked else [])
tokens.append(lm.work.run)
json.dump({"own": own, "answers": answers, "tokens": tokens}, open(f"{path}/{lm.rank}.json", "w"))
lm.accelerator.wait_for_everyone()
"""


def run(tmp_path, case: str, count: int = 2) -> list[dict]:
    script = tmp_path / "score.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    arguments = [*map(str, command), str(tmp_path), case, json.dumps(REQUESTS)]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-10_000:]
    return [json.loads((tmp_path / f"{rank}.json").read_text()) | {"said": done.stderr} for rank in range(count)]


@pytest.fixture(scope="module")
def alone():
    """The answers of one process to all requests, and the tokens that it runs for them."""
    from lm_eval.api.instance import Instance

    lm = MambaAMP(pretrained="mini")
    answers = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(REQUESTS)])
    return dict(zip(REQUESTS, answers, strict=True)), lm.work.run


def assert_right(ranks: list[dict], call: int, alone: dict) -> None:
    for rank in ranks:
        for pair, (logprob, greedy) in zip(rank["own"], rank["answers"][call], strict=True):
            expected = alone[tuple(pair)]
            assert logprob == pytest.approx(expected[0], rel=1e-5) and greedy == expected[1]


@pytest.mark.parametrize("count", [2, 3])
def test_each_process_scores_whole_branches(tmp_path, alone, count):
    answers, tokens = alone
    ranks = run(tmp_path, "together", count)
    for call in (0, 1):
        assert_right(ranks, call, answers)
        ran = [rank["tokens"][call] for rank in ranks]
        # Two processes have a subject each; of three, each runs the start of one or of both.
        assert sum(ran) < (1.1 if count == 2 else 2) * tokens and max(ran) < 0.6 * tokens


def test_processes_end_their_group_before_they_end(tmp_path):
    """Left to the end of the interpreter, one in twenty aborted there, and the launcher stopped the others."""
    run(tmp_path, "together")
    assert [(tmp_path / f"{rank}.ended").read_text() for rank in range(2)] == ["True", "True"]


def test_a_process_that_does_not_come_is_not_waited_for(tmp_path, alone):
    answers, tokens = alone
    ranks = run(tmp_path, "one stays away")
    assert_right(ranks[:1], 0, answers)
    assert_right(ranks, 1, answers)
    assert "not all had requests to score" in ranks[0]["said"]
    assert min(rank["tokens"][-1] for rank in ranks) > 0.7 * tokens  # each both of the subjects


def test_with_a_cache_each_process_scores_its_own(tmp_path, alone):
    answers, tokens = alone
    ranks = run(tmp_path, "cached")
    assert "not all had requests to score" not in ranks[0]["said"]
    assert_right(ranks, 0, answers)
    assert max(rank["tokens"][0] for rank in ranks) < 0.6 * tokens
    assert_right(ranks[:1], 1, answers)
    assert ranks[0]["tokens"][1] > 0.7 * tokens


sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), max_size=30)


@settings(deadline=None)
@given(sequences, st.integers(1, 5))
def test_parts_are_stretches_of_the_sorted_sequences(sequences, parts):
    part = divide([np.array(sequence, dtype=np.uint32) for sequence in sequences], parts)
    assert part.shape == (len(sequences),) and ((part >= 0) & (part < parts)).all()
    in_order = [int(part[i]) for i in sorted(range(len(sequences)), key=sequences.__getitem__)]
    assert in_order == sorted(in_order)
    same = {}
    assert all(same.setdefault(tuple(s), p) == p for s, p in zip(sequences, part.tolist(), strict=True))


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_parts_are_alike_and_cut_where_little_is_shared(parts):
    rng = np.random.default_rng(0)
    made = []
    for count in range(5, 17):  # subjects of 400 tokens, each with so many documents of 8 more
        subject = rng.integers(1000, size=400)
        made += [np.concatenate([subject, rng.integers(1000, size=8)]).astype(np.uint32) for _ in range(count)]
    rng.shuffle(made)
    part = divide(made, parts)
    run = [PrefixTree.of([s for s, p in zip(made, part, strict=True) if p == i]).tokens_run for i in range(parts)]
    whole = PrefixTree.of(made).tokens_run
    assert sum(run) == whole  # no subject is cut
    assert max(run) <= whole / parts + 528  # a subject
