"""Scoring and generation by prefix tree against lm-eval's own path, on the same weights."""

import logging

import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM

from lm_eval_mamba.backend import MambaAMP
from lm_eval_mamba.scoring import generation, runner, scorer
from lm_eval_mamba.scoring.budget import Budget
from peft_mamba import frozen
from peft_mamba.mixers import StatePool
from peft_mamba.nonfinite import NonFiniteError

FAMILIES = ["mamba", "mamba2"]
MAX_LENGTH = 24
TEXT = st.text(alphabet="ab", max_size=6) | st.text(alphabet="abc", min_size=20, max_size=40)
PAIRS = st.lists(st.tuples(TEXT, st.text(alphabet="ab", min_size=2, max_size=6)), min_size=1, max_size=12)


def instances(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def load(lm_class, directory, **kwargs):
    return lm_class(pretrained=str(directory), device="cpu", **{"batch_size": 4, "max_length": MAX_LENGTH} | kwargs)


@pytest.fixture(scope="module")
def backends(tiny):
    """family -> (ours, lm-eval's)."""
    return {f: (load(MambaAMP, tiny[f]), load(HFLM, tiny[f], dtype="float32")) for f in FAMILIES}


def assert_same(actual, expected, rel=1e-5):
    assert [ll for ll, _ in actual] == pytest.approx([ll for ll, _ in expected], rel=rel)
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(FAMILIES),
    pairs=PAIRS,
    tokens=st.sampled_from([1, 7, 4096]),
    states=st.integers(0, 3),
    within=st.sampled_from([0, 1, 100]),
)
def test_scores_equal_those_of_the_hf_backend(backends, family, pairs, tokens, states, within):
    """Duplicates, one a prefix of another, empty contexts, over-long ones, in any order, at any budget."""
    ours, theirs = backends[family]
    pairs = [*pairs, pairs[0], ("", pairs[0][1] + "a")]
    ours._budget = Budget(states * StatePool.bytes_per_state(ours.model), tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval_mamba.scoring.scorer.fork_cost", lambda model: 0)
        patch.setattr(Budget, "within", lambda *args: within)
        actual = ours.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
        backwards = ours.loglikelihood(instances("loglikelihood", pairs[::-1]), disable_tqdm=True)
    # One at a time: of one text that is divided in two ways lm-eval's backend scores both as it scores the first.
    alone = [theirs.loglikelihood(instances("loglikelihood", [pair]), disable_tqdm=True)[0] for pair in pairs]
    assert_same(actual, alone)
    assert_same(backwards[::-1], actual)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "pairs", [[("same", " x")] * 5, [(chr(97 + i) * 9, "yz") for i in range(5)]], ids=["all", "none"]
)
def test_all_equal_and_none_equal(backends, family, pairs):
    ours, theirs = backends[family]
    ours._budget = None
    assert_same(*(lm.loglikelihood(instances("loglikelihood", pairs)) for lm in (ours, theirs)))
    assert ours.work.asked == 5 * (5 if "same" in pairs[0] else 10)
    assert ours.work.run == ours.work.asked // (5 if "same" in pairs[0] else 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_rolling_log_likelihoods(backends, family):
    ours, theirs = backends[family]
    texts = [("a short one",), ("long " * 20,), ("long " * 20 + "and on",), ("",)]
    assert ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) == pytest.approx(
        theirs.loglikelihood_rolling(instances("loglikelihood_rolling", texts)), rel=1e-5
    )


