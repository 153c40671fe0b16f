"""The `mamba_amp` backend against lm-eval's `hf` backend, and against what it must refuse."""

import json
import logging
import math
import shutil

import peft
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM

from lm_eval_mamba.backend import MambaAMP
from peft_mamba import KernelError, MambaLoraConfig, kernels
from peft_mamba.adapter_io import AdapterError
from peft_mamba.checkpoints import CheckpointError
from peft_mamba.mixers import Mamba2Mixer, MambaMixer
from peft_mamba.nonfinite import NonFiniteError
from peft_mamba.precast import PrecastError
from peft_mamba.precision import PrecisionError

FAMILIES = ["mamba", "mamba2", "gpt_neox"]
PAIRS = [
    ("The cat sat on", " the mat"),
    ("The cat sat on", " a"),
    ("The cat sat on", " b"),  # one-token continuations of a shared context: HFLM's logits cache
    ("", "no context"),
    ("x" * 90, "truncated from the left"),
    ("Größe ☃", " 雪"),
]


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def load(lm_class, directory, **kwargs):
    return lm_class(pretrained=str(directory), device="cpu", batch_size=kwargs.pop("batch_size", 4), **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_scores_equal_those_of_the_hf_backend(tiny, family):
    ours, theirs = load(MambaAMP, tiny[family], max_length=64), load(HFLM, tiny[family], max_length=64, dtype="float32")
    for (ll, greedy), (expected_ll, expected_greedy) in zip(
        ours.loglikelihood(requests("loglikelihood", PAIRS)),
        theirs.loglikelihood(requests("loglikelihood", PAIRS)),
        strict=True,
    ):
        assert ll == pytest.approx(expected_ll, rel=1e-5)
        assert greedy is expected_greedy
    texts = [("a short one",), ("long " * 60,)]
    assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) == pytest.approx(
        theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts)), rel=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_the_hf_backend_with_stop_and_chat_template(tiny, family):
    ours, theirs = load(MambaAMP, tiny[family]), load(HFLM, tiny[family], dtype="float32")
    prompt = ours.apply_chat_template([{"role": "user", "content": "Say it"}])
    assert prompt == "<user>Say it<bot>"
    until = requests("generate_until", [(prompt, {"until": ["\n"], "max_gen_toks": 12})])
    assert ours.generate_until(until) == theirs.generate_until(until)


@pytest.mark.parametrize(("family", "mixer"), [("mamba", MambaMixer), ("mamba2", Mamba2Mixer)])
def test_scoring_and_generation_run_our_mixers(tiny, monkeypatch, family, mixer):
    lm, ran, mix = load(MambaAMP, tiny[family]), [], mixer.mix
    monkeypatch.setattr(mixer, "mix", lambda self, *a, **k: ran.append(self.layer_idx) or mix(self, *a, **k))
    lm.loglikelihood(requests("loglikelihood", PAIRS[:1]))
    assert ran == [0, 1]
    lm.generate_until(requests("generate_until", [("Say it", {"until": [], "max_gen_toks": 2})]))
    assert ran[2:] == [0, 1] * 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "expected"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_mixed_precision_keeps_fp32_weights_and_computes_in_dtype(tiny, family, dtype, expected):
    lm, full = load(MambaAMP, tiny[family], dtype=dtype), load(MambaAMP, tiny[family])
    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.float32}
    seen = set()
    for name, module in lm.model.named_modules():
        if name.endswith(("in_proj", "out_proj", "query_key_value", "dense")):
            module.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    mixed = [ll for ll, _ in lm.loglikelihood(requests("loglikelihood", PAIRS))]
    assert seen == {expected}
    exact = [ll for ll, _ in full.loglikelihood(requests("loglikelihood", PAIRS))]
    assert mixed != exact
    assert mixed == pytest.approx(exact, rel=0.02)


