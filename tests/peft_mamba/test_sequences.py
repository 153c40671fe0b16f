"""Sequences with states of their own in one row, through whole models: a fork gives what the joined sequence gives."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_mamba.mixers import PackedSequences, StatePool, row_layout, use_mixers
from peft_mamba.mixers.packing import last_hidden_state

from .tiny import ADAPTERS, relative_rms, tiny_model, tokens


def hidden_states(model, row, packed):
    with torch.no_grad():
        return model.backbone(torch.cat(row)[None], attention_mask=packed, use_cache=False)[0][0]


@settings(max_examples=20, deadline=None)
@given(
    family=st.sampled_from(["mamba", "mamba2"]),
    prefixes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    branches=st.lists(st.integers(1, 9), min_size=1, max_size=5),
)
def test_a_fork_gives_what_the_joined_sequence_gives(family, prefixes, branches):
    model = tiny_model(family)
    use_mixers(model)
    before = [tokens(1, n, seed=i)[0] for i, n in enumerate(prefixes)]
    after = [tokens(1, n, seed=50 + i)[0] for i, n in enumerate(branches)]
    slots = list(range(len(prefixes), 0, -1))
    pool = StatePool(model, len(prefixes) + 1)
    hidden_states(model, before, PackedSequences.of(prefixes, pool, target=slots))
    # Each branch from another prefix, the last one from nothing; the first leaves its state too.
    source = [slots[i % len(slots)] for i in range(len(branches) - 1)] + [0]
    packed = PackedSequences.of(branches, pool, source, target=[len(prefixes) + 1] + [0] * (len(branches) - 1))
    actual = hidden_states(model, after, packed).split(branches)
    for i, slot in enumerate(source):
        whole = torch.cat([before[slots.index(slot)], after[i]] if slot else [after[i]])
        with torch.no_grad():
            expected = model.backbone(whole[None])[0][0, -branches[i] :]
        assert relative_rms(actual[i], expected) < 1e-5
    further = tokens(1, 4, seed=99)[0]
    resumed = hidden_states(model, [further], PackedSequences.of([4], pool, [len(prefixes) + 1]))
    whole = torch.cat([*([before[slots.index(source[0])]] if source[0] else []), after[0], further])
    with torch.no_grad():
        assert relative_rms(resumed, model.backbone(whole[None])[0][0, -4:]) < 1e-5


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_causal_lm_takes_them_too_and_half_precision_keeps_the_states_in_float32(family):
    model = tiny_model(family)
    use_mixers(model)
    pool = StatePool(model, 1)
    row = tokens(1, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(row[:, :8], attention_mask=PackedSequences.of([8], pool, target=[1]), use_cache=False)
        conv, ssm = pool.conv(1)[1], pool.ssm(1)[1]
        logits = model(row[:, 8:], attention_mask=PackedSequences.of([4], pool, [1]), use_cache=False).logits
        expected = model(row).logits[:, 8:]
    assert conv.dtype == ssm.dtype == torch.float32 and conv.any() and ssm.any()
    assert relative_rms(logits, expected) < 0.02
    assert not pool.conv(1)[0].any() and not pool.ssm(1)[0].any()


def test_adapters_reach_packed_sequences():
    adapter = next(a for a in ADAPTERS if a.family == "mamba2")
    model = tiny_model(adapter.family)
    adapted = adapter.on(model)
    use_mixers(adapted)
    row = tokens(1, 10)
    pool = StatePool(adapted, 1)
    base = adapted.get_base_model()
    hidden_states(base, [row[0, :6]], PackedSequences.of([6], pool, target=[1]))
    actual = hidden_states(base, [row[0, 6:]], PackedSequences.of([4], pool, [1]))
    with torch.no_grad():
        assert relative_rms(actual, base.backbone(row)[0][0, 6:]) < 1e-5


def test_memory_of_a_state_is_what_the_pool_takes():
    for family in ("mamba", "mamba2"):
        model = tiny_model(family)
        use_mixers(model)
        pool = StatePool(model, 3)
        taken = sum(pool.conv(n)[0].nbytes + pool.ssm(n)[0].nbytes for n in range(2))
        assert StatePool.bytes_per_state(model) == taken


class Forest(NamedTuple):
    """Sequences of a row as drawn, in the order that is asked for."""

    lengths: list[int]
    source: list[int]
    target: list[int]
    parent: list[int]

    @classmethod
    def draw(cls, data, shortest=0, slots=2):
        """Sources are slots up to `slots`; targets are these too, and further ones; without slots there are none."""
        count = data.draw(st.integers(1, 8), "sequences")
        parent = [data.draw(st.integers(-1, s - 1)) for s in range(count)]
        depth: list[int] = []
        for above in parent:
            depth.append(0 if above < 0 else depth[above] + 1)
        kept = [slots > 0 and data.draw(st.booleans()) for _ in range(count)]
        order = list(range(count))
        if max(depth):
            order.sort(key=lambda s: (depth[s], s in parent or kept[s]))
        place = {s: i for i, s in enumerate(order)}
        target = [sum(kept[o] for o in order[: i + 1]) if kept[s] else 0 for i, s in enumerate(order)]
        return cls(
            [data.draw(st.integers(shortest, 6)) for _ in order],
            [0 if parent[s] >= 0 else data.draw(st.integers(0, slots)) for s in order],
            target,
            [place.get(parent[s], -1) for s in order],
        )

    def joined(self, pieces, before):
        """Each with all that comes before it: `before` has what led to each slot."""
        whole: list[torch.Tensor] = []
        for s, piece in enumerate(pieces):
            earlier = whole[self.parent[s]] if self.parent[s] >= 0 else before[self.source[s]]
            whole.append(torch.cat([earlier, piece]))
        return whole


@settings(max_examples=40, deadline=None)
@given(family=st.sampled_from(["mamba", "mamba2"]), grad=st.booleans(), data=st.data())
def test_forks_within_a_row(family, grad, data):
    """Sequences that go on from others of the row, or from slots, some of which are written to once all are read."""
    model = tiny_model(family)
    use_mixers(model)
    forest = Forest.draw(data, shortest=1)
    pool = StatePool(model, 10)
    before = [tokens(1, n, seed=n)[0] for n in (0, 2, 7)]
    hidden_states(model, before, PackedSequences.of([0, 2, 7], pool, target=[0, 1, 2]))
    pieces = [tokens(1, n, seed=30 + s)[0] for s, n in enumerate(forest.lengths)]
    packed = PackedSequences.of(forest.lengths, pool, forest.source, forest.target, forest.parent)
    with torch.set_grad_enabled(grad):
        row = model.backbone(torch.cat(pieces)[None], attention_mask=packed, use_cache=False)[0][0].detach()
    joined = forest.joined(pieces, before)
    for actual, piece, whole in zip(row.split(forest.lengths), pieces, joined, strict=True):
        with torch.no_grad():
            assert relative_rms(actual, model.backbone(whole[None])[0][0, -len(piece) :]) < 1e-5
    further = tokens(1, 3, seed=99)[0]
    for slot, whole in zip(forest.target, joined, strict=True):
        if slot:
            resumed = hidden_states(model, [further], PackedSequences.of([3], pool, [slot]))
            with torch.no_grad():
                expected = model.backbone(torch.cat([whole, further])[None])[0][0, -3:]
            assert relative_rms(resumed, expected) < 1e-5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": [0]}, "source has 1 entries for 2 sequences"),
        ({"parent": [1, -1]}, "a parent is behind its child"),
        ({"parent": [-1, 0], "source": [0, 1]}, "Sequence 1 goes on from a sequence and from a slot"),
        ({"source": [1, 0], "pool": None}, "slots of a pool; there is none"),
        ({"lengths": [1] * 5, "parent": [-1, 0, -1, 0, 2]}, "sort them by how many they have"),
    ],
)
def test_sequences_that_do_not_fit_together_are_refused(wrong, message):
    model = tiny_model("mamba")
    use_mixers(model)
    with pytest.raises(ValueError, match=message):
        PackedSequences.of(**{"lengths": [1, 2], "pool": StatePool(model, 1)} | wrong)


class Pool:
    """Inputs of a convolution in slots."""

    device = "cpu"

    def __init__(self, width, slots):
        self.inputs = torch.randn(slots + 1, width, 3)
        self.inputs[0] = 0

    def conv(self, layer):
        return self.inputs


@settings(max_examples=100, deadline=None)
@given(width=st.integers(0, 4), pooled=st.booleans(), data=st.data())
def test_windows_are_the_last_inputs_before_a_sequence_and_in_it(width, pooled, data):
    torch.manual_seed(0)
    forest = Forest.draw(data, slots=2 if pooled else 0)
    pool = Pool(width, 10) if pooled else None
    packed = PackedSequences.of(forest.lengths, pool, forest.source, forest.target, forest.parent)
    x = torch.randn(1, sum(forest.lengths), 3)
    slots = [torch.zeros(width, 3)] if pool is None else list(pool.inputs.clone())
    whole = forest.joined(x[0].split(forest.lengths), slots)
    before = packed.inputs_before(x, 0, width)
    for s, length in enumerate(forest.lengths):
        earlier = whole[s][: len(whole[s]) - length]
        expected = earlier[len(earlier) - width :]
        assert torch.equal(torch.zeros(width, 3) if before is None else before[s], expected)
    packed.keep_inputs(x, 0, width)
    if pool is not None:
        for slot, inputs in zip(forest.target, whole, strict=True):
            assert not slot or torch.equal(pool.inputs[slot], inputs[len(inputs) - width :])


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_what_depends_on_the_batch_alone_is_found_out_once(family, monkeypatch):
    model = tiny_model(family, num_hidden_layers=3)
    use_mixers(model)
    calls, find = [], row_layout.RowLayout.windows
    monkeypatch.setattr(row_layout.RowLayout, "windows", lambda *args: (calls.append(args[1]), find(*args))[1])
    pool = StatePool(model, 2)
    for packed in (
        PackedSequences.of([2, 5], pool, target=[1, 2]),
        PackedSequences.of([2, 5], pool, [1, 2], [1, 2]),
        PackedSequences.of([2, 5], pool, [1, 0], parent=[-1, 0]),
    ):
        hidden_states(model, [tokens(1, 7)[0]], packed)
        assert calls == [model.config.conv_kernel - 1]
        assert all(part.memo for part in packed.parts)
        calls.clear()


WATCHED = {
    "hook in front": lambda backbone, seen: backbone.register_forward_pre_hook(lambda *_: seen.append(1)),
    "hook behind": lambda backbone, seen: backbone.register_forward_hook(lambda *_: seen.append(1)),
    "own forward": lambda backbone, seen: setattr(
        backbone, "forward", lambda forward=backbone.forward, **given: (seen.append(1), forward(**given))[1]
    ),
}


@pytest.mark.parametrize("kind", WATCHED)
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_the_last_hidden_state_is_the_backbones_and_what_others_put_on_it_runs(family, kind):
    model = tiny_model(family)
    use_mixers(model)
    row, packed = tokens(1, 9), PackedSequences.of([4, 5], parent=[-1, 0])
    with torch.no_grad():
        expected = model.backbone(row, attention_mask=packed, use_cache=False)[0]
        seen: list[int] = []
        assert relative_rms(last_hidden_state(model.backbone, row, packed), expected) < 1e-6
        WATCHED[kind](model.backbone, seen)
        assert torch.equal(last_hidden_state(model.backbone, row, packed), expected) and seen == [1]