@pytest.mark.parametrize(("family", "end"), [("mamba", "embeddings"), ("mamba2", "lm_head"), ("mamba2", "embeddings")])
def test_adapters_on_the_head_and_the_embeddings(tiny, tmp_path, family, end):
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny[family])
    config = peft.LoraConfig(r=2, lora_alpha=200, target_modules=["in_proj", end], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    tree, plain = (load(MambaAMP, tiny[family], peft=str(tmp_path), scoring=scoring) for scoring in ("tree", "plain"))
    pairs = instances("loglikelihood", [("The cat", " sat"), ("The cat", " ran"), ("The dog", " sat")])
    assert_same(tree.loglikelihood(pairs), plain.loglikelihood(pairs))


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_no_further_from_fp32_than_the_plain_path(tiny, family):
    pairs = instances("loglikelihood", [(f"{n} of them " * 2, f" {n}{m}") for n in range(4) for m in range(4)])
    exact = [ll for ll, _ in load(MambaAMP, tiny[family], scoring="plain").loglikelihood(pairs)]

    def error(**kwargs):
        scores = load(MambaAMP, tiny[family], **kwargs).loglikelihood(pairs)
        return sum((ll - e) ** 2 for (ll, _), e in zip(scores, exact, strict=True)) ** 0.5

    assert 0 < error(dtype="bf16") < 1.5 * error(scoring="plain", weights_dtype="bf16")
    assert error(weights_dtype="bf16") < 1.5 * error(scoring="plain", weights_dtype="bf16")


def test_running_out_of_memory_halves_the_budget_and_loses_nothing(tiny, monkeypatch, caplog):
    lm = load(MambaAMP, tiny["mamba"], batch_tokens=200)
    pairs = instances("loglikelihood", [(f"question {n}", f" answer {m}") for n in range(30) for m in range(3)])
    expected = lm.loglikelihood(pairs)
    score, calls, stored, limit = runner.SequenceRunner.score, [], [], 90

    def fails(self, pieces, *args):
        calls.append(sum(map(len, pieces)))
        if len(calls) > 1 and calls[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return score(self, pieces, *args)

    monkeypatch.setattr(runner.SequenceRunner, "score", fails)
    monkeypatch.setattr(lm.cache_hook, "add_partial", lambda kind, args, answer: stored.append(args))
    with caplog.at_level(logging.WARNING):
        assert_same(lm.loglikelihood(pairs), expected)
    assert sorted(stored) == sorted(request.args for request in pairs)
    assert lm._budget.tokens == 64 and "Out of memory: going on with the" in caplog.text
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):  # smaller batches would not help
        lm.loglikelihood(instances("loglikelihood", [("z" * 23, "y" * 23)] * 5))


def test_precisions_have_the_same_batches_also_when_memory_runs_out_in_one(tiny, monkeypatch):
    lm = load(MambaAMP, tiny["mamba"], batch_tokens=200)
    options = {"precisions": ["fp32", "bf16"], "rebatched": False}
    pairs = [(f"question {n}", f" answer {m}", options) for n in range(30) for m in range(2)]
    score, seen, failed = runner.SequenceRunner.score, {"fp32": [], "bf16": []}, []

    def fails(self, pieces, *args):
        if lm.precision.name == "bf16" and not failed:
            failed.append(pieces)
            seen["fp32"].clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        seen[lm.precision.name].append([piece.tolist() for piece in pieces])
        return score(self, pieces, *args)

    expected = lm.loglikelihood_by_precision(instances("loglikelihood_by_precision", pairs))
    monkeypatch.setattr(runner.SequenceRunner, "score", fails)
    answers = lm.loglikelihood_by_precision(instances("loglikelihood_by_precision", pairs))
    assert lm._budget.tokens == 100 and len(seen["fp32"]) > 1
    assert seen["bf16"][-len(seen["fp32"]) :] == seen["fp32"]
    for name in ("fp32", "bf16"):
        assert [a[name][0] for a in answers] == pytest.approx([e[name][0] for e in expected], rel=1e-2)


def test_the_bar_counts_requests_and_debug_says_how_many_tokens(backends, capsys, caplog):
    ours, _ = backends["mamba"]
    ours._budget = Budget(2**20, 4096)
    pairs = [("abcdefghijklmno", f" {i}") for i in range(9)]
    with caplog.at_level(logging.DEBUG, logger="lm_eval"):
        ours.loglikelihood(instances("loglikelihood", pairs))
    assert "Running loglikelihood requests: 100%" in capsys.readouterr().err
    assert "prefix tree: 144 tokens asked, 16 run in 1 batches of at most 4096 tokens" in caplog.text


def test_a_cache_of_answers_is_filled_and_used(tiny, tmp_path):
    path = str(tmp_path / "cache.db")
    pairs = instances("loglikelihood", [("one", " x"), ("one", " yz")])
    first = CachingLM(load(MambaAMP, tiny["mamba2"]), path).loglikelihood(pairs)
    again = CachingLM(load(MambaAMP, tiny["mamba2"]), path)
    again.lm._by_tree = lambda *args: pytest.fail("the answers are in the cache")
    assert again.loglikelihood(pairs) == first


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_of_weights_are_made_once_a_call_and_keep_to_their_budget(tiny, family, dtype, monkeypatch):
    lm = load(MambaAMP, tiny[family], dtype=dtype, batch_tokens=64)
    pairs = instances("loglikelihood", [(f"question {n}", f" answer {m}") for n in range(12) for m in range(3)])
    most, made, kept = lm._find_budget().copy_bytes, [], frozen._Kept
    monkeypatch.setattr(scorer, "frozen_weights", lambda limit: (made.append(limit), frozen.frozen_weights(limit))[1])
    tables = []
    monkeypatch.setattr(frozen, "_Kept", lambda limit: (tables.append(kept(limit)), tables[-1])[1])
    first = lm.loglikelihood(pairs)
    assert lm.work.batches > 1 and made == [most] and len(tables) == 1
    entries = tables[0].entries
    # A of each layer; under autocast a copy of in_proj's and out_proj's weights and of the head's, at least.
    assert len(entries) >= 2 + (dtype == "bf16") * (2 * 2 + 1)
    assert sum(value.nbytes for _, _, value in entries.values()) == most - tables[0].room <= most
    with torch.no_grad():  # as loading another adapter does: nothing of an earlier call is left
        lm.model.backbone.layers[0].mixer.out_proj.weight.mul_(3)
    again = lm.loglikelihood(pairs)
    lm._budget = None
    assert again != first
    lm._budget = Budget(2**20, 64, copy_bytes=0)
    assert_same(lm.loglikelihood(pairs), again)
    assert not tables[-1].entries and lm._budget.halve() is False


# generation

PROMPTS = ["Once upon a time", "Once upon a", "Once upon a time", "Another", "x" * 60]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("until", [[], ["a"], ["\n", "zz"]], ids=str)
def test_greedy_generation_from_shared_prompts(backends, family, until, monkeypatch):
    ours, theirs = backends[family]
    arguments = {"until": until, "max_gen_toks": 9}
    monkeypatch.setattr(generation, "fork_cost", lambda model: 0)
    monkeypatch.setattr(generation, "LOOK_EVERY", {"cpu": 2})
    monkeypatch.setattr(ours, "_model_generate", lambda *args, **kwargs: pytest.fail("not by prefix tree"))
    # One at a time, for lm-eval's backend lets the longest of a batch decide where all are cut.
    expected = [theirs.generate_until(instances("generate_until", [(p, dict(arguments))]))[0] for p in PROMPTS]
    for budget in (Budget(2**24, 4096), Budget(0, 64)):
        ours._budget = budget
        assert ours.generate_until(instances("generate_until", [(p, dict(arguments)) for p in PROMPTS])) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_any_of_the_models_own_end_tokens_ends_a_text(tiny, family):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny[family])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny[family])
    row = torch.tensor([tokenizer.encode("Say")])
    model.generation_config.eos_token_id = None
    third = model.generate(row, max_new_tokens=3, do_sample=False)[0, -1].item()
    model.generation_config.eos_token_id = [third, 263]
    request = instances("generate_until", [("Say", {"until": [], "max_gen_toks": 9})])
    tree, plain = (MambaAMP(pretrained=model, tokenizer=tokenizer, scoring=scoring) for scoring in ("tree", "plain"))
    assert tree.generate_until(request) == plain.generate_until(request)


