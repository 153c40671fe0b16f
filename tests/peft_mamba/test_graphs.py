"""What use_cuda_graphs does to a model where nothing can be captured: nothing. tests/gpu has the rest."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_mamba import use_cuda_graphs
from peft_mamba.kernels import norm
from peft_mamba.mixers import LEVELS, block, graphs, recompute
from peft_mamba.mixers.block import MambaBlock
from peft_mamba.mixers.recomputation import Checkpoints

from .test_recompute import step, trained
from .tiny import PRECISIONS, tiny_model, tokens

FAMILIES = ("mamba", "mamba2")


@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_cpu_all_runs_as_before(family):
    model = trained(family, "sll")
    loss, _, expected = step(model)
    assert use_cuda_graphs(model) == 1
    again, _, gradients = step(model)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())
    layers = model.base_model.model.backbone.layers
    assert len(list(layers)) == len(layers) == 2
    states = model(tokens(), output_hidden_states=True).hidden_states
    assert len(states) == 3
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, use_cuda_graphs(model, False) and model(tokens()).logits)


@pytest.fixture
def fused(monkeypatch):
    """Of every norm in front of a mixer: whether it adds what the block before it has made."""
    seen = []

    def watched(*args, added=None, **kwargs):
        seen.append(added is not None)
        return norm.rms_norm_residual(*args, added=added, **kwargs)

    monkeypatch.setattr(block, "rms_norm_residual", watched)
    return seen


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["full", "sll", "all", "dropout"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_norms_add_what_the_mixers_made(family, kind, level, precision, fused):
    """But where a block is made again from its input."""
    model = trained(family, kind, num_hidden_layers=3)
    recompute(model, level)
    expected = step(model, PRECISIONS[precision] if precision else None)
    assert not any(fused)
    fused.clear()
    use_cuda_graphs(model)
    loss, after, gradients = step(model, PRECISIONS[precision] if precision else None)
    assert fused == ([False] * 6 if level == "block" else [False, True, True])
    assert torch.equal(loss, expected[0]) and torch.equal(after, expected[1])
    assert gradients.keys() == expected[2].keys()
    assert all(torch.equal(gradient, expected[2][name]) for name, gradient in gradients.items())


CHECKPOINTING = {
    "gradient_checkpointing": True,
    "_gradient_checkpointing_func": functools.partial(checkpoint, use_reentrant=False),
}


class Doubled(nn.Module):
    """A norm that is not ours."""

    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight

    def forward(self, x):
        return 2 * self.weight * x


class Other(MambaBlock):
    """A block with a forward of its own."""

    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states, *args, **kwargs) * 1.5


@pytest.mark.parametrize(
    ("change", "adding"),
    [
        (lambda blocks: blocks[1].norm.register_forward_hook(lambda module, args, output: 3 * output), [0, 1]),
        (lambda blocks: setattr(blocks[1], "norm", Doubled(blocks[1].norm)), [0, 1]),
        (lambda blocks: blocks[1].register_forward_hook(lambda module, args, output: 3 * output), [0, 0, 0]),
        (lambda blocks: blocks[0].register_forward_pre_hook(lambda module, args: (3 * args[0],)), [0, 0, 1]),
        (lambda blocks: setattr(blocks[0], "forward", functools.partial(torch.mul, 3)), [0, 1]),
        (lambda blocks: setattr(blocks[0], "__class__", Other), [0, 0, 1]),
        (lambda blocks: vars(blocks[1]).update(CHECKPOINTING), [0, 0, 0, 0]),
        (lambda blocks: setattr(blocks[1], "recompute", "block"), [0, 0, 0, 0]),
        (lambda blocks: [each.norm.bfloat16() for each in blocks], [0, 0, 0]),
        (lambda blocks: [setattr(each, "residual_in_fp32", False) for each in blocks], [0, 1, 1]),
    ],
)
def test_where_a_sum_is_made_before_the_norm(change, adding, fused):
    model = trained("mamba", "full", num_hidden_layers=3)
    change(list(model.backbone.layers))

    def run(blocks):
        fused.clear()
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = blocks(x)
        return y, *torch.autograd.grad(y.square().sum(), [x, *model.backbone.layers.parameters()], allow_unused=True)

    expected = run(lambda x: functools.reduce(lambda x, each: each(x), model.backbone.layers, x))
    assert not any(fused)
    mine = run(lambda x: block.run_blocks(model.backbone.layers, x))
    assert fused == adding
    for actual, right in zip(mine, expected, strict=True):
        assert (actual is None) == (right is None)
        assert actual is None or (actual.dtype == right.dtype and torch.equal(actual, right))


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_lie_side_by_side(family, others):
    """All but the first, which is the input, and the last, which is the output and may be kept for long."""
    model = trained(family, "sll", num_hidden_layers=4)
    blocks = model.base_model.model.backbone.layers
    recompute(model, "block")
    for each in blocks[:others]:
        each.recompute = "none"
    x = torch.randn(2, 5, 32).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = block.run_blocks(blocks, x)
    storages = (each.untyped_storage() for each in kept if each.shape == x.shape)
    held = {each.data_ptr(): each.nbytes() for each in storages}
    assert y.untyped_storage().nbytes() == x.nbytes
    assert max(held.values()) == (3 - others) * x.nbytes
    assert others or len(held) == 2
    y.sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_what_does_not_fit_the_checkpoints_memory_is_a_sum_as_ever():
    x = torch.randn(2, 5, 8)
    memory = Checkpoints(1, x, torch.float32)
    for a, b in ((x.bfloat16(), x.bfloat16()), (x[:1], x[:1]), (x, x.bfloat16()), (x, x)):
        total = memory.add(a, b)
        assert torch.equal(total, a + b) and total.dtype == (a + b).dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_and_packed_rows_go_through_the_fused_norms(family, fused):
    model = trained(family, "sll").eval()
    seq_idx = (torch.arange(20) >= 12).int().expand(3, -1)
    expected = model(tokens(), seq_idx=seq_idx).logits, model.generate(input_ids=tokens(), max_new_tokens=4)
    assert not any(fused)
    use_cuda_graphs(model)
    assert torch.equal(model(tokens(), seq_idx=seq_idx).logits, expected[0])
    assert torch.equal(model.generate(input_ids=tokens(), max_new_tokens=4), expected[1])
    assert sum(fused) == 5


def test_a_forward_that_fails_leaves_the_blocks_as_they_were():
    model = trained("mamba", "sll")
    use_cuda_graphs(model)
    backbone = model.base_model.model.backbone
    with pytest.raises(ValueError, match="attention_mask"):
        backbone(input_ids=tokens(), attention_mask=torch.ones(3, 5))
    assert not backbone.layers.as_one and len(list(backbone.layers)) == 2


def test_copies_and_files_begin_without_graphs():
    model = trained("mamba", "sll")
    use_cuda_graphs(model)
    own = model.base_model.model.backbone.layers.graphs
    own._times = 7
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        theirs = other.base_model.model.backbone.layers.graphs
        assert theirs is not own and theirs._times == 0
        assert torch.equal(other(tokens()).logits, model(tokens()).logits)


def test_a_model_without_our_mixers_is_left_alone():
    model = tiny_model("mamba")
    assert use_cuda_graphs(model) == 0 and type(model.backbone.layers) is nn.ModuleList


def state(model):
    return graphs._state_of(list(model.base_model.model.backbone.layers))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.eval(),
        lambda model: model.base_model.model.backbone.layers[1].mixer.in_proj.scaling.update(default=9.0),
        lambda model: model.base_model.model.backbone.layers[0].mixer.A_log.requires_grad_(True),
        lambda model: [setattr(each, "p", 0.1) for each in model.modules() if isinstance(each, nn.Dropout)],
        lambda model: setattr(model.base_model.model.backbone.layers[0], "recompute", "none"),
        lambda model: setattr(
            model.base_model.model.backbone.layers[0].norm, "weight", nn.Parameter(torch.ones(32), requires_grad=False)
        ),
        lambda model: model.merge_adapter(),
    ],
)
def test_what_a_graph_has_baked_in_is_noticed(change):
    model = trained("mamba", "dropout")
    before = state(model)
    assert isinstance(before, tuple) and before == state(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0  # an optimizer's step is nothing new
    assert state(model) == before
    change(model)
    assert state(model) != before


@pytest.mark.parametrize(
    ("kind", "prepare", "reason"),
    [
        ("full", lambda model: None, "are trained"),
        ("sll", lambda model: model.requires_grad_(False), "no weight of the layers"),
        ("sll", lambda model: model.gradient_checkpointing_enable(), "gradient checkpointing"),
        ("sll", lambda model: [m.register_forward_hook(lambda *a: None) for m in model.modules()], "has hooks"),
        ("dropout", lambda model: [setattr(m, "recompute", "block") for m in model.modules()], "random state"),
    ],
)
def test_what_keeps_a_step_from_being_captured(kind, prepare, reason):
    model = trained("mamba", kind)
    prepare(model)
    backbone = model.backbone if kind == "full" else model.base_model.model.backbone
    blocks = list(backbone.layers)
    state = graphs._state_of(blocks)
    assert reason in (state if isinstance(state, str) else graphs._why_not(blocks))


def test_hooks_for_all_modules_keep_a_step_from_being_captured():
    model = trained("mamba", "sll")
    assert isinstance(state(model), tuple) and graphs._why_not(list(model.base_model.model.backbone.layers)) is None
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "all modules" in state(model)
    finally:
        handle.remove()
    model.base_model.model.backbone.layers[0].forward = lambda *args, **kwargs: None
    assert "forward of its own" in state(model)


def test_other_leaves_share_the_weights_and_go_again():
    model = trained("mamba", "sll")
    blocks = list(model.base_model.model.backbone.layers)
    before = [id(each) for each in model.parameters()]
    weights = graphs._trained(blocks)
    with graphs._as_other_leaves(blocks) as leaves:
        assert [leaf.data_ptr() for leaf in leaves] == [weight.data_ptr() for weight in weights]
        assert not {id(leaf) for leaf in leaves} & {id(weight) for weight in weights}
        assert all(a is b for a, b in zip(graphs._trained(blocks), leaves, strict=True))
    assert [id(each) for each in model.parameters()] == before


class Graph:
    """Takes the place of captured ones."""

    def __init__(self, key, blocks, hidden_states, inputs):
        self.key, self.replays = key, 0

    def takes(self, key, inputs):
        return key == self.key

    def waits(self):
        return False


def captured(lengths, monkeypatch):
    """For batches of these lengths, one after the other: the number of the graph that each runs through, 0 for none."""
    monkeypatch.setattr(graphs, "_StackGraph", Graph)
    blocks, own, seen, numbers = (
        list(trained("mamba", "sll").base_model.model.backbone.layers),
        graphs._Graphs(),
        [],
        [],
    )
    for length in lengths:
        graph = own._find(blocks, torch.zeros(2, length, 32), {})
        if graph is not None:
            graph.replays += 1
            seen += [] if graph in seen else [graph]
        numbers.append(0 if graph is None else seen.index(graph) + 1)
    return numbers


def test_a_shape_is_captured_when_it_comes_in_a_row(monkeypatch):
    monkeypatch.setattr(graphs, "PAYS", 2)
    assert captured([8, 8, 9, 8, 8, 8, 8, 7, 8, 8, 8], monkeypatch) == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 2]


def test_shapes_that_do_not_stay_are_captured_ever_less_often(monkeypatch):
    assert captured([n for n in range(9) for _ in range(5)], monkeypatch) == [0, 0, 1, 1, 1] + [0] * 40
    sorted_by_length = [n for n in range(9) for _ in range(7)]
    assert captured(sorted_by_length, monkeypatch) == [0, 0, 1, 1, 1, 1, 1] + [0] * 5 + [2, 2] + [0] * 49
