"""Two runs from lm-eval's own result files: figures, intervals, and mismatches that are refused by name."""

import json
import shutil

import numpy as np
import pytest

from lm_eval_mamba.compare import as_dict, compare, published
from lm_eval_mamba.results import ResultsError, read
from lm_eval_mamba.statistics import Pair, divergence, icl_gap, icl_gap_difference

from .stub import StubLM, evaluate, our_tasks, save

MODELS = {"a": StubLM(1, spread=1.0), "b": StubLM(2, spread=1.0)}
MINI = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande")


@pytest.fixture(autouse=True, scope="module")
def without_environment_report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
        yield


@pytest.fixture(scope="module")
def divergence_runs(manager, tmp_path_factory):
    runs = {name: evaluate(lm, ["divergence_mini"], manager) for name, lm in MODELS.items()}
    return runs, {name: save(run, tmp_path_factory.mktemp(name)) for name, run in runs.items()}


@pytest.fixture(scope="module")
def icl_runs(manager, tmp_path_factory):
    runs = {name: evaluate(lm, ["icl_gap_mini"], manager, limit=30) for name, lm in MODELS.items()}
    return runs, {name: save(run, tmp_path_factory.mktemp(name)) for name, run in runs.items()}


@pytest.fixture(scope="module")
def plain_runs(manager, tmp_path_factory):
    """A task of lm-eval's usual kind, each shot count a run and a file of its own."""
    directories = {}
    for name, lm in MODELS.items():
        directories[name] = tmp_path_factory.mktemp(name)
        for shots in (0, 1, 3, 5):
            save(evaluate(lm, ["mini_piqa"], manager, num_fewshot=shots, limit=40), directories[name])
    return directories


def rows(comparison):
    return {row.name: row for row in comparison.rows}


def edited(file, directory, change):
    """A copy of a result file with its samples, after `change(results)`."""
    copy = shutil.copytree(file.parent, directory / "copy") / file.name
    data = json.loads(copy.read_text())
    change(data)
    copy.write_text(json.dumps(data))
    return copy


def edit_samples(file, task, change):
    (path,) = file.parent.glob(f"samples_{task}_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    change(samples)
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))


# figures


def test_precisions_of_one_result_give_the_figures_of_its_group(divergence_runs):
    runs, files = divergence_runs
    (comparison,) = compare(read(files["a"]), read(files["a"], "bf16"))
    shown, by_name = runs["a"]["groups"]["divergence_mini"], rows(comparison)
    named = {
        "mean divergence (points)": "divergence_bf16",
        "its standard deviation over shots": "divergence_bf16_std",
        "large deviation spikes (> 1 point)": "divergence_bf16_spikes",
        "flipped answers (%)": "flips_bf16",
        "change of log-likelihood (nats)": "loglikelihood_change_bf16",
    }
    for row, figure in named.items():
        estimate = by_name[row].difference
        assert estimate.value == pytest.approx(shown[f"{figure},none"])
        assert estimate.stderr == pytest.approx(shown[f"{figure}_stderr,none"])
        assert estimate.interval == pytest.approx(shown[f"{figure}_interval,none"], abs=1e-6)
    for shots in (0, 1, 3, 5):
        row = by_name[f"acc, {shots} shots (points)"]
        assert row.a.value == pytest.approx(100 * shown[f"acc_{shots}shot,none"])
        assert row.b.value == pytest.approx(100 * shown[f"acc_bf16_{shots}shot,none"])
        assert row.difference.value == pytest.approx(row.b.value - row.a.value)
    assert shown["divergence_bf16,none"] > 0 and comparison.notes == []
    assert (comparison.documents, comparison.shot_counts) == (60, [0, 1, 3, 5])


