"""Training through CUDA graphs is training without, and steps aside where a graph would be wrong.

python -m pytest tests/gpu/test_graphs.py
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from peft_mamba import use_cuda_graphs
from peft_mamba.kernels import ENVIRONMENT_VARIABLE
from peft_mamba.mixers import LEVELS, graphs, recompute

from ..peft_mamba.test_recompute import trained
from ..peft_mamba.tiny import relative_rms, tokens

FAMILIES = ("mamba", "mamba2")
STEPS = graphs.TIMES_IN_A_ROW + 3


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Ours: mamba-ssm's SSD takes a minute to tune itself."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")


@pytest.fixture(autouse=True)
def in_two_parts(monkeypatch):
    """The forward of models that have but a few layers."""
    monkeypatch.setattr(graphs, "FIRST_LAYERS", 1)


@pytest.fixture
def replays(monkeypatch):
    """Counts the forwards that were replayed."""
    counted = []
    forward = graphs._StackGraph.forward
    monkeypatch.setattr(graphs._StackGraph, "forward", lambda self, step: counted.append(self) or forward(self, step))
    return counted


class Waits(torch.nn.SiLU):
    """Asks the device for a number, which a capture forbids."""

    def forward(self, x):
        return super().forward(x) * (1.0 if x.sum().item() else 1.0)


def batch(seed, rows=3, length=20):
    ids = tokens(rows, length, seed).cuda()
    return {"input_ids": ids, "labels": ids}


def packed(seed, documents):
    ids = tokens(1, 64, seed).cuda()
    starts = torch.zeros(64, dtype=torch.int32)
    starts[torch.randperm(63, generator=torch.Generator().manual_seed(seed))[: documents - 1] + 1] = 1
    seq_idx = starts.cumsum(0, dtype=torch.int32)[None].cuda()
    return {"input_ids": ids, "labels": ids, "seq_idx": seq_idx}


def losses(model, batches, precision=torch.bfloat16, accumulate=1):
    """The loss of each batch and all gradients after it, over SGD steps."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05)
    seen = []
    for index, each in enumerate(batches):
        with torch.autocast("cuda", precision or torch.bfloat16, enabled=precision is not None):
            loss = model(**each, use_cache=False).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        seen.append((loss.detach().clone(), gradients))
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return seen


def assert_same(mine, expected, tolerance):
    for (loss, gradients), (other, others) in zip(mine, expected, strict=True):
        assert gradients.keys() == others.keys()
        assert relative_rms(loss, other) < tolerance
        for name, gradient in gradients.items():
            assert relative_rms(gradient, others[name]) < tolerance, name


