"""A layer's input gradient as one product with the gradients of its outputs side by side, against one product each."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peft_mamba.kernels.room import GradientPlace, Place, gradient_place, new_gradient, seen_as, with_columns, with_room
from peft_mamba.mixers import product, projection
from peft_mamba.mixers.projection import project

from .test_projection import IN, LAYERS, OUT, OfShape, adapted
from .tiny import relative_rms


@pytest.fixture(autouse=True)
def also_on_a_cpu(monkeypatch):
    monkeypatch.setattr(projection, "useful", lambda *_: True)


class Reader(torch.autograd.Function):
    """The identity, as a kernel that writes its gradient to the place that its input names."""

    @staticmethod
    def forward(ctx, y):
        ctx.place, ctx.like = gradient_place(y), y.detach()
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return new_gradient(ctx.place, ctx.like).copy_(dy)


def run(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor, sizes, placed, backwards: int = 1):
    """Gradients, where the parts of the output that `placed` tells are read by what knows of places."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    parts = project(layer, x, sizes=sizes)
    parts = [parts] if sizes is None else parts
    read = [Reader.apply(part) if known else part * 1 for part, known in zip(parts, placed, strict=True)]
    for _ in range(backwards):
        torch.cat(read, dim=-1).backward(dy, retain_graph=True)
    return {"x": x.grad} | {name: each.grad for name, each in layer.named_parameters() if each.grad is not None}


def products_of(monkeypatch, what: str) -> list:
    calls, real = [], getattr(product, what)
    monkeypatch.setattr(product, what, lambda *args: calls.append(args) or real(*args))
    return calls


PARTS = {
    "whole": (None, [True], True),
    "parts": ((16, 16, 8), [True, True, True], True),
    "a small one elsewhere": ((24, 12, 4), [True, True, False], True),
    "a large one elsewhere": ((24, 12, 4), [True, False, True], False),
    "none": ((24, 16), [False, False], False),
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", ["lora", "lora, bias trains", "two adapters"])
def test_equals_a_product_each(kind, parts, monkeypatch):
    torch.manual_seed(0)
    layer, x, dy = LAYERS[kind]().double(), torch.randn(2, 5, IN).double(), torch.randn(2, 5, OUT).double()
    sizes, placed, as_one = PARTS[parts]
    expected = run(layer, x, dy, sizes, [False] * len(placed))
    calls = products_of(monkeypatch, "_above")
    gradients = run(layer, x, dy, sizes, placed)
    assert bool(calls) == as_one
    assert gradients.keys() == expected.keys()
    for name in expected:
        assert relative_rms(gradients[name], expected[name]) < 1e-14, name


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(0, 3), length=st.integers(0, 4), r=st.integers(1, 9), first=st.integers(1, OUT - 1))
def test_any_shape(batch, length, r, first):
    torch.manual_seed(0)
    layer = adapted().double()
    layer.lora_A["default"].weight = nn.Parameter(torch.randn(r, IN).double())
    layer.lora_B["default"].weight = nn.Parameter(torch.randn(OUT, r).double())
    x, dy = torch.randn(batch, length, IN).double(), torch.randn(batch, length, OUT).double()
    expected = run(layer, x, dy, (first, OUT - first), [False, False])
    torch.testing.assert_close(run(layer, x, dy, (first, OUT - first), [True, True]), expected)


def test_every_backward_has_a_place_of_its_own():
    layer, x, dy = adapted(), torch.randn(6, IN), torch.randn(6, OUT)
    once, twice = (run(layer, x, dy, (30, 10), [True, True], count) for count in (1, 2))
    for name in once:
        torch.testing.assert_close(twice[name], 2 * once[name])


def test_a_backward_that_stopped_half_way_leaves_the_next_one_its_own():
    layer, dy = adapted(), torch.randn(6, OUT)
    x = torch.randn(6, IN, requires_grad=True)
    first, second = (Reader.apply(each) for each in project(layer, x, sizes=(30, 10)))
    whole = torch.cat([first, second], dim=-1)
    handle = second.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        whole.backward(dy, retain_graph=True)
    handle.remove()
    x.grad = None
    whole.backward(2 * dy)
    assert relative_rms(x.grad, 2 * run(layer, x.detach(), dy, (30, 10), [False, False])["x"]) < 1e-6


def test_an_output_that_is_read_twice():
    layer, dy = adapted(), torch.randn(6, OUT)
    x = torch.randn(6, IN, requires_grad=True)
    y = project(layer, x)
    (2 * Reader.apply(y) + 3 * Reader.apply(y)).backward(dy)
    assert relative_rms(x.grad, 5 * run(layer, x.detach(), dy, None, [False])["x"]) < 1e-6


def test_there_is_one_large_product():
    """As this is what the place is for: nothing else of the input's size is made."""
    layer = adapted(bias=False)
    y = Reader.apply(project(layer, torch.randn(10, IN, requires_grad=True)))
    with OfShape(10, IN) as made:
        y.backward(torch.randn(10, OUT))
    assert made.names.count("mm") == 1 and "addmm_" not in made.names


