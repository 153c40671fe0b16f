"""The divergence groups of real benchmarks are lm-eval's own tasks; made-up data sets stand for theirs."""

from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
from lm_eval.tasks import TaskManager

from ..lm_eval_mamba.stub import StubLM, evaluate, our_tasks

SHOTS = (0, 1, 3, 5)
OWN = Path(lm_eval.tasks.__file__).parent


@pytest.fixture
def fake_datasets(monkeypatch):
    loaded = []

    def load_dataset(path, name=None, **kwargs):
        loaded.append(name)
        if path == "allenai/winogrande":
            rows = [{"sentence": f"{i} Ann met Bo and _ ran.", "option1": "Ann", "option2": "Bo"} for i in range(8)]
            rows = [{**row, "answer": str(1 + i % 2)} for i, row in enumerate(rows)]
            return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in ("train", "validation")})
        assert path == "cais/mmlu"
        rows = [
            {"question": f" {name} {i}?", "choices": [f"{i}{c}" for c in "wxyz"], "answer": i % 4, "subject": name}
            for i in range(1 + len(name) % 3)
        ]
        dev = [{**row, "question": "dev " + row["question"]} for row in (rows * 5)[:5]]
        return datasets.DatasetDict(test=datasets.Dataset.from_list(rows), dev=datasets.Dataset.from_list(dev))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    return loaded


def test_mmlu_is_lm_evals_with_its_weights(fake_datasets):
    ours = evaluate(StubLM(), ["mmlu_divergence"], our_tasks(), limit=None)
    assert len(fake_datasets) == len(set(fake_datasets)) == 57  # one a subject, not one a shot count
    shown = ours["groups"]["mmlu_divergence"]
    theirs = TaskManager(include_path=str(OWN / "mmlu" / "default"), include_defaults=False)
    for shots in (1,):
        own = evaluate(StubLM(), ["mmlu"], theirs, limit=None, num_fewshot=shots)
        assert shown[f"acc_{shots}shot,none"] == pytest.approx(own["groups"]["mmlu"]["acc,none"])
        assert (
            len({own["results"][name]["sample_len"] for name in own["samples"]}) > 1
        )  # sizes differ, so weights matter
        subjects = [name.removeprefix("mmlu_") for name in own["samples"]]
        assert {f"mmlu_divergence_{subject}_{shots}shot" for subject in subjects} == {
            name for name in ours["samples"] if name.endswith(f"_{shots}shot")
        }
        for subject in subjects:
            mine = ours["samples"][f"mmlu_divergence_{subject}_{shots}shot"]
            for sample, other in zip(mine, own["samples"][f"mmlu_{subject}"], strict=True):
                assert [args[:2] for args in sample["arguments"][:4]] == other["arguments"]
                assert sample["acc"] == other["acc"]
    assert shown["noise_floor_documents,none"] >= 1


def test_winogrande_is_lm_evals(fake_datasets):
    theirs = TaskManager(include_path=str(OWN / "winogrande"), include_defaults=False)
    loaded = our_tasks().load(["winogrande_divergence"])["tasks"]
    assert len(fake_datasets) == 1
    StubLM()
    for shots in SHOTS:
        (task,) = theirs.load(["winogrande"])["tasks"].values()
        task.set_config("num_fewshot", shots)
        ours = loaded[f"winogrande_divergence_winogrande_{shots}shot"]
        lm = StubLM()
        for each in (task, ours):
            each.set_fewshot_seed(1234)
            each.build_all_requests(limit=3, rank=0, world_size=1)
        mine = [i.args[:2] for i in ours.instances if not i.args[2]["rebatched"]]
        assert mine == [i.args for i in task.instances]
        assert ours.VERSION == task.VERSION and lm.requests == []


def test_mini_shares_the_data_of_icl_gap_mini():
    loaded = our_tasks().load(["divergence_mini", "icl_gap_mini"])["tasks"]
    for name in ("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande"):
        assert loaded[f"divergence_mini_{name}_3shot"].eval_docs[5] == loaded[f"icl_gap_mini_{name}_3shot"].eval_docs[5]
    assert not list((Path(__file__).parent.parent.parent / "tasks" / "divergence_mini").rglob("*.jsonl"))


def test_without_network_the_embedded_group_is_named():
    with pytest.raises(ConnectionError, match=r"allenai/winogrande is neither .*--tasks divergence_mini"):
        our_tasks().load(["winogrande_divergence"])