def both(family, kind, batches, replays, level="none", **options):
    model = trained(family, kind).cuda()
    recompute(model, level)
    other = copy.deepcopy(model)
    assert use_cuda_graphs(model) == 1
    mine, expected = losses(model, batches, **options), losses(other, batches, **options)
    assert len(replays) == len(batches) - graphs.TIMES_IN_A_ROW + 1
    assert_same(mine, expected, 1e-4 if options.get("precision", 0) is None else 2e-2)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["sll", "all", "conv"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_the_same(family, kind, level, replays):
    both(family, kind, [batch(seed) for seed in range(STEPS)], replays, level)


@pytest.mark.parametrize("precision", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_that_add_what_the_mixers_made_change_no_bit(family, level, precision, monkeypatch):
    """Run without a graph, the blocks do what a graph would capture."""
    monkeypatch.setattr(graphs._Graphs, "_find", lambda *args: None)
    model = trained(family, "all", num_hidden_layers=3).cuda()
    recompute(model, level)
    expected = losses(model, [batch(0)], precision, accumulate=2)
    model.zero_grad()
    use_cuda_graphs(model)
    ((loss, gradients),) = losses(model, [batch(0)], precision, accumulate=2)
    assert torch.equal(loss, expected[0][0])
    assert all(torch.equal(gradient, expected[0][1][name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("precision", [None, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_add_up_over_batches(family, precision, replays):
    batches = [batch(seed) for seed in range(STEPS + 3)]
    both(family, "sll", batches, replays, accumulate=3, precision=precision)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_batches_with_other_numbers_of_documents(family, replays):
    both(family, "sll", [packed(seed, 3 + 5 * seed) for seed in range(STEPS)], replays)


def test_dropout_draws_anew_at_every_replay(replays):
    model = trained("mamba", "dropout").cuda()
    recompute(model, "none")
    use_cuda_graphs(model)
    seen = [loss.item() for loss, _ in losses(model, [batch(0)] * STEPS, accumulate=10**6)]
    assert len(replays) == STEPS - graphs.TIMES_IN_A_ROW + 1
    assert len(set(seen)) == STEPS


def test_other_batches_run_without_and_the_next_ones_again_with(replays, monkeypatch):
    monkeypatch.setattr(graphs, "PAYS", 0)
    shapes = [(3, 20)] * 4 + [(2, 20), (3, 7)] + [(3, 20)] * 4
    batches = [batch(seed, *shape) for seed, shape in enumerate(shapes)]
    model = trained("mamba", "sll").cuda()
    other = copy.deepcopy(model)
    use_cuda_graphs(model)
    assert_same(losses(model, batches), losses(other, batches), 2e-2)
    assert len(replays) == 2 + 2 and replays[0] is replays[1] is not replays[2]


def test_a_changed_model_is_captured_anew_and_evaluation_runs_without(replays):
    model = trained("mamba", "sll").cuda()
    use_cuda_graphs(model)
    losses(model, [batch(0)] * 4)
    count = len(replays)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch(1)).loss, expected.eval()(**batch(1)).loss)
    model.train()
    with model.disable_adapter():
        assert torch.isfinite(model(**batch(1), use_cache=False).loss)
    assert len(replays) == count


CHANGES = {
    "dropout": lambda model, layer: layer.mixer.in_proj.lora_dropout["default"].__setattr__("p", 0.25),
    "scaling": lambda model, layer: layer.mixer.in_proj.scaling.update(default=0.5),
    "frozen": lambda model, layer: layer.mixer.in_proj.lora_A["default"].weight.requires_grad_(False),
    "moved": lambda model, layer: setattr(layer.mixer.D, "data", 2 * layer.mixer.D.data),
    "hook": lambda model, layer: layer.mixer.register_forward_hook(lambda module, args, output: 2 * output),
    "eval": lambda model, layer: layer.mixer.eval(),
    "another": lambda model, layer: setattr(layer.mixer, "conv1d", copy.deepcopy(layer.mixer.conv1d)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_forward_that_began_too_early_leaves_nothing(change, replays, monkeypatch):
    """The graph's kernels start before it is known whether it is the right one; random numbers show what is left."""
    begun = []
    begin = graphs._StackGraph.begin
    monkeypatch.setattr(graphs._StackGraph, "begin", lambda *args: begun.append(begin(*args)) or begun[-1])
    model = trained("mamba", "dropout").cuda()
    recompute(model, "none")
    use_cuda_graphs(model)
    losses(model, [batch(seed) for seed in range(4)], precision=None)
    assert len(replays) == 2 and begun == [True]
    other = copy.deepcopy(model)
    use_cuda_graphs(other, False)
    torch.cuda.manual_seed(1)
    for each in (model, other):
        CHANGES[change](each, each.base_model.model.backbone.layers[0])
    seen = []
    for each in (model, other):
        torch.cuda.manual_seed(1)
        seen.append(losses(each, [batch(4)], precision=None))
    assert_same(*seen, 1e-4)
    assert len(replays) == 2 and begun == [True, True]


def test_two_forwards_before_their_backwards(replays):
    model = trained("mamba", "sll").cuda()
    other = copy.deepcopy(model)
    use_cuda_graphs(model)
    for each in (model, other):
        losses(each, [batch(0)] * 4, precision=None)
        (each(**batch(1), use_cache=False).loss + each(**batch(2), use_cache=False).loss).backward()
    for mine, expected in zip(model.parameters(), other.parameters(), strict=True):
        if mine.grad is not None:
            assert relative_rms(mine.grad, expected.grad) < 1e-4
    count = len(replays)
    assert count == 2 + 1  # the second of the two ran without
    model(**batch(3), use_cache=False).loss.backward()
    assert len(replays) == count + 1


def test_a_second_backward_is_refused(replays):
    model = trained("mamba", "sll").cuda()
    use_cuda_graphs(model)
    losses(model, [batch(0)] * 4, precision=None)
    loss = model(**batch(1), use_cache=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_what_cannot_be_captured_trains_without_and_says_so(replays, caplog):
    model = trained("mamba", "sll").cuda()
    other = copy.deepcopy(model)
    use_cuda_graphs(model)

    mixer = model.base_model.model.backbone.layers[0].mixer
    with caplog.at_level(logging.INFO, "peft_mamba"):
        handle = mixer.register_forward_pre_hook(lambda module, args: None)
        mine = losses(model, [batch(seed) for seed in range(4)], precision=None)
        handle.remove()
        act = mixer.act
        mixer.act, mixer.activation = Waits(), "waits"
        mine += losses(model, [batch(seed) for seed in range(4, 9)], precision=None)
        torch.rand(2, device="cuda")  # a capture that failed leaves no trace in the generator
        mixer.act, mixer.activation = act, "silu"
        mine += losses(model, [batch(seed) for seed in range(9, 9 + STEPS)], precision=None)
    assert_same(mine, losses(other, [batch(seed) for seed in range(9 + STEPS)], precision=None), 1e-3)
    said = [record.getMessage() for record in caplog.records if "No CUDA graphs" in record.getMessage()]
    assert len(said) == 2 and "hooks" in said[0] and "they fail" in said[1]


def test_full_finetuning_keeps_launching_kernels(replays, caplog):
    model = trained("mamba", "full").cuda()
    use_cuda_graphs(model)
    with caplog.at_level(logging.INFO, "peft_mamba"):
        losses(model, [batch(0)] * STEPS)
    assert not replays and "are trained" in caplog.text