def test_log_probabilities_are_fp32_under_autocast(tiny):
    lm = load(MambaAMP, tiny["gpt_neox"], dtype="bf16")  # GPT-NeoX's logits are bf16 under autocast, Mamba's are not
    seen = []
    select = lm._select_cont_toks
    lm._select_cont_toks = lambda logits, **kwargs: seen.append(logits.dtype) or select(logits, **kwargs)
    lm.loglikelihood(requests("loglikelihood", PAIRS))
    assert set(seen) == {torch.float32}


def test_cast_weights_need_their_own_name(tiny):
    lm = load(MambaAMP, tiny["mamba"], weights_dtype="bf16")
    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.bfloat16}
    assert lm.get_model_info()["precision"]["name"] == "bf16-weights"


def test_batch_size_auto_and_order_do_not_change_scores(tiny):
    lm = load(MambaAMP, tiny["mamba"], batch_size="auto", max_batch_size=4)
    one = load(MambaAMP, tiny["mamba"], batch_size=1)
    expected = [ll for ll, _ in one.loglikelihood(requests("loglikelihood", PAIRS))]
    assert [ll for ll, _ in lm.loglikelihood(requests("loglikelihood", PAIRS))] == pytest.approx(expected, rel=1e-5)


def test_results_say_what_ran(tiny):
    info = json.loads(json.dumps(load(MambaAMP, tiny["mamba"], dtype="bf16").get_model_info(), default=str))
    assert info["precision"]["autocast"] == "torch.bfloat16"
    assert "dtype=bf16" in info["precision"]["reasons"]["autocast"]
    assert info["checkpoint"]["family"] == "mamba" and info["checkpoint"]["source"] == str(tiny["mamba"])
    assert info["adapter"] is None
    assert info["kernel_path"]["kernels"] == "torch" and info["kernel_path"]["reason"]
    assert info["versions"]["torch"] == torch.__version__ and "mamba-ssm" in info["versions"]


def test_kernels_can_be_named(tiny):
    lm = load(MambaAMP, tiny["mamba"], kernels="selective_scan=reference")
    ran = []
    lm.model.backbone.register_forward_hook(lambda *_: ran.append(kernels.select("cpu").paths["selective_scan"]))
    lm.loglikelihood(requests("loglikelihood", PAIRS))
    assert set(ran) == {"reference (asked for by name)"}
    assert lm.get_model_info()["kernel_path"]["selective_scan"] == "reference (asked for by name)"
    assert kernels.select("cpu").name == "torch"
    for wrong, said in (("nonsense", "'nonsense'"), ("mamba_ssm", "runs on cuda, not on cpu")):
        with pytest.raises(KernelError, match=said):
            MambaAMP(pretrained="there/is-no-such-model", kernels=wrong, device="cpu")