def test_mixed_precision_of_one_model_against_fp32_of_another(divergence_runs):
    runs, files = divergence_runs
    (comparison,) = compare(read(files["a"], "fp32"), read(files["b"], "fp16"))
    pairs = {}
    for benchmark in MINI:
        names = [f"divergence_mini_{benchmark}_{shots}shot" for shots in (0, 1, 3, 5)]
        ours, theirs = ([runs[side]["samples"][name] for name in names] for side in ("a", "b"))
        lls = [
            [[s["loglikelihoods"][precision] for s in samples] for samples in side]
            for side, precision in ((ours, "fp32"), (theirs, "fp16"))
        ]
        answers = [[[int(np.argmax(x)) for x in by_shots] for by_shots in side] for side in lls]
        pairs[benchmark] = Pair(
            np.array([[s["acc"] for s in samples] for samples in ours]),
            np.array([[s["acc_fp16"] for s in samples] for samples in theirs]),
            np.not_equal(*answers).astype(float),
        )
    expected = divergence(pairs, (0, 1, 3, 5))
    by_name = rows(comparison)
    assert by_name["mean divergence (points)"].difference == expected.mean
    assert by_name["flipped answers (%)"].difference == expected.flips
    assert expected.flips.value > 1


def test_gaps_of_two_models(icl_runs):
    runs, files = icl_runs
    (comparison,) = compare(read(files["a"]), read(files["b"]))
    scores = [
        {
            benchmark: {
                shots: [s["acc"] for s in runs[side]["samples"][f"icl_gap_mini_{benchmark}_{shots}shot"]]
                for shots in (0, 1, 3, 5)
            }
            for benchmark in MINI
        }
        for side in ("a", "b")
    ]
    expected, by_name = icl_gap_difference(*scores), rows(comparison)
    assert by_name["AIPSS (%)"].difference == expected.aipss
    assert by_name["AIPSS (%)"].a == icl_gap(scores[0]).aipss
    assert by_name["AIPSS (%)"].b.value == pytest.approx(runs["b"]["groups"]["icl_gap_mini"]["aipss,none"])
    assert by_name["improvement, 3 shots (%)"].difference == expected.improvement[3]
    assert by_name["AIPSS (%)"].difference.interval is not None


def test_plain_tasks_at_several_shots_from_several_files(plain_runs):
    (comparison,) = compare(read(plain_runs["a"]), read(plain_runs["b"]))
    assert comparison.shot_counts == [0, 1, 3, 5] and comparison.name == "mini_piqa"
    accuracies = {}
    for side, directory in plain_runs.items():
        for file in directory.rglob("results_*.json"):
            data = json.loads(file.read_text())
            accuracies[side, data["n-shot"]["mini_piqa"]] = 100 * data["results"]["mini_piqa"]["acc,none"]
    by_name = rows(comparison)
    gaps = [accuracies["b", shots] - accuracies["a", shots] for shots in (0, 1, 3, 5)]
    assert [by_name[f"acc, {shots} shots (points)"].difference.value for shots in (0, 1, 3, 5)] == pytest.approx(gaps)
    assert by_name["mean divergence (points)"].difference.value == pytest.approx(np.mean(np.abs(gaps)))
    assert by_name["flipped answers (%)"].difference.value > 0
    assert by_name["change of log-likelihood (nats)"].difference.value > 0


def test_without_samples_there_are_values_and_no_intervals(divergence_runs, icl_runs, tmp_path):
    for i, (runs, files) in enumerate((divergence_runs, icl_runs)):
        bare = save(runs["b"], tmp_path / str(i), with_samples=False)
        (comparison,) = compare(read(files["a"]), read(bare))
        (full,) = compare(read(files["a"]), read(files["b"]))
        assert "no samples were logged for both runs" in comparison.notes[0]
        for name, row in rows(comparison).items():
            assert row.difference.value == pytest.approx(rows(full)[name].difference.value)
            assert row.difference.interval is None and np.isnan(row.difference.stderr)
        assert "flipped answers (%)" not in rows(comparison)


