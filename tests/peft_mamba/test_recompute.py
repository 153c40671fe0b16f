"""Every level of recomputation trains the same, and keeps what it says."""

from __future__ import annotations

import copy
import functools
import pickle
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint

from peft_mamba import MambaLoraConfig, kernels, use_mixers
from peft_mamba.mixers import LEVELS, RecomputeError, recompute
from peft_mamba.mixers.recomputation import kept_for_backward

from .tiny import PRECISIONS, randomise_adapters, relative_rms, tiny_model, tokens

FAMILIES = ("mamba", "mamba2")
TRAINED = {
    "full": None,
    "sll": {"preset": "sll"},
    "all": {"preset": "all"},  # nothing in front of the first block gets a gradient
    "dora": {"preset": "sll", "use_dora": True},
    "dropout": {"preset": "all", "lora_dropout": 0.3},
    "dora-dropout": {"preset": "all", "lora_dropout": 0.3, "use_dora": True},
    "bias": {"preset": "all", "bias": "all"},
    "conv": {"preset": "w", "modules_to_save": ["conv1d"]},
}


def trained(family: str, kind: str, **config):
    model = tiny_model(family, **config)
    if TRAINED[kind] is None:
        use_mixers(model)
        return model.requires_grad_(True).train()
    adapted = get_peft_model(model, MambaLoraConfig(r=2, lora_alpha=4, **TRAINED[kind]))
    randomise_adapters(adapted)
    return adapted.train()


def step(model, precision=None, **batch):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)  # dropout
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        loss = model(**(batch or {"input_ids": tokens(), "labels": tokens()}), use_cache=False).loss
    loss.backward()
    after = torch.rand(3)  # random numbers go on as if nothing were made again
    return loss.detach(), after, {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_level_trains_the_same(family, kind, precision):
    model = trained(family, kind)
    assert recompute(model, "none") == 2
    loss, after, expected = step(model, PRECISIONS[precision] if precision else None)
    assert expected.keys() == {name for name, each in model.named_parameters() if each.requires_grad}
    for level in LEVELS[1:]:
        recompute(model, level)
        again, random, gradients = step(model, PRECISIONS[precision] if precision else None)
        assert torch.equal(again, loss) and torch.equal(random, after)
        for name, gradient in gradients.items():
            assert relative_rms(gradient, expected[name]) < 1e-6, (level, name)
        assert gradients.keys() == expected.keys()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_padded_rows_train_as_apart(family, level):
    model = trained(family, "sll")
    recompute(model, level)
    ids = tokens(1, 20)
    packed = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(20) == 12, -100)}
    _, _, together = step(model, **packed, seq_idx=(torch.arange(20) >= 12).int()[None])
    apart = torch.full((2, 12), -100)
    apart[0], apart[1, :8] = ids[0, :12], ids[0, 12:]
    padded = {"input_ids": apart.clamp(min=0), "labels": apart, "attention_mask": (apart >= 0).long()}
    _, _, expected = step(model, **padded)
    for name, gradient in together.items():
        assert relative_rms(gradient, expected[name]) < 1e-4, name


class _Scan(torch.autograd.Function):
    """A scan that keeps what the Triton one does: its inputs."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        return inputs[0] * 2

    @staticmethod
    def backward(ctx, dy):
        return (dy, *(torch.zeros_like(each) for each in ctx.saved_tensors[1:]))


class _Conv(torch.autograd.Function):
    """A convolution that keeps its input."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * 3

    @staticmethod
    def backward(ctx, dy):
        return dy, torch.zeros_like(ctx.saved_tensors[1])


def _selective_scan(u, delta, A, B, C, D, z, delta_bias, **kwargs):
    return _Scan.apply(u, delta, A, B, C, D, z, delta_bias), None


def _ssd(x, dt, A, B, C, D, **kwargs):
    return _Scan.apply(x, dt, A, B, C, D), None


@pytest.fixture
def frugal_kernels(monkeypatch):
    """Kernels that keep their inputs and nothing else, so that what a level keeps can be counted to the byte."""
    monkeypatch.setattr(kernels, "selective_scan", _selective_scan)
    monkeypatch.setattr(kernels, "ssd", _ssd)
    monkeypatch.setattr(kernels, "causal_conv1d", lambda x, weight, bias, **kwargs: _Conv.apply(x, weight))


