"""Scoring by prefix tree on a GPU: the answers of the plain path, in each precision, and of its generation.

python -m pytest tests/gpu/test_scoring.py
"""

from __future__ import annotations

import logging
import math
from importlib.resources import files

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

import lm_eval
import transformers
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from lm_eval_mamba.backend import MambaAMP
from peft_mamba import kernels
from peft_mamba.mixers import PackedSequences, StatePool, use_mixers

from ..conftest import byte_tokenizer
from ..lm_eval_mamba.processes import groups_of_two_processes

FAMILIES = ["mamba", "mamba2"]
# Shared contexts of different lengths, continuations of different lengths, duplicates, prefixes of one another.
PAIRS = [
    (f"{'shot ' * shots}question {n}", f" answer {'x' * m}")
    for shots in (0, 3, 40)
    for n in range(12)
    for m in range(4)
]
PAIRS += [PAIRS[0], ("", "no context"), ("shot ", "shot shot shot"), ("w" * 600, "truncated")]


def instances(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """family -> a directory: sizes that the kernels are made for, random weights, a byte-level tokenizer."""
    sizes = {"vocab_size": 264, "hidden_size": 256, "num_hidden_layers": 4, "eos_token_id": 0, "pad_token_id": 0}
    own = {"state_size": 128, "head_dim": 64, "num_heads": 8, "n_groups": 1}
    kinds = {
        "mamba": (transformers.MambaForCausalLM, transformers.MambaConfig(**sizes)),
        "mamba2": (transformers.Mamba2ForCausalLM, transformers.Mamba2Config(**sizes, **own)),
    }
    directories = {}
    for family, (kind, config) in kinds.items():
        torch.manual_seed(0)
        directories[family] = tmp_path_factory.mktemp(family)
        kind(config).save_pretrained(directories[family])
        byte_tokenizer().save_pretrained(directories[family])
    return directories


def load(directory, **kwargs):
    return MambaAMP(pretrained=str(directory), device="cuda", **{"batch_size": 8, "max_length": 512} | kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_scores_equal_those_of_the_plain_path(checkpoints, family):
    tree, plain = (load(checkpoints[family], scoring=scoring) for scoring in ("tree", "plain"))
    expected = plain.loglikelihood(instances("loglikelihood", PAIRS))
    for tokens in (100, 100_000):
        tree._budget, tree._batch_tokens = None, tokens
        actual = tree.loglikelihood(instances("loglikelihood", PAIRS))
        assert [ll for ll, _ in actual] == pytest.approx([ll for ll, _ in expected], rel=1e-5)
        assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
    assert tree.work.run < tree.work.asked / 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_no_further_from_fp32_than_the_plain_path_with_such_weights(checkpoints, family, dtype):
    pairs = instances("loglikelihood", PAIRS)
    exact = [ll for ll, _ in load(checkpoints[family], scoring="plain").loglikelihood(pairs)]

    def error(**kwargs):
        scores = load(checkpoints[family], **kwargs).loglikelihood(pairs)
        return sum((ll - e) ** 2 for (ll, _), e in zip(scores, exact, strict=True)) ** 0.5

    assert 0 < error(dtype=dtype) < 1.2 * error(scoring="plain", weights_dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_equals_the_plain_path(checkpoints, family):
    tree, plain = (load(checkpoints[family], scoring=scoring) for scoring in ("tree", "plain"))
    arguments = {"until": ["\n\n"], "max_gen_toks": 20}
    prompts = [f"{'shot ' * 20}question {n % 5}" for n in range(8)]
    expected = [plain.generate_until(instances("generate_until", [(p, dict(arguments))]))[0] for p in prompts]
    assert tree.generate_until(instances("generate_until", [(p, dict(arguments)) for p in prompts])) == expected


def test_running_out_of_memory_for_real(checkpoints, caplog):
    """An allocator that may take a part of the device only: the budget shrinks, the answers stay."""
    pairs = instances("loglikelihood", [(f"{'shot ' * 60}question {n} " * 2, f" answer {n}") for n in range(600)])
    lm = load(checkpoints["mamba"], batch_tokens=2**18, max_length=2048)
    expected = lm.loglikelihood(pairs)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    lm._budget = None
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2**29) / total)
        with caplog.at_level(logging.WARNING):
            actual = lm.loglikelihood(pairs)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Out of memory: going on with" in caplog.text
    assert [ll for ll, _ in actual] == pytest.approx([ll for ll, _ in expected], rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_does_not_wait_for_the_device(checkpoints, family):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints[family]).cuda()
    use_mixers(model)
    pool = StatePool(model, 2)
    packed = PackedSequences.of([30, 1, 50], pool, [1, 0, 0], [0, 1, 0], parent=[-1, -1, 1])
    row = torch.randint(1, 256, (1, 81), device="cuda")

    def forward():
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            return model.backbone(row, attention_mask=packed, use_cache=False)[0]

    forward()  # compiles kernels
    if kernels.select("cuda").name in ("torch", "reference", "mamba_ssm"):
        pytest.skip(f"the {kernels.select('cuda').name} kernels plan a packed row on the host")
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_figures_of_one(tmp_path):
    two = groups_of_two_processes(tmp_path, "mini", "icl_gap_mini", 40, device="cuda")
    manager = TaskManager(include_path=str(files("lm_eval_mamba.tasks")), include_defaults=False)
    lm = MambaAMP(batch_size=32, pretrained="mini", device="cuda:0")
    one = lm_eval.simple_evaluate(lm, tasks=["icl_gap_mini"], limit=40, bootstrap_iters=10, task_manager=manager)
    for name, figures in one["groups"].items():
        for key, value in figures.items():
            if isinstance(value, float) and not math.isnan(value):
                assert two[name][key] == pytest.approx(value, rel=1e-6), (name, key)