@pytest.mark.parametrize("scoring", ["tree", "plain"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_precast_weights_give_the_same_scores(tiny, family, dtype, scoring):
    usual, precast = (load(MambaAMP, tiny[family], dtype=dtype, scoring=scoring, precast=on) for on in (False, True))
    cast = [each for each in precast.model.parameters() if each.dtype != torch.float32]
    assert len(cast) >= 4 and {each.dtype for each in cast} == {precast.precision.autocast}
    asked = requests("loglikelihood", PAIRS)
    assert precast.loglikelihood(asked) == usual.loglikelihood(asked)
    generate = requests("generate_until", [("The cat", {"until": ["."], "max_gen_toks": 4, "do_sample": False})])
    assert precast.generate_until(generate) == usual.generate_until(generate)
    assert precast.get_model_info()["precast"] is True and usual.get_model_info()["precast"] is False


def test_precast_with_an_adapter_of_which_nothing_is_cast(tiny, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny["mamba"])
    adapted = peft.get_peft_model(base, MambaLoraConfig(preset="sll", r=4, init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    usual, precast = (
        load(MambaAMP, tiny["mamba"], dtype="bf16", peft=str(tmp_path), precast=on) for on in (False, True)
    )
    held = [name for name, each in precast.model.named_parameters() if each.dtype == torch.bfloat16]
    assert held and not any("lora_" in name for name in held)
    asked = requests("loglikelihood", PAIRS)
    assert precast.loglikelihood(asked) == usual.loglikelihood(asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "fp32 casts no weights in autocast. Give dtype=bf16 or fp16"),
        ({"weights_dtype": "bf16"}, "casts no weights in autocast"),
        ({"dtype": "bf16", "precast": "no"}, "precast='no' is neither True nor False"),
        ({"dtype": "bf16", "precisions": "fp32+bf16"}, "tasks in several precisions need the fp32 weights"),
    ],
)
def test_precast_is_refused_where_it_means_nothing_before_a_model_is_loaded(arguments, message):
    with pytest.raises(PrecastError, match=message):
        MambaAMP(**{"pretrained": "there/is-no-such-model", "precast": True, "device": "cpu"} | arguments)


def test_precast_takes_no_model_of_yours_and_no_tasks_in_several_precisions(tiny):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny["mamba"])
    with pytest.raises(PrecastError, match="Put peft_mamba.precast_frozen_weights"):
        MambaAMP(pretrained=model, dtype="bf16", precast=True, device="cpu")
    lm = load(MambaAMP, tiny["mamba"], dtype="bf16", precast=True)
    options = {"precisions": ["fp32", "bf16"], "rebatched": False}
    with pytest.raises(PrecastError, match="tasks in several precisions need the fp32 weights. Leave precast out"):
        lm.loglikelihood_by_precision(requests("loglikelihood_by_precision", [("a", " b", options)]))
    with pytest.raises(PrecastError, match="no mixer of ours"):
        load(MambaAMP, tiny["gpt_neox"], dtype="bf16", precast=True)


def test_a_loaded_model_is_taken_in_its_own_dtype_only(tiny):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny["mamba"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny["mamba"])
    lm = MambaAMP(pretrained=model, tokenizer=tokenizer, dtype="bf16")
    assert math.isfinite(lm.loglikelihood(requests("loglikelihood", PAIRS))[0][0])
    with pytest.raises(PrecisionError, match="torch.bfloat16 weights, fp32 needs torch.float32"):
        MambaAMP(pretrained=model.bfloat16(), tokenizer=tokenizer)
    with pytest.raises(AdapterError, match="peft=x goes with the name of a checkpoint"):
        MambaAMP(pretrained=model, tokenizer=tokenizer, peft="x")


def test_without_pretrained_the_embedded_checkpoint_is_used_and_said(caplog):
    with caplog.at_level(logging.INFO, logger="lm_eval"):
        lm = MambaAMP(device="cpu")
    assert lm.get_model_info()["checkpoint"]["source"] == "mini"
    assert sum("embedded checkpoint 'mini'" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({"dtype": "bf16"}, {"dtype": "fp32"}, r"are of pretrained=\S+precision=bf16\S+; this run is .*precision=fp32"),
        ({}, {"max_length": 64}, "max_length=64"),
        (None, {}, "are of another backend; this run is pretrained="),
    ],
)
def test_a_cache_never_serves_the_answers_of_another_run(tiny, tmp_path, first, then, message):
    path, lm_class = str(tmp_path / "cache.db"), HFLM if first is None else MambaAMP
    CachingLM(load(lm_class, tiny["mamba"], **first or {}), path).loglikelihood(requests("loglikelihood", PAIRS[:2]))
    with pytest.raises(ValueError, match=message):
        CachingLM(load(MambaAMP, tiny["mamba"], **then), path)
    if first is not None:
        again = CachingLM(load(MambaAMP, tiny["mamba"], **first), path)
        again.lm._loglikelihood_tokens = lambda *args, **kwargs: pytest.fail("the answers are in the cache")
        assert len(again.loglikelihood(requests("loglikelihood", PAIRS[:2]))) == 2