@pytest.mark.parametrize("extra", [{"do_sample": True, "temperature": 0.7}, {"num_beams": 2}], ids=str)
def test_what_is_not_greedy_takes_the_plain_path_and_says_so(backends, monkeypatch, caplog, extra):
    ours, _ = backends["mamba"]
    monkeypatch.setattr(generation.GreedyGenerator, "generate", lambda *a: pytest.fail("by prefix tree"))
    with caplog.at_level(logging.INFO, logger="lm_eval"):
        (text,) = ours.generate_until(instances("generate_until", [("Say", {"until": [], "max_gen_toks": 3, **extra})]))
    assert isinstance(text, str) and "1 requests are generated by transformers: " in caplog.text


def test_nan_while_generating_names_the_layer(tiny):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny["mamba"])
    with torch.no_grad():
        model.backbone.layers[1].mixer.in_proj.weight[0, 0] = torch.nan
    lm = MambaAMP(pretrained=model, tokenizer=transformers.AutoTokenizer.from_pretrained(tiny["mamba"]))
    with pytest.raises(NonFiniteError, match="layers.1.mixer.in_proj.weight holds nan"):
        lm.generate_until(instances("generate_until", [("Say", {"until": [], "max_gen_toks": 3})]))


# arguments


def test_arguments_that_say_how_to_score(tiny):
    with pytest.raises(ValueError, match="scoring=fast is none of auto, tree, plain"):
        load(MambaAMP, tiny["mamba"], scoring="fast")
    with pytest.raises(ValueError, match="'much' is no amount of memory"):
        load(MambaAMP, tiny["mamba"], state_budget="much")
    with pytest.raises(ValueError, match="batch_tokens=0 is no number of tokens"):
        load(MambaAMP, tiny["mamba"], batch_tokens=0)
    with pytest.raises(ValueError, match="scoring=tree: GPTNeoXForCausalLM has no state to go on from"):
        load(MambaAMP, tiny["gpt_neox"], scoring="tree")
    lm = load(MambaAMP, tiny["mamba"], state_budget="1MiB", batch_tokens=100)
    budget = lm._find_budget()
    assert (budget.state_bytes, budget.tokens) == (2**20, 100)
    # All that is ever kept of weights fits into what is set aside for it.
    assert budget.copy_bytes == sum(weight.nbytes for weight in lm.model.parameters())


def test_a_request_that_cannot_be_scored_is_named(backends):
    ours, _ = backends["mamba"]
    with pytest.raises(ValueError, match="0 of continuation.*max_length=24.*'context'"):
        ours.loglikelihood(instances("loglikelihood", [("context", "")]))
    with pytest.raises(ValueError, match="30 of continuation"):
        ours.loglikelihood(instances("loglikelihood", [("context", "y" * 30)]))
