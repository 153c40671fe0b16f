"""Sequences with states of their own in one row, through whole models: a fork gives what the joined sequence gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_mamba.mixers import PackedSequences, StatePool, sequences, use_mixers

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
        conv, ssm = pool.conv(1, torch.tensor([1])), pool.ssm(1)[1]
        logits = model(row[:, 8:], attention_mask=PackedSequences.of([4], pool, [1]), use_cache=False).logits
        expected = model(row).logits[:, 8:]
    assert conv.dtype == ssm.dtype == torch.float32 and conv.any() and ssm.any()
    assert relative_rms(logits, expected) < 0.02
    assert not pool.conv(1, torch.tensor([0])).any() and not pool.ssm(1)[0].any()


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
        taken = sum(pool.conv(n, torch.arange(1)).nbytes + pool.ssm(n)[0].nbytes for n in range(2))
        assert StatePool.bytes_per_state(model) == taken


def test_a_slot_for_each_sequence():
    model = tiny_model("mamba")
    use_mixers(model)
    with pytest.raises(ValueError, match="source has 1 slots for 2 sequences"):
        PackedSequences.of([1, 2], StatePool(model, 1), [0])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    width=st.integers(0, 4),
    going_on=st.booleans(),
    known=st.booleans(),
    data=st.data(),
)
def test_windows_are_the_last_inputs_of_the_sequences_that_are_kept(lengths, width, going_on, known, data):
    kept = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1)))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, sum(lengths), 3, generator=generator)
    before = torch.randn(len(lengths), 3, width, generator=generator) if going_on else None
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    shortest = min(lengths[s] for s in kept) if known else 0
    packed = PackedSequences(bounds, None, None, torch.tensor(kept), torch.tensor(kept) + 1, shortest)
    windows = packed.windows(x, before, width)
    assert windows.shape == (len(kept), 3, width)
    for s, window in zip(kept, windows, strict=True):
        earlier = before[s] if going_on else torch.zeros(3, width)
        inputs = torch.cat([earlier, x[0, bounds[s] : bounds[s + 1]].T], dim=1)
        assert torch.equal(window, inputs[:, inputs.shape[1] - width :])
    states = torch.randn(len(lengths), 2, generator=generator)
    assert torch.equal(packed.of_kept(states), states[kept])


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_what_depends_on_the_batch_alone_is_found_out_once(family, monkeypatch):
    model = tiny_model(family, num_hidden_layers=3)
    use_mixers(model)
    calls, find = [], sequences._Ends.of
    monkeypatch.setattr(sequences._Ends, "of", lambda *args: (calls.append(args[1]), find(*args))[1])
    pool = StatePool(model, 2)
    hidden_states(model, [tokens(1, 7)[0]], PackedSequences.of([2, 5], pool, target=[1, 2]))
    hidden_states(model, [tokens(1, 7)[0]], PackedSequences.of([2, 5], pool, [1, 2], [1, 2]))
    hidden_states(model, [tokens(1, 7)[0]], PackedSequences.of([2, 5], pool, [1, 2]))
    assert calls == [model.config.conv_kernel - 1] * 2
