"""Requests as a prefix tree, and the tree as batches: nothing lost, nothing twice, budgets kept."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lm_eval_mamba.scoring.budget import Budget, parse_bytes
from lm_eval_mamba.scoring.schedule import batches
from lm_eval_mamba.scoring.scorer import Plan
from lm_eval_mamba.scoring.tree import PrefixTree
from peft_mamba.mixers import PackedSequences, StatePool, use_mixers

from ..peft_mamba.tiny import tiny_model

# Few letters, so that prefixes, duplicates and branches are the rule.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=25)


def path(tree, leaf):
    """Segments from the first to the leaf's last."""
    segments = [int(tree.segment_of[leaf])]
    while tree.parent[segments[0]] >= 0:
        segments.insert(0, int(tree.parent[segments[0]]))
    return segments


@settings(max_examples=150, deadline=None)
@given(sequences=SEQUENCES, cost=st.sampled_from([0, 1, 3]), height=st.integers(0, 3) | st.none(), ends=st.booleans())
@example(sequences=[[1, 1]], cost=0, height=None, ends=False)
def test_every_sequence_is_read_along_its_path(sequences, cost, height, ends):
    tree = PrefixTree.of(sequences, cost, height, every_end=ends)
    for sequence, leaf in zip(sequences, tree.leaf_of, strict=True):
        tokens = np.concatenate([tree.tokens(segment) for segment in path(tree, leaf)])
        assert tokens[: len(sequence)].tolist() == sequence
        assert not ends or len(tokens) == len(sequence)
        for depth in range(len(sequence)):
            (segment,) = tree.segments_at(np.array([leaf]), np.array([depth]))
            assert tree.start[segment] <= depth < tree.stop[segment] and segment in path(tree, leaf)
    assert (tree.stop > tree.start).all() and (tree.parent < np.arange(len(tree.parent))).all()
    assert height is None or tree.height.max() <= height
    if cost == 0 and height is None and not ends:
        assert tree.tokens_run == len({tuple(s[: i + 1]) for s in sequences for i in range(len(s))})


def test_a_stretch_is_shared_only_where_that_pays():
    few = [[1, *range(10, 20)], [1, *range(20, 30)]]
    assert PrefixTree.of(few, fork_cost=0).tokens_run == 21
    assert PrefixTree.of(few, fork_cost=2).tokens_run == 22
    long = [[*range(100), 1], [*range(100), 2]]
    assert PrefixTree.of(long, fork_cost=2).tokens_run == 102
    nested = [[*range(100), *range(7), last] for last in range(4)] + [[*range(100), 200]]
    tree = PrefixTree.of(nested, fork_cost=2)
    assert tree.height.max() == 2 and tree.tokens_run == 100 + 7 + 4 + 1


@settings(max_examples=200, deadline=None)
@given(
    sequences=SEQUENCES, max_tokens=st.integers(1, 30), spare=st.integers(0, 3), within=st.sampled_from([0, 1, 3, 100])
)
@example(sequences=[[1, 1], [1, 2], [2, 1], [2, 2]], max_tokens=4, spare=0, within=5)
def test_batches_keep_to_the_budget_and_run_parents_first(sequences, max_tokens, spare, within):
    tree = PrefixTree.of(sequences)
    slots = int(tree.height.max()) + spare
    held = {}  # slot to the segment whose state is there
    waiting = np.bincount(tree.parent[tree.parent >= 0], minlength=len(tree.parent))
    run = []
    for batch in batches(tree, max_tokens, slots, within):
        lengths = tree.stop[batch.segments] - tree.start[batch.segments]
        assert lengths.sum() <= max_tokens or len(batch.segments) == 1
        for i, (segment, above, source) in enumerate(zip(batch.segments, batch.parent, batch.source, strict=True)):
            if above >= 0:
                assert above < i and source == 0 and batch.segments[above] == tree.parent[segment]
            else:
                assert held.get(source) == tree.parent[segment] if source else tree.parent[segment] == -1
        assert len(set(batch.parent[batch.parent >= 0])) <= within
        PackedSequences.of(lengths, StubPool(), batch.source, batch.target, batch.parent)  # in an order that it takes
        kept = {int(slot): segment for slot, segment in zip(batch.target, batch.segments, strict=True) if slot}
        assert len(kept) == (batch.target > 0).sum() and all(1 <= slot <= slots for slot in kept)
        for segment in batch.segments:
            if tree.parent[segment] >= 0:
                waiting[tree.parent[segment]] -= 1
            # Its state is kept if and only if something later goes on from it.
            later = np.setdiff1d(np.flatnonzero(tree.parent == segment), batch.segments)
            assert (segment in kept.values()) == (len(later) > 0)
        # A state that is still needed afterwards is not overwritten by this batch.
        assert not any(waiting[held[slot]] for slot in kept if slot in held)
        held |= kept
        run += batch.segments.tolist()
    assert sorted(run) == list(range(len(tree.start)))