@pytest.mark.parametrize("change", ["dropout", "no adapter", "frozen input"])
def test_where_there_is_no_place(change):
    layer = LAYERS["frozen"]() if change == "no adapter" else adapted(lora_dropout=0.5 if change == "dropout" else 0.0)
    y = project(layer, torch.randn(3, IN, requires_grad=change != "frozen input"))
    assert gradient_place(y) is None


def test_what_was_collected_is_let_go_of():
    place = GradientPlace([3, 2], 4)
    parts = [place.take(part, (2, 5, size), torch.float32, torch.device("cpu")) for part, size in enumerate((3, 2))]
    assert all(part.stride() == (45, 9, 1) for part in parts)
    whole = place.collect([part.view(10, -1) for part in parts])
    assert whole.shape == (10, 9) and whole.data_ptr() == parts[0].data_ptr()
    assert place.collect([part.view(10, -1) for part in parts]) is None


@pytest.mark.parametrize(("shape", "dtype"), [((4, 2), torch.float32), ((2, 5, 2), torch.float64)])
def test_gradients_that_are_unlike_do_not_share_memory(shape, dtype):
    place = GradientPlace([3, 2], 4)
    first = place.take(0, (2, 5, 3), torch.float32, torch.device("cpu"))
    second = place.take(1, shape, dtype, torch.device("cpu"))
    assert second.shape == shape and second.dtype == dtype
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert place.collect([first.view(10, 3), torch.zeros(10, 2)]) is None


def test_a_part_that_nothing_reads():
    """The gradient of that part is None, and the others have no product of their own with all of the weight."""
    layer, dy = adapted(), torch.randn(6, 30)
    x = torch.randn(6, IN, requires_grad=True)
    Reader.apply(project(layer, x, sizes=(30, 10))[0]).backward(dy)
    whole = torch.cat([dy, torch.zeros(6, 10)], dim=1)
    assert relative_rms(x.grad, run(layer, x.detach(), whole, None, [False])["x"]) < 1e-6


def test_what_lies_behind_a_weight_that_was_moved_is_not_written_to():
    others = torch.ones(7, 5)
    weight, down = others[:4], torch.full((3, 5), 2.0)
    above = product._above(weight, down, product.Room(columns=3, rows=3))
    assert (others == 1).all() and torch.equal(above, torch.cat([weight, down]))
    held = with_room((4, 5), 3, torch.float32, torch.device("cpu"), rows=3)
    assert held.untyped_storage().nbytes() == (4 + 3) * (5 + 3) * 4
    held.fill_(1)
    above = product._above(held, down, product.Room(columns=3, rows=3))
    assert above.data_ptr() == held.data_ptr() and torch.equal(above, torch.cat([weight, down]))


def test_memory_that_is_lent_is_that_of_the_gradient_to_come():
    place = GradientPlace([3, 2], 4)
    like = torch.zeros(2, 5, 3)
    lent = new_gradient(Place(place, 0, lent=True), like)
    beside = new_gradient(Place(place, 1), torch.zeros(2, 5, 2))
    first = new_gradient(Place(place, 0), like)
    assert lent.data_ptr() == first.data_ptr() and beside.data_ptr() == first.data_ptr() + 3 * 4
    assert place.collect([first.view(10, -1), beside.view(10, -1)]) is not None


def test_a_gradient_is_not_written_over_what_it_is_computed_from():
    place = GradientPlace([3], 4)
    like = torch.zeros(2, 5, 3)
    lent = new_gradient(Place(place, 0, lent=True), like)
    own = new_gradient(Place(place, 0), like, reads=lent.view(10, 3))
    assert own.untyped_storage().data_ptr() != lent.untyped_storage().data_ptr() and own.is_contiguous()
    assert new_gradient(Place(place, 0), like, reads=own).data_ptr() == lent.data_ptr()


def test_a_view_has_the_room_of_what_it_shows():
    x = with_room((1, 10, 3), 4, torch.float32, torch.device("cpu"))
    viewed = seen_as(x, (2, 5, 3))
    (whole, room), (same, _) = with_columns(viewed, 4), with_columns(x, 4)
    assert whole.shape == same.shape == (10, 7) and whole.data_ptr() == same.data_ptr() and room.shape == (10, 4)
    assert with_columns(seen_as(torch.zeros(1, 10, 3), (2, 5, 3)), 4) is None


@pytest.mark.parametrize("kind", ["lora", "two adapters"])
def test_a_narrow_layer_reads_its_input_once(kind, monkeypatch):
    """The layer's and the adapter's first product as one; on a GPU in half precision alone."""
    torch.manual_seed(0)
    layer, dy = LAYERS[kind]().double(), torch.randn(2, 5, OUT).double()
    base = layer.base_layer
    base.bias = None
    x = torch.randn(2, 5, IN).double()
    expected, of_two = project(layer, x), run(layer, x, dy, None, [False])
    monkeypatch.setattr(product, "_reads_once", lambda x, weight, bias, A, *_: A is not None)
    calls = products_of(monkeypatch, "_with_down")
    y, gradients = project(layer, x), run(layer, x, dy, None, [False])
    assert len(calls) == 2
    assert relative_rms(y, expected) < 1e-14
    for name in of_two:
        assert relative_rms(gradients[name], of_two[name]) < 1e-14, name
