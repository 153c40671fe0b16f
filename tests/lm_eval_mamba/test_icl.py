"""The group `icl_gap` inside lm-eval: its figures, what it shares with lm-eval's own tasks, what it refuses."""

import json
import math
import os
from importlib.resources import files

import datasets
import lm_eval
import numpy as np
import pytest
from lm_eval.tasks import TaskManager

from lm_eval_mamba.statistics import icl_gap

from .processes import groups_of_two_processes

SHOTS = (0, 1, 3, 5)
MINI = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande")
FIGURES = ("improvement_1shot", "improvement_3shot", "improvement_5shot", "aipss")


def our_tasks() -> TaskManager:
    """Without lm-eval's own 10,000 files, whose index takes seconds; test_discovery covers the full one."""
    return TaskManager(include_path=str(files("lm_eval_mamba.tasks")), include_defaults=False)


def evaluate(pretrained="mini-2", **kwargs):
    defaults = {"tasks": ["icl_gap_mini"], "limit": 20, "batch_size": 32, "bootstrap_iters": 10, "device": "cpu"}
    return lm_eval.simple_evaluate(
        model="mamba_amp",
        model_args={"pretrained": pretrained},
        task_manager=our_tasks(),
        **defaults | kwargs,
    )


@pytest.fixture(scope="module")
def results():
    return evaluate()


def scores_by_document(samples, benchmark) -> dict[int, np.ndarray]:
    """Shots -> acc by document, in the order of doc_id: what anyone can compute from the logged samples."""
    return {
        shots: np.array(
            [s["acc"] for s in sorted(samples[f"icl_gap_mini_{benchmark}_{shots}shot"], key=lambda s: s["doc_id"])]
        )
        for shots in SHOTS
    }


def test_figures_are_those_of_the_logged_samples(results):
    samples = results["samples"]
    expected = icl_gap({benchmark: scores_by_document(samples, benchmark) for benchmark in MINI})
    shown = results["groups"]["icl_gap_mini"]
    named = {f"improvement_{shots}shot": estimate for shots, estimate in expected.improvement.items()}
    for name, estimate in (named | {"aipss": expected.aipss}).items():
        assert shown[f"{name},none"] == pytest.approx(estimate.value)
        assert shown[f"{name}_stderr,none"] == pytest.approx(estimate.stderr)


def test_every_benchmark_shows_its_own_figures_and_tasks(results):
    for benchmark in (*MINI, "lambada"):
        group = f"icl_gap_mini_{benchmark}"
        assert results["group_subtasks"][group] == [f"{group}_{shots}shot" for shots in SHOTS]
        assert {f"{name},none" for name in FIGURES} <= results["groups"][group].keys()
        for shots in SHOTS:
            assert results["n-shot"][f"{group}_{shots}shot"] == shots
            assert results["results"][f"{group}_{shots}shot"]["acc_stderr,none"] != "N/A"  # lm-eval's own still works
    assert "perplexity,none" in results["results"]["icl_gap_mini_lambada_3shot"]


def test_lambada_stands_beside_the_mean(results):
    improvements = [results["groups"][f"icl_gap_mini_{benchmark}"]["aipss,none"] for benchmark in MINI]
    assert results["groups"]["icl_gap_mini"]["aipss,none"] == pytest.approx(np.mean(improvements))


def test_shot_counts_share_documents(results):
    for benchmark in MINI:
        hashes = [
            [sample["doc_hash"] for sample in results["samples"][f"icl_gap_mini_{benchmark}_{shots}shot"]]
            for shots in SHOTS
        ]
        assert all(other == hashes[0] for other in hashes[1:])


def test_results_are_json_and_tables(results):
    from lm_eval.utils import handle_non_serializable, make_table

    json.dumps(results, default=handle_non_serializable, allow_nan=False)
    assert "aipss" in make_table(results, "groups")


@pytest.mark.parametrize("checkpoint", ["mini", "mini-2"])
def test_answers_are_those_of_the_hf_backend(checkpoint, results):
    arguments = {"pretrained": str(files("peft_mamba") / "embedded" / checkpoint), "dtype": "float32"}
    shared = {"tasks": ["icl_gap_mini"], "limit": 4, "batch_size": 16, "bootstrap_iters": 0, "device": "cpu"}
    theirs = lm_eval.simple_evaluate(model="hf", model_args=arguments, task_manager=our_tasks(), **shared)
    ours = evaluate(pretrained=checkpoint, **shared)
    for task, samples in ours["samples"].items():
        for sample, other in zip(samples, theirs["samples"][task], strict=True):
            assert sample["arguments"] == other["arguments"]
            for (answer,), (expected,) in zip(sample["resps"], other["resps"], strict=True):
                # abs: near 0 a log-likelihood is the difference of two fp32 numbers of about 10
                assert answer[0] == pytest.approx(expected[0], rel=1e-5, abs=2e-6)
                assert answer[1] == expected[1]


def test_num_fewshot_is_refused():
    with pytest.raises(ValueError, match="--num_fewshot 5 cannot be applied to icl_gap_mini_hellaswag_1shot"):
        evaluate(num_fewshot=5)