def test_groups_of_lm_evals_own_are_weighed_as_there(tmp_path, manager):
    """By size, equally, or, without an accuracy of the group, not at all: each task for itself."""
    run = evaluate(MODELS["a"], ["mini_piqa", "mini_hellaswag"], manager)
    small = evaluate(MODELS["a"], ["mini_arc_easy"], manager, limit=5)
    for key in ("results", "configs", "n-shot", "n-samples", "versions", "samples"):
        run[key] |= small[key]
    del run["results"]["mini_hellaswag"], run["configs"]["mini_hellaswag"], run["samples"]["mini_hellaswag"]
    acc = [run["results"][name]["acc,none"] for name in ("mini_piqa", "mini_arc_easy")]
    assert acc[0] != acc[1]
    run["group_subtasks"] = {"group": ["sub", "mini_piqa"], "sub": ["mini_arc_easy"]}
    for i, (accuracy, by_size) in enumerate((((12 * acc[0] + 5 * acc[1]) / 17, True), (sum(acc) / 2, False))):
        run["results"]["group"] = {"acc,none": accuracy}
        (study,) = read(save(run, tmp_path / str(i))).values()
        assert (study.name, study.weight_by_size) == ("group", by_size)
        (comparison,) = compare({"group": study}, {"group": study})
        assert rows(comparison)["acc, 0 shots (points)"].a.value == pytest.approx(100 * accuracy)
    run["results"]["group"] = {}
    assert set(read(save(run, tmp_path / "none"))) == {"mini_piqa", "mini_arc_easy"}
    run["results"]["group"] = {"acc,none": 0.123}
    with pytest.raises(ResultsError, match="group: its accuracy of 0.123 is no mean"):
        read(save(run, tmp_path / "wrong"))


def test_other_prompts_are_noted(divergence_runs, tmp_path):
    _, files = divergence_runs
    copy = edited(files["a"], tmp_path, lambda data: None)
    edit_samples(copy, "divergence_mini_piqa_1shot", lambda samples: samples[3].update(prompt_hash="other"))
    (comparison,) = compare(read(files["a"]), read(copy))
    assert comparison.notes[0].startswith("1 prompts differ")


def test_reports_are_json(divergence_runs, icl_runs, tmp_path):
    for _, files in (divergence_runs, icl_runs):
        (comparison,) = compare(read(files["a"]), read(files["b"]))
        json.dumps(as_dict(comparison), allow_nan=False)


# refusals


def remove_task(data):
    for key in ("results", "configs", "n-shot", "n-samples"):
        for shots in (0, 1, 3, 5):
            del data[key][f"divergence_mini_piqa_{shots}shot"]
    members = data["group_subtasks"]["divergence_mini"]
    data["group_subtasks"]["divergence_mini"] = [name for name in members if "piqa" not in name]


def remove_shots(data):
    members = data["group_subtasks"]["divergence_mini"]
    data["group_subtasks"]["divergence_mini"] = [name for name in members if not name.endswith("_5shot")]
    data["configs"] = {name: config for name, config in data["configs"].items() if not name.endswith("_5shot")}


def other_limit(data):
    data["config"]["limit"] = 13


def rename_group(data):
    data["group_subtasks"]["other"] = data["group_subtasks"].pop("divergence_mini")
    data["results"]["other"] = data["results"].pop("divergence_mini")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_group, r"tasks differ: \['divergence_mini'\] only in A, \['other'\] only in B"),
        (remove_task, r"divergence_mini: tasks differ: \['piqa'\] only in A"),
        (remove_shots, r"divergence_mini: shot counts differ: \[5\] only in A"),
        (other_limit, r"12 documents \(limit 12\) against 12 \(limit 13\)\. Evaluate both with the same --limit"),
    ],
)
def test_mismatches_are_refused_by_name(divergence_runs, tmp_path, change, message):
    _, files = divergence_runs
    with pytest.raises(ResultsError, match=message):
        compare(read(files["a"]), read(edited(files["b"], tmp_path, change)))