class StubPool:
    device = "cpu"


def test_a_prefix_runs_with_its_leaves_and_leaves_no_state():
    """But for the one that the batch has no room for."""
    sequences = [[prefix, *range(9), last] for prefix in range(4) for last in range(3)]
    tree = PrefixTree.of(sequences)
    (batch,) = batches(tree, 100, 1, within=4)
    assert not batch.target.any() and not batch.source.any() and (batch.parent >= 0).sum() == 12
    first, second = batches(tree, 38, 1, within=4)
    assert first.target.tolist().count(1) == 1 and second.source.any()
    assert len(list(batches(tree, 100, 1, within=2))) == 2
    # While that one's leaves run, its slot is taken: another prefix runs beside them only if all of its own fit.
    many = PrefixTree.of([[prefix, *range(9), last] for prefix in range(8) for last in range(3)])
    runs = list(batches(many, 38, 1, within=8))
    assert sorted(segment for each in runs for segment in each.segments) == list(range(8 * 4))
    assert [int(each.target.sum()) for each in runs] == [1, 0, 1, 0]
    assert all((each.parent < 0).all() for each in batches(tree, 100, 4, within=0))


@pytest.mark.parametrize(("device", "within"), [("cuda", True), ("cpu", False)])
def test_memory_for_states_is_divided(device, within):
    """Between those of all layers and those of one, whose prefixes run in one batch with their branches."""
    model = tiny_model("mamba2", num_hidden_layers=4)
    use_mixers(model)
    state = StatePool.bytes_per_state(model)
    budget = Budget(8 * state, tokens=1000)
    assert budget.within(model, torch.device(device)) == (16 if within else 0)
    flat = PrefixTree.of([[prefix, *range(9), last] for prefix in range(20) for last in range(3)])
    deep = PrefixTree.of([[p, *range(9), a, *range(5), b] for p in range(20) for a in range(2) for b in range(2)])
    assert budget.slots(model, flat, 16) == 1  # for what a batch has no room for
    assert budget.slots(model, flat, 0) == 8
    assert budget.slots(model, deep, 16) == 4
    assert Budget(0, 1000).slots(model, deep, 0) == 2  # the least that will do


def test_a_tree_that_needs_more_states_than_there_are_is_refused():
    tree = PrefixTree.of([[1, 1, 1], [1, 1, 2], [1, 2]])
    with pytest.raises(ValueError, match="needs 2 states at once; there are 1 slots"):
        next(batches(tree, 10, 1))


@settings(max_examples=100, deadline=None)
@given(sequences=SEQUENCES, data=st.data())
def test_each_word_of_each_request_is_scored_where_its_context_is(sequences, data):
    requests = [([0, *s], data.draw(st.integers(1, len(s)))) for s in sequences]
    plan = Plan(requests, 0, 10**6)
    tree = plan.tree
    position = {}  # (segment, depth) to the tokens read up to there
    for leaf in range(len(tree.leaves)):
        for depth in range(len(tree.leaves[leaf])):
            (segment,) = tree.segments_at(np.array([leaf]), np.array([depth]))
            position[int(segment), depth] = tree.leaves[leaf][: depth + 1].tolist()
    ending = plan.ending(np.arange(len(tree.start))).tolist()
    assert sorted(ending) == list(range(len(requests)))
    for i, (tokens, count) in enumerate(requests):
        pairs = plan.pair[plan.bounds[i] : plan.bounds[i + 1]]
        for pair, place in zip(pairs, range(len(tokens) - count, len(tokens)), strict=True):
            assert position[int(plan.segment[pair]), int(plan.depth[pair])] == tokens[:place]
            assert plan.words[pair] == tokens[place]
        assert int(plan.segment[pairs[-1]]) == next(
            s for s in range(len(tree.start)) if i in plan.ending(np.array([s]))
        )
    scored = {(tuple(t[:place]), t[place]) for t, count in requests for place in range(len(t) - count, len(t))}
    assert len(plan.words) == len(scored)


@pytest.mark.parametrize(
    ("amount", "expected"), [("2GiB", 2 * 2**30), (1000, 1000), ("1.5 mb", 1_500_000), ("64kib", 65536), ("7B", 7)]
)
def test_amounts_of_memory(amount, expected):
    assert parse_bytes(amount) == expected


@pytest.mark.parametrize("amount", ["", "lots", "2 GiBs", "-1", "1e9x"])
def test_no_amounts_of_memory(amount):
    with pytest.raises(ValueError, match=r"no amount of memory. Give bytes"):
        parse_bytes(amount)