def kept_by_a_layer(model, ids) -> float:
    """Bytes a token that one more layer keeps."""
    backbone = model.get_base_model().backbone

    def kept(layers):
        short = copy.copy(backbone)
        short._modules = backbone._modules | {"layers": backbone.layers[:layers]}
        with torch.autocast("cpu", torch.bfloat16):
            return kept_for_backward(lambda: short(ids, use_cache=False).last_hidden_state, model.parameters())

    return (kept(2) - kept(1)) / ids.numel()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_level_keeps_what_it_says(family, frugal_kernels):
    """bf16 autocast, LoRA: counted a token of one layer, against what must be there."""
    H, D, r = 64, 128, 2
    own = {"time_step_rank": 4, "state_size": 8} if family == "mamba" else {"num_heads": 8, "state_size": 8}
    model = trained(family, "sll", hidden_size=H, **own)
    ids = tokens(8, 64)
    levels = {}
    for level in LEVELS:
        recompute(model, level)
        levels[level] = kept_by_a_layer(model, ids)
    stream, half = 4 * H, 2
    if family == "mamba":
        dear = half * (2 * D + 20 + D)  # x and z; time step, B and C; the scan's output
        cheap = half * (H + D + D)  # the normed input, the convolution's output, the step size
        adapters = 3 * half * r
    else:
        conv = D + 2 * 2 * 8
        dear = half * (D + conv + D) + 4 * 8 + 4 * 8  # z and xBC, the scan's output; the step size, in two forms
        cheap = half * (H + conv + D)  # the normed input, the convolution's output, the gated norm's
        adapters = 2 * half * r
    # Factors of the adapters, A and means of squares do not grow with the tokens or are a number a token.
    assert levels["block"] == pytest.approx(stream, rel=0.02)
    assert levels["mixer"] == pytest.approx(stream + dear + adapters, rel=0.08)
    assert levels["none"] - levels["mixer"] == pytest.approx(cheap, rel=0.02)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_made_again_twice_or_in_vain(family, level, frugal_kernels, monkeypatch):
    """Convolutions and scans run in one step of two layers."""
    ran = {"conv": 0, "scan": 0}

    def counted(name, function):
        @functools.wraps(function)
        def count(*args, **kwargs):
            ran[name] += 1
            return function(*args, **kwargs)

        return count

    monkeypatch.setattr(kernels, "causal_conv1d", counted("conv", kernels.causal_conv1d))
    scan = "selective_scan" if family == "mamba" else "ssd"
    monkeypatch.setattr(kernels, scan, counted("scan", getattr(kernels, scan)))
    model = trained(family, "sll")
    recompute(model, level)
    step(model)
    convolutions = 2 if family == "mamba" else 4  # Mamba-2 convolves x apart from B and C
    again = {"none": (1, 1), "mixer": (2, 1), "block": (2, 2)}[level]
    assert ran == {"conv": again[0] * convolutions, "scan": again[1] * 2}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_inside_another_checkpoint_the_other_one_decides(level, reentrant, monkeypatch):
    """Under a checkpoint of the caller's own no block holds anything for itself, whatever its level."""
    model = trained("mamba", "sll")
    recompute(model, level)
    _, _, expected = step(model)
    inputs, convolve = [], kernels.causal_conv1d

    def watched(x, *args, **kwargs):
        inputs.append(weakref.ref(x))
        return convolve(x, *args, **kwargs)

    monkeypatch.setattr(kernels, "causal_conv1d", watched)
    for block in model.get_base_model().backbone.layers:
        block.forward = functools.partial(_checkpointed, block.forward, reentrant)
    loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
    assert len(inputs) == 2 and not any(each() is not None for each in inputs)
    model.zero_grad()
    loss.backward()
    for name, each in model.named_parameters():
        assert each.grad is None or relative_rms(each.grad, expected[name]) < 1e-6, name


def _checkpointed(forward, reentrant, hidden_states, **kwargs):
    return checkpoint(functools.partial(forward, **kwargs), hidden_states, use_reentrant=reentrant)


@pytest.mark.parametrize("level", LEVELS)
def test_hooks_see_real_outputs_when_a_block_runs_again(level):
    """The last product is left out where nothing reads it; a hook may."""
    model = trained("mamba2", "sll")
    recompute(model, level)
    seen = []
    mixer = model.get_base_model().backbone.layers[1].mixer
    mixer.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    step(model)
    assert len(seen) == (2 if level == "block" else 1)
    assert all(relative_rms(each, seen[0]) < 1e-6 for each in seen)


def test_a_cache_written_while_training_is_written_once():
    model = trained("mamba", "sll")
    model.get_base_model().backbone.training = True
    ids = tokens(2, 12)
    for level in LEVELS:
        recompute(model, level)
        out = model(input_ids=ids, labels=ids, use_cache=True)
        out.loss.backward()
        states = [out.cache_params.get_recurrent_state(layer) for layer in range(2)]
        model.eval()
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=True).cache_params
        model.train()
        for layer, state in enumerate(states):
            assert relative_rms(state, expected.get_recurrent_state(layer)) < 1e-5


def test_the_level_belongs_to_the_model():
    model = trained("mamba", "full")
    recompute(model, "block")
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {block.recompute for block in same.backbone.layers} == {"block"}
    assert {block.recompute for block in trained("mamba", "full").backbone.layers} == {"mixer"}


def test_unknown_levels_are_refused_and_other_models_have_none():
    with pytest.raises(RecomputeError, match="no level 'all' of recomputation; there are none, mixer, block"):
        recompute(trained("mamba", "full"), "all")
    assert recompute(tiny_model("gpt_neox"), "block") == 0


def test_gradients_by_name_and_a_second_backward():
    """torch.autograd.grad, and a graph that is kept, work at every level."""
    model = trained("mamba", "sll")
    parameters = [each for each in model.parameters() if each.requires_grad]
    results = []
    for level in LEVELS:
        recompute(model, level)
        loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        second = torch.autograd.grad(loss, parameters)
        assert all(relative_rms(a, b) < 1e-6 for a, b in zip(first, second, strict=True))
        assert all(each.grad is None for each in parameters)
        results.append(first)
    for other in results[1:]:
        assert all(relative_rms(a, b) < 1e-6 for a, b in zip(other, results[0], strict=True))


def test_plain_peft_on_transformers_own_mixers_is_untouched():
    model = tiny_model("gpt_neox")
    adapted = get_peft_model(model, LoraConfig(target_modules=["dense"]))
    assert recompute(adapted, "none") == 0
