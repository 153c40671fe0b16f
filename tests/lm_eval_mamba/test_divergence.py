"""The divergence groups inside lm-eval: figures by hand, equal batches, caches, refusals, several processes."""

import json
import math
import shutil
from collections import defaultdict

import lm_eval
import numpy as np
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import make_table

from lm_eval_mamba import divergence, precisions
from lm_eval_mamba.backend import MambaAMP
from lm_eval_mamba.precisions import REQUEST, Precisions
from lm_eval_mamba.scoring.lm import PrefixTreeLM
from peft_mamba.nonfinite import NonFiniteError
from peft_mamba.precision import PrecisionError

from .processes import groups_of_two_processes
from .stub import StubLM, evaluate, our_tasks

SHOTS = (0, 1, 3, 5)
MINI = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "winogrande")
LIMIT = 4
PAIRS = [("The cat sat on", " the mat"), ("The cat sat on", " a"), ("x" * 40, " y"), ("", "no context"), ("A", " c d")]


@pytest.fixture(autouse=True, scope="module")
def without_environment_report():
    """lm-eval lists all installed packages after each run, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
        yield


def run(manager, tasks="divergence_mini", arguments=None, **kwargs):
    defaults = {"limit": LIMIT, "batch_size": 32, "bootstrap_iters": 10, "device": "cpu"}
    return lm_eval.simple_evaluate(
        "mamba_amp", {"pretrained": "mini"} | (arguments or {}), [tasks], task_manager=manager, **defaults | kwargs
    )


def requests(arguments=PAIRS, names=("fp32", "fp16", "bf16"), rebatched=False):
    options = {"precisions": list(names), "rebatched": rebatched}
    return [Instance(REQUEST, {}, (*pair, options), i, ("task", i, 1)) for i, pair in enumerate(arguments)]


def load(directory, **kwargs):
    return MambaAMP(pretrained=str(directory), device="cpu", **{"batch_size": 4} | kwargs)


# the figures


@pytest.fixture(scope="module", params=["mini", "mini-2"])
def results(request, manager):
    """The group, and three runs of one precision each over the same requests."""
    together = run(manager, arguments={"pretrained": request.param})
    apart = {
        name: run(manager, "icl_gap_mini", {"pretrained": request.param, "dtype": name})["samples"]
        for name in ("fp32", "fp16", "bf16")
    }
    return together, apart


def by_hand(apart, benchmark, shots, precision):
    samples = sorted(apart[precision][f"icl_gap_mini_{benchmark}_{shots}shot"], key=lambda sample: sample["doc_id"])
    lls = [[response[0] for response in sample["filtered_resps"]] for sample in samples]
    return np.array([sample["acc"] for sample in samples]), lls


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_figures_are_those_of_three_single_precision_runs(results, precision):
    together, apart = results
    gaps, flips, changes = defaultdict(list), [], []
    for shots in SHOTS:
        for benchmark in MINI:
            acc, lls = by_hand(apart, benchmark, shots, "fp32")
            other_acc, other_lls = by_hand(apart, benchmark, shots, precision)
            gaps[shots].append(acc.mean() - other_acc.mean())
            for ours, theirs in zip(lls, other_lls, strict=True):
                best = max(range(len(ours)), key=ours.__getitem__)
                flips.append(max(range(len(theirs)), key=theirs.__getitem__) != best)
                changes.append(abs(ours[best] - theirs[best]))
    absolute = [100 * abs(sum(gaps[shots]) / len(MINI)) for shots in SHOTS]
    mean = sum(absolute) / 4
    expected = {
        "": mean,
        "_std": math.sqrt(sum((x - mean) ** 2 for x in absolute) / 3),
        "_spikes": sum(x > 1 + 1e-9 for x in absolute),
    }
    shown = together["groups"]["divergence_mini"]
    for suffix, value in expected.items():
        assert shown[f"divergence_{precision}{suffix},none"] == pytest.approx(value, abs=1e-9)
    assert shown[f"flips_{precision},none"] == pytest.approx(100 * sum(flips) / len(flips))
    # The other runs score LAMBADA too, so that their batches differ: what the noise floor is about.
    assert shown[f"loglikelihood_change_{precision},none"] == pytest.approx(sum(changes) / len(changes), abs=5e-5)
    assert shown[f"loglikelihood_change_{precision},none"] > 1e-5


def test_accuracies_and_scores_are_those_of_single_precision_runs(results):
    together, apart = results
    for benchmark in MINI:
        for shots in SHOTS:
            task = f"divergence_mini_{benchmark}_{shots}shot"
            for precision, metric in (("fp32", "acc"), ("fp16", "acc_fp16"), ("bf16", "acc_bf16")):
                acc, lls = by_hand(apart, benchmark, shots, precision)
                assert together["results"][task][f"{metric},none"] == acc.mean()
                assert together["results"][task][f"{metric}_stderr,none"] != "N/A"
                for sample, expected in zip(together["samples"][task], lls, strict=True):
                    # abs: bf16 rounds what differs by 1e-7 before it to neighbours
                    assert sample["loglikelihoods"][precision] == pytest.approx(expected, abs=0.02)
    groups = together["groups"]["divergence_mini"]
    for shots in SHOTS:
        accuracies = [by_hand(apart, benchmark, shots, "bf16")[0].mean() for benchmark in MINI]
        assert groups[f"acc_bf16_{shots}shot,none"] == pytest.approx(np.mean(accuracies))


def test_results_are_json_and_tables_without_helpers_of_the_group(results):
    together, _ = results
    text = json.dumps({key: value for key, value in together.items() if key != "samples"}, default=str, allow_nan=False)
    assert "rescored" not in text and '"loglikelihoods' not in text
    table = make_table(together, "groups")
    for name in ("divergence_bf16", "divergence_fp16_std", "flips_bf16", "noise_floor_flips"):
        assert f"|{name} " in table
    low, high = together["groups"]["divergence_mini"]["loglikelihood_change_bf16_interval,none"]
    assert low < together["groups"]["divergence_mini"]["loglikelihood_change_bf16,none"] < high


def test_noise_floor_is_far_below_what_a_precision_changes(results):
    shown = results[0]["groups"]["divergence_mini"]
    assert shown["noise_floor_documents,none"] >= 1
    # on a CPU often 0: its products do not depend on their neighbours
    assert 0 <= shown["noise_floor_loglikelihood_change,none"] < shown["loglikelihood_change_fp16,none"] / 5


# which precisions


def test_another_reference_and_choice(manager):
    shown = evaluate(StubLM(), ["divergence_mini"], our_tasks(precisions="fp32+fp16", reference="bf16"))
    group = shown["groups"]["divergence_mini"]
    usual = evaluate(StubLM(), ["divergence_mini"], manager)["groups"]["divergence_mini"]
    assert {"divergence_fp32,none", "divergence_fp16,none"} <= group.keys()
    assert "divergence_bf16,none" not in group
    assert group["divergence_fp32,none"] == usual["divergence_bf16,none"] > 0
    assert group["acc_3shot,none"] == usual["acc_bf16_3shot,none"]
    metadata = shown["configs"]["divergence_mini_piqa_3shot"]["metadata"]
    assert metadata["precisions"] == ["bf16", "fp32", "fp16"] and metadata["reference"] == "bf16"


def test_a_precision_against_itself_differs_by_exactly_zero():
    results = evaluate(StubLM(), ["divergence_mini"], our_tasks(precisions=["bf16"], reference="bfloat16"))
    shown = results["groups"]["divergence_mini"]
    for name in ("divergence_bf16", "divergence_bf16_std", "divergence_bf16_spikes", "flips_bf16"):
        assert shown[f"{name},none"] == shown[f"{name}_stderr,none"] == 0.0
        assert shown[f"{name}_interval,none"] == [0.0, 0.0]
    assert shown["loglikelihood_change_bf16,none"] == 0.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ("fp32", "fp16", "bf16")),
        ("fp32+bf16", ("fp32", "bf16")),
        ("[fp32,bf16]", ("fp32", "bf16")),
        (["bfloat16", "half"], ("fp32", "bf16", "fp16")),
        ("fp32", ("fp32",)),
    ],
)
def test_spellings(given, expected):
    assert Precisions.parse(given).names == expected


@pytest.mark.parametrize("arguments", [{"precisions": "fp32+fp8"}, {"reference": "fp8"}])
def test_unknown_precision_is_refused_by_name(tiny, monkeypatch, arguments):
    monkeypatch.setattr(HFLM, "_create_model", lambda *args, **kwargs: pytest.fail("the model was loaded first"))
    with pytest.raises(PrecisionError, match="fp8 is not a precision"):
        load(tiny["mamba"], **arguments)
    with pytest.raises(PrecisionError, match="fp8 is not a precision"):
        our_tasks(**arguments).load(["divergence_mini"])


def test_model_arguments_that_the_tasks_did_not_get_are_an_error(tiny):
    lm = load(tiny["mamba"], precisions="fp32+bf16")
    assert len(lm.loglikelihood_by_precision(requests(names=["fp32", "bf16"]))) == len(PAIRS)
    with pytest.raises(PrecisionError, match=r"precisions=fp32, bf16 .*the tasks fp32, fp16, bf16\. .*TaskManager"):
        lm.loglikelihood_by_precision(requests())


# the backend


@pytest.mark.parametrize("family", ["mamba", "mamba2", "gpt_neox"])
def test_scores_are_exactly_those_of_each_dtype(tiny, family):
    answers = load(tiny[family]).loglikelihood_by_precision(requests())
    for name in ("fp32", "fp16", "bf16"):
        plain = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
        alone = load(tiny[family], dtype=name).loglikelihood(plain)
        assert [answer[name] for answer in answers] == alone  # the same batches: not a bit differs


def test_batches_are_composed_alike_in_each_precision_and_otherwise_when_asked(tiny, monkeypatch):
    lm = load(tiny["mamba"], batch_size="auto", max_batch_size=4, scoring="plain")
    seen = defaultdict(list)
    call = MambaAMP._model_call

    def spy(self, inps, *args, **kwargs):
        seen[self.precision.name].append(inps.tolist())
        return call(self, inps, *args, **kwargs)

    detected = iter([4, 3, 4])  # bf16 may need more memory than fp32, and then decides
    monkeypatch.setattr(HFLM, "_detect_batch_size", lambda self, requests=None, pos=0: next(detected))
    monkeypatch.setattr(MambaAMP, "_model_call", spy)
    many = [(context, f"{continuation} {i}") for i in range(3) for context, continuation in PAIRS]
    lm.loglikelihood_by_precision(requests(many))
    assert seen["fp32"] == seen["fp16"] == seen["bf16"]
    assert max(len(batch) for batch in seen["fp32"]) == 3
    seen.clear()
    lm.loglikelihood_by_precision(requests(many, ["fp32"], rebatched=True))
    assert {len(batch) for batch in seen["fp32"]} == {1} and set(seen) == {"fp32"}
    assert lm.batch_size == "auto"
    one = load(tiny["mamba"], batch_size=1)  # by prefix tree otherwise
    seen.clear()
    one.loglikelihood_by_precision(requests(many, ["fp32"], rebatched=True))
    assert max(len(batch) for batch in seen["fp32"]) > 1


def test_the_run_is_in_its_own_dtype_afterwards(tiny):
    lm = load(tiny["mamba"], dtype="bf16")
    plain = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    before = lm.loglikelihood(plain)
    lm.loglikelihood_by_precision(requests())
    assert lm.loglikelihood(plain) == before and lm.precision.name == "bf16"
    assert set(lm.get_model_info()["scored_by_precision"]) == {"fp32", "fp16", "bf16"}


def test_dtype_is_said_not_to_apply(tiny, caplog):
    load(tiny["mamba"], dtype="bf16").loglikelihood_by_precision(requests())
    assert "dtype=bf16 does not apply" in caplog.text


def test_cast_weights_are_refused(tiny, monkeypatch):
    with pytest.raises(PrecisionError, match="Leave weights_dtype out"):
        load(tiny["mamba"], weights_dtype="bf16").loglikelihood_by_precision(requests())
    monkeypatch.setattr(HFLM, "_create_model", lambda *args, **kwargs: pytest.fail("the model was loaded first"))
    with pytest.raises(PrecisionError, match="Leave weights_dtype out"):
        load(tiny["mamba"], weights_dtype="bf16", precisions="fp32+bf16")


def test_overflow_names_layer_and_precision(tiny, tmp_path):
    directory = shutil.copytree(tiny["mamba"], tmp_path / "mamba")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():  # finite weights whose products exceed fp16's 65504
        model.backbone.layers[1].mixer.in_proj.weight.mul_(1e6)
    model.save_pretrained(directory)
    lm = load(directory)
    with pytest.raises(NonFiniteError, match=r"NaN in fp16: backbone.layers.1.mixer.* precisions=fp32\+bf16"):
        lm.loglikelihood_by_precision(requests())
    assert lm.precision.name == "fp32"
    assert len(lm.loglikelihood_by_precision(requests(names=["fp32", "bf16"]))) == len(PAIRS)


def test_a_logit_below_the_range_of_one_precision_is_an_error_and_no_score(tiny):
    lm = load(tiny["mamba"])
    token = lm.tok_encode("m")[0]

    def lower(module, args, logits):
        logits = logits.clone()
        logits[..., token] -= 70_000  # finite in fp32 and bf16
        return logits

    hook = lm.model.lm_head.register_forward_hook(lower)
    with pytest.raises(NonFiniteError, match="-inf in fp16 alone"):
        lm.loglikelihood_by_precision(requests())
    assert len(lm.loglikelihood_by_precision(requests(names=["fp32", "bf16"]))) == len(PAIRS)
    hook.remove()
    assert len(lm.loglikelihood_by_precision(requests())) == len(PAIRS)


def test_adapters_are_scored_in_each_precision(tiny, tmp_path):
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny["mamba"])
    torch.manual_seed(0)
    config = peft.LoraConfig(r=1, lora_alpha=4, target_modules=["x_proj", "in_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    adapted = load(tiny["mamba"], peft=str(tmp_path)).loglikelihood_by_precision(requests())
    base = load(tiny["mamba"]).loglikelihood_by_precision(requests())
    for ours, theirs in zip(adapted, base, strict=True):
        assert all(ours[name][0] != pytest.approx(theirs[name][0], rel=1e-5) for name in ours)


# caches


def test_a_cache_serves_a_request_in_the_same_precisions_only(tiny, tmp_path, monkeypatch):
    path = str(tmp_path / "cache.db")
    first = CachingLM(load(tiny["mamba"]), path).loglikelihood_by_precision(requests())
    scored = []
    score = PrefixTreeLM._loglikelihood_tokens

    def spy(self, requests, *args, **kwargs):
        scored.append((self.precision.name, len(requests)))
        return score(self, requests, *args, **kwargs)

    monkeypatch.setattr(PrefixTreeLM, "_loglikelihood_tokens", spy)
    again = CachingLM(load(tiny["mamba"]), path)
    assert again.loglikelihood_by_precision(requests()) == first and scored == []
    # another set, other batches, and the plain request of the same text are scored anew
    again.loglikelihood_by_precision(requests(PAIRS[:2], ["fp32", "bf16"]))
    again.loglikelihood_by_precision(requests(PAIRS[:2], ["fp32"], rebatched=True))
    plain = again.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)])
    assert scored == [("fp32", 2), ("bf16", 2), ("fp32", 2), ("fp32", len(PAIRS))]
    assert [ll for ll, _ in plain] == [answer["fp32"][0] for answer in first]  # and never a bf16 answer
    with pytest.raises(ValueError, match="precision=bf16"):
        CachingLM(load(tiny["mamba"], dtype="bf16"), path)


def test_use_cache_gives_the_same_figures_again(tmp_path, manager):
    cache = str(tmp_path / "cache")
    first, again = (run(manager, limit=2, use_cache=cache)["groups"] for _ in range(2))
    assert first == again


# the group inside lm-eval


def test_noise_floor_is_what_other_batches_change(manager):
    quiet, loud = (
        evaluate(StubLM(noise=noise), ["divergence_mini"], manager, limit=None)["groups"]["divergence_mini"]
        for noise in (0.0, 0.25)
    )
    assert quiet["noise_floor_loglikelihood_change,none"] == quiet["noise_floor_flips,none"] == 0.0
    assert loud["noise_floor_loglikelihood_change,none"] == pytest.approx(0.25)
    assert quiet["noise_floor_documents,none"] == pytest.approx(32, rel=0.1)
    assert loud["divergence_bf16,none"] == quiet["divergence_bf16,none"]


def test_noise_floor_costs_a_twentieth_of_one_precision_at_most(manager):
    lm = StubLM()
    evaluate(lm, ["divergence_mini"], manager, limit=None)
    again = [r for r in lm.requests if r.args[2]["rebatched"]]
    assert len(again) <= len(lm.requests) / 20
    assert {tuple(r.args[2]["precisions"]) for r in again} == {("fp32",)}


def test_other_backends_are_told_why_before_contexts_are_built(manager, monkeypatch, tiny):
    monkeypatch.setattr(precisions, "scorers", set())
    monkeypatch.setattr(divergence, "scorers", set())
    monkeypatch.setattr(
        divergence.DivergenceTask, "fewshot_context", lambda *args, **kwargs: pytest.fail("contexts were built")
    )
    lm = HFLM(pretrained=str(tiny["mamba"]), device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="one loaded model, .*Use --model mamba_amp"):
        lm_eval.simple_evaluate(lm, tasks=["divergence_mini"], task_manager=manager, limit=1)


def test_cached_requests_of_another_run_are_scored_in_this_runs_precisions(manager, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path))
    evaluate(StubLM(), ["divergence_mini"], manager, limit=2, cache_requests=True)
    assert list(tmp_path.iterdir())
    lm = StubLM()
    evaluate(lm, ["divergence_mini"], our_tasks(precisions="bf16"), limit=2, cache_requests=True)
    assert {tuple(r.args[2]["precisions"]) for r in lm.requests if not r.args[2]["rebatched"]} == {("fp32", "bf16")}


def test_num_fewshot_is_refused(manager):
    with pytest.raises(ValueError, match="--num_fewshot 5 cannot be applied to divergence_mini_hellaswag_1shot"):
        evaluate(StubLM(), ["divergence_mini"], manager, num_fewshot=5)


def test_predict_only_has_no_figures(manager):
    groups = evaluate(StubLM(), ["divergence_mini"], manager, limit=2, predict_only=True)["groups"]
    assert not any(key.startswith(("divergence", "flips")) for key in groups["divergence_mini"])


def test_one_document_has_no_standard_error(manager):
    shown = evaluate(StubLM(), ["divergence_mini"], manager, limit=1)["groups"]["divergence_mini"]
    assert shown["divergence_bf16_stderr,none"] == shown["divergence_bf16_interval,none"] == "N/A"
    assert isinstance(shown["divergence_bf16,none"], float)
    assert shown["noise_floor_documents,none"] == 1


def test_a_benchmark_without_choices_is_refused():
    config = {"task": "x", "output_type": "loglikelihood", "metric_list": [{"metric": "acc"}], "metadata": {}}
    with pytest.raises(ValueError, match="x: a divergence needs a benchmark of output_type multiple_choice"):
        divergence.DivergenceTask(config)


def test_two_processes_give_the_figures_of_one(tmp_path, manager):
    groups = groups_of_two_processes(tmp_path, "mini", "divergence_mini", LIMIT)["divergence_mini"]
    one = run(manager)["groups"]["divergence_mini"]
    assert groups["noise_floor_documents,none"] == one["noise_floor_documents,none"]
    for key, value in one.items():
        if key.startswith(("divergence", "flips", "acc")) and isinstance(value, float) and "stderr" not in key:
            assert groups[key] == pytest.approx(value), key
        elif key.startswith("loglikelihood_change") and isinstance(value, float):
            assert groups[key] == pytest.approx(value, rel=0.05), key  # other batches, and another order of documents