def test_samples_must_be_the_same_at_each_shot_count():
    selected = {f"icl_gap_mini_piqa_{shots}shot": [1, 4, 7] for shots in SHOTS}
    with pytest.raises(ValueError, match="--samples selects other documents for icl_gap_mini_piqa_5shot"):
        evaluate(limit=None, samples=selected | {"icl_gap_mini_piqa_5shot": [1, 4, 8]})


def test_predict_only_has_no_figures():
    groups = evaluate(limit=2, predict_only=True)["groups"]
    assert not any(key.startswith("aipss") for key in groups["icl_gap_mini"])


def test_zero_accuracy_without_shots_is_undefined_and_said(caplog):
    group = our_tasks().load(["icl_gap_mini"])["groups"]["icl_gap_mini"]
    for task in group.get_all_tasks():
        piqa_0 = task.config.task == "icl_gap_mini_piqa_0shot"
        task.aggregation()["acc"]([0.0, 0.0, 0.0] if piqa_0 else [1.0, 0.0, 1.0])  # as lm-eval does on rank 0
    figures = group.aggregate({})
    assert {figures[f"{name},none"] for name in FIGURES} == {"N/A"}
    assert "0-shot accuracy is zero on mini_piqa" in caplog.text
    assert group.get("icl_gap_mini_hellaswag").aggregate({})["aipss,none"] == 0


def test_one_document_has_no_standard_error():
    figures = evaluate(limit=1)["groups"]["icl_gap_mini_lambada"]
    assert figures["aipss_stderr,none"] == "N/A"


def test_use_cache_gives_the_same_figures_again(tmp_path, results):
    for _ in range(2):
        again = evaluate(use_cache=str(tmp_path / "cache"))
        assert again["groups"] == results["groups"]


def test_two_processes_give_the_figures_of_one(tmp_path, results):
    groups = groups_of_two_processes(tmp_path, "mini-2", "icl_gap_mini", 20)
    for name, figures in results["groups"].items():
        for key, value in figures.items():
            if isinstance(value, float) and not math.isnan(value):
                assert groups[name][key] == pytest.approx(value, rel=1e-9), (name, key)


# icl_gap itself: the definitions are lm-eval's

DOCUMENTS = {
    "Rowan/hellaswag": {
        "ind": 1,
        "activity_label": "Baking",
        "ctx_a": "He stirs.",
        "ctx_b": "then he",
        "ctx": "He stirs. then he",
        "endings": ["pours.", "sings.", "sleeps.", "reads."],
        "label": "2",
    },
    "baber/piqa": {"goal": "Open a jar", "sol1": "twist", "sol2": "shout", "label": 1},
    "allenai/ai2_arc": {
        "id": "1",
        "question": "What is wet?",
        "choices": {"text": ["water", "sand", "fire", "air"], "label": ["A", "B", "C", "D"]},
        "answerKey": "A",
    },
    "allenai/winogrande": {"sentence": "Ann met Bo and _ ran.", "option1": "Ann", "option2": "Bo", "answer": "2"},
    "EleutherAI/lambada_openai": {"text": "The word at the end is here"},
}


@pytest.fixture
def fake_datasets(monkeypatch):
    loaded = []

    def load_dataset(path, name=None, **kwargs):
        loaded.append((path, name))
        document = DOCUMENTS[path]
        varied = [key for key in ("ctx_a", "goal", "question", "sentence", "text") if key in document]
        rows = [{**document, **{key: f"{i} {document[key]}" for key in varied}} for i in range(8)]
        splits = ("test",) if "lambada" in path else ("train", "validation", "test")
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in splits})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return loaded


def test_contexts_are_those_of_lm_evals_own_tasks(fake_datasets):
    from lm_eval.tasks import __file__ as tasks_init

    own = {"hellaswag": "hellaswag", "piqa": "piqa", "arc_easy": "arc", "arc_challenge": "arc"}
    own |= {"winogrande": "winogrande", "lambada_openai": "lambada"}
    root = os.path.dirname(tasks_init)
    theirs = TaskManager(include_path=[f"{root}/{folder}" for folder in set(own.values())], include_defaults=False)
    loaded = our_tasks().load(["icl_gap"])
    assert len(fake_datasets) == 6  # one a benchmark, not one a shot count
    for name in own:
        for shots in SHOTS:
            (task,) = theirs.load([name])["tasks"].values()
            task.set_config("num_fewshot", shots)
            ours = loaded["tasks"][f"icl_gap_{name}_{shots}shot"]
            for each in (task, ours):
                each.set_fewshot_seed(1234)
                each.build_all_requests(limit=3, rank=0, world_size=1)
            assert [i.args for i in ours.instances] == [i.args for i in task.instances]
            assert ours.VERSION == task.VERSION
    assert loaded["groups"]["icl_gap"].child_names == [f"icl_gap_{name}" for name in own]


def test_without_network_the_embedded_benchmark_is_named():
    with pytest.raises(ConnectionError, match=r"data set Rowan/hellaswag is neither cached .*--tasks icl_gap_mini"):
        our_tasks().load(["icl_gap"])