def test_other_documents_are_refused_by_name(divergence_runs, tmp_path):
    _, files = divergence_runs
    copy = edited(files["b"], tmp_path, lambda data: None)
    edit_samples(copy, "divergence_mini_arc_easy_3shot", lambda samples: samples[7].update(doc_hash="0123456789abcdef"))
    with pytest.raises(ResultsError, match=r"arc_easy_3shot: document 7 of A .* is not document 7 of B \(0123456789ab"):
        compare(read(files["a"]), read(copy))


def test_samples_of_another_run_are_refused(divergence_runs, tmp_path):
    _, files = divergence_runs
    copy = edited(files["b"], tmp_path, lambda data: None)
    edit_samples(copy, "divergence_mini_piqa_0shot", lambda samples: samples.pop())
    with pytest.raises(ResultsError, match="has 11 samples, and the results say 12"):
        compare(read(files["a"]), read(copy))


def test_a_missing_shot_count_of_one_task_is_refused(divergence_runs, tmp_path):
    _, files = divergence_runs
    copy = edited(
        files["b"],
        tmp_path,
        lambda data: data["group_subtasks"]["divergence_mini"].remove("divergence_mini_piqa_3shot"),
    )
    with pytest.raises(ResultsError, match="not every task was evaluated at each"):
        compare(read(files["a"]), {"divergence_mini": read(copy)["divergence_mini"]})


def test_precisions_that_are_not_there_are_refused(divergence_runs, plain_runs):
    _, files = divergence_runs
    with pytest.raises(ResultsError, match="there is no bf16 to select"):
        read(plain_runs["a"], "bf16")
    with pytest.raises(ValueError, match="fp8 is not a precision"):
        read(files["a"], "fp8")


def test_a_precision_that_was_not_scored_is_refused(tmp_path):
    file = save(evaluate(MODELS["a"], ["divergence_mini"], our_tasks(precisions="bf16"), limit=2), tmp_path)
    with pytest.raises(ResultsError, match="was scored in fp32, bf16, not in fp16"):
        read(file, "fp16")


def test_one_task_twice_is_refused(plain_runs, tmp_path):
    shutil.copytree(plain_runs["a"], tmp_path / "a")
    shutil.copytree(plain_runs["b"], tmp_path / "b")
    with pytest.raises(ResultsError, match="mini_piqa at 0 shots is in .* and in "):
        read(tmp_path)


def test_files_that_are_no_results_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ResultsError, match="no directory with results"):
        read(tmp_path / "empty")
    (tmp_path / "results_x.json").write_text("{}")
    with pytest.raises(ResultsError, match="is not a result file of lm-eval"):
        read(tmp_path)


def test_gaps_over_other_benchmarks_than_the_results_say_are_refused(icl_runs, tmp_path):
    _, files = icl_runs

    def other(data):
        data["results"]["icl_gap_mini"]["aipss,none"] += 1

    with pytest.raises(ResultsError, match="its AIPSS of .* is not that of its multiple-choice tasks"):
        compare(read(files["a"]), read(edited(files["b"], tmp_path, other)))


# what the papers print


def test_published_figures():
    row = published("Mamba/130M")["inference"][0]
    assert (row["fp16_mean_divergence"], row["bf16_mean_divergence"]) == ("0.03", "0.05")
    assert {row["family"] for row in published("mamba")["finetuned"]} == {"Mamba"}
    everything = published("all")
    assert (len(everything["inference"]), len(everything["finetuned"])) == (17, 12)
    # "Mamba-2" is not taken for Mamba of some size
    assert {row["family"] for row in published("mamba")["inference"]} == {"Mamba"}
    with pytest.raises(ResultsError, match="no divergence of Mamba/7B. Choose all or one of Mamba/130M"):
        published("Mamba/7B")