# refusals


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": "auto"}, PrecisionError, "dtype=auto is not a precision"),
        ({"dtype": "fp16", "weights_dtype": "bf16"}, PrecisionError, "Give one of the two"),
        ({"mixed_precision_dtype": "bf16"}, PrecisionError, "does not take mixed_precision_dtype=bf16. Use dtype"),
        ({"softmax_dtype": "bf16"}, PrecisionError, "does not take softmax_dtype"),
        ({"load_in_4bit": True}, PrecisionError, "Use --model hf"),
        ({"backend": "seq2seq"}, CheckpointError, "use --model hf for backend=seq2seq"),
        ({"peft": "no/such/adapter"}, AdapterError, "peft=no/such/adapter is no PEFT adapter"),
    ],
)
def test_refused_before_the_model_is_loaded(tiny, monkeypatch, arguments, error, message):
    def no_loading(*args, **kwargs):
        raise AssertionError("the model was loaded before the argument was refused")

    monkeypatch.setattr(HFLM, "_create_model", no_loading)
    with pytest.raises(error, match=message):
        load(MambaAMP, tiny["mamba"], **arguments)


def test_unknown_argument_is_an_error(tiny):
    with pytest.raises(TypeError, match="num_beems"):
        load(MambaAMP, tiny["mamba"], num_beems=3)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_nan_logits_stop_the_run_and_name_the_layer(tiny, tmp_path, family, kind):
    directory = shutil.copytree(tiny[family], tmp_path / family)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():  # finite weights whose products exceed fp16's 65504
        model.backbone.layers[1].mixer.in_proj.weight.mul_(1e6)
    model.save_pretrained(directory)
    arguments = PAIRS if kind == "loglikelihood" else [("Say it", {"until": ["\n"], "max_gen_toks": 4})]
    with pytest.raises(NonFiniteError, match=r"backbone.layers.1.mixer.* in float16.* try dtype=bf16"):
        getattr(load(MambaAMP, directory, dtype="fp16"), kind)(requests(kind, arguments))
    getattr(load(MambaAMP, directory, dtype="fp32"), kind)(requests(kind, arguments))


# adapters


@pytest.fixture(scope="module", params=[["in_proj", "x_proj"], ["dt_proj"], ["out_proj", "embeddings"]], ids="-".join)
def adapter(request, tiny, tmp_path_factory):
    """An adapter on modules of the tiny Mamba with non-zero weights; transformers' kernels bypass some of these."""
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny["mamba"])
    config = peft.LoraConfig(r=1, lora_alpha=1000, target_modules=request.param, init_lora_weights=False)
    directory = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(model, config).save_pretrained(directory)
    return directory


def test_adapter_changes_scores_as_the_merged_model_does(tiny, adapter, tmp_path):
    adapted = load(MambaAMP, tiny["mamba"], peft=str(adapter))
    base = load(MambaAMP, tiny["mamba"])
    merged = transformers.AutoModelForCausalLM.from_pretrained(tiny["mamba"])
    peft.PeftModel.from_pretrained(merged, adapter).merge_and_unload().save_pretrained(tmp_path)
    shutil.copy(tiny["mamba"] / "tokenizer.json", tmp_path)
    shutil.copy(tiny["mamba"] / "tokenizer_config.json", tmp_path)
    expected = [ll for ll, _ in load(MambaAMP, tmp_path).loglikelihood(requests("loglikelihood", PAIRS))]
    scored = [ll for ll, _ in adapted.loglikelihood(requests("loglikelihood", PAIRS))]
    assert scored == pytest.approx(expected, rel=1e-5)
    assert scored != pytest.approx([ll for ll, _ in base.loglikelihood(requests("loglikelihood", PAIRS))], rel=1e-3)
    info = adapted.get_model_info()["adapter"]
    assert info["source"] == str(adapter) and info["r"] == 1 and info["target_modules"]


def test_padded_embeddings_are_not_cut_to_the_tokenizer(tiny, adapter):
    assert load(MambaAMP, tiny["mamba"], peft=str(adapter)).model.config.vocab_size == 264


def test_adapter_of_another_model_is_refused(tiny, adapter):
    with pytest.raises(AdapterError, match="does not fit the model: .* It was made for"):
        load(MambaAMP, tiny["gpt_neox"], peft=str(adapter))
