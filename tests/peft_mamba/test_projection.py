"""The mixers' linear layers against the same modules called as they are, and what backward keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from peft_mamba.frozen import frozen_weights
from peft_mamba.mixers.projection import draws, plain, project
from peft_mamba.mixers.recomputation import kept_for_backward

from .tiny import randomise_adapters, relative_rms

IN, OUT = 24, 40


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def adapted(*, bias: bool = True, adapters: int = 1, base: nn.Module | None = None, **options) -> nn.Module:
    """A linear layer under PEFT's LoRA whose factors are all in use."""
    torch.manual_seed(0)
    model = Model(base or nn.Linear(IN, OUT, bias=bias))
    config = LoraConfig(target_modules=["layer"], r=4, lora_alpha=12, **options)
    wrapped = get_peft_model(model, config)
    for number in range(1, adapters):
        wrapped.add_adapter(f"other{number}", LoraConfig(target_modules=["layer"], r=3, lora_alpha=5))
    wrapped.base_model.set_adapter(list(wrapped.peft_config))
    randomise_adapters(wrapped)
    return wrapped.get_base_model().layer.train()


LAYERS = {
    "plain": lambda: nn.Linear(IN, OUT),
    "frozen": lambda: nn.Linear(IN, OUT, bias=False).requires_grad_(False),
    "lora": adapted,
    "lora, bias trains": lambda: adapted(base=None).requires_grad_(True),
    "two adapters": lambda: adapted(adapters=2),
    "no adapter active": lambda: deactivated(adapted()),
}


def deactivated(layer):
    layer.enable_adapters(False)
    return layer


def run(layer, x, dy, *, ours: bool, sizes=None, bias=True):
    """Output and gradient of the input and of every parameter that trains."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    if ours:
        y = project(layer, x, sizes=sizes, bias=bias)
        y = y if sizes is None else torch.cat(y, dim=-1)
    else:
        y = layer(x)
        if not bias:
            y = y - (layer.base_layer if hasattr(layer, "base_layer") else layer).bias
    y.backward(dy.to(y.dtype))
    return y, {"x": x.grad} | {name: each.grad for name, each in layer.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("sizes", [None, (16, 16, 8)], ids=["whole", "parts"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_equals_the_module_in_float64(kind, precision, sizes):
    layer = LAYERS[kind]()
    assert plain(layer) is not None
    x, dy = torch.randn(2, 7, IN), torch.randn(2, 7, OUT)
    y64, expected = run(layer.double(), x.double(), dy.double(), ours=False)
    layer.float()
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
        y, gradients = run(layer, x, dy, ours=True, sizes=sizes)
    tolerance = 1e-6 if half is None else 1e-2
    assert y.dtype == (half or torch.float32) and relative_rms(y, y64) < tolerance
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative_rms(gradient, expected[name]) < tolerance, name
        assert gradient.dtype == torch.float32


@given(st.integers(0, 3), st.integers(0, 5), st.lists(st.integers(1, 20), min_size=1, max_size=4), st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_shape_and_any_parts(batch, length, sizes, lora):
    torch.manual_seed(0)
    base = nn.Linear(6, sum(sizes)).double()
    layer = adapted(base=base).double() if lora else base
    x, dy = torch.randn(batch, length, 6).double(), torch.randn(batch, length, sum(sizes)).double()
    y, gradients = run(layer, x, dy, ours=True, sizes=sizes)
    expected, wanted = run(layer, x, dy, ours=False)
    assert relative_rms(y, expected) < 1e-12 or not y.numel()
    assert gradients.keys() == wanted.keys()
    assert all(relative_rms(each, wanted[name]) < 1e-12 or not wanted[name].any() for name, each in gradients.items())


def test_a_part_that_nothing_uses_gets_a_gradient_of_zero():
    layer = adapted().requires_grad_(True)
    x = torch.randn(3, IN, requires_grad=True)
    first, _, last = project(layer, x, sizes=(10, 20, 10))
    (first.sum() + last.square().sum()).backward()
    ours = {name: each.grad for name, each in layer.named_parameters()} | {"x": x.grad}
    layer.zero_grad(), setattr(x, "grad", None)
    y = layer(x)
    (y[:, :10].sum() + y[:, 30:].square().sum()).backward()
    for name, expected in ({name: each.grad for name, each in layer.named_parameters()} | {"x": x.grad}).items():
        assert relative_rms(ours[name], expected) < 1e-6, name
    assert not ours["base_layer.weight"][10:30].any()


@pytest.mark.parametrize("lora", [False, True])
def test_a_bias_left_out_is_never_added(lora):
    """To subtract it afterwards costs what it has rounded away: here everything."""
    layer = adapted() if lora else nn.Linear(IN, OUT)
    layer.requires_grad_(False)
    (layer.base_layer if lora else layer).bias.fill_(3e4)
    x = torch.randn(5, IN)
    assert plain(layer) is not None
    y = project(layer, x, bias=False)
    (layer.base_layer if lora else layer).bias.zero_()
    assert relative_rms(y, layer(x)) < 1e-6


def test_dropout_is_differentiated_with_the_mask_that_it_drew():
    layer = adapted(lora_dropout=0.4).double()
    assert draws(layer) and not draws(layer.eval())
    layer.train()
    inputs = (torch.randn(4, IN).double().requires_grad_(), layer.lora_A["default"].weight)

    def function(x, A):
        torch.manual_seed(3)
        return project(layer, x, sizes=(30, 10))

    assert torch.autograd.gradcheck(function, inputs)
    B = layer.lora_B["default"].weight
    assert torch.autograd.gradcheck(lambda B: function(inputs[0], None), (B,))
    # A share of 0.4 of the branch's inputs is dropped and the rest scaled up; the base layer sees all of them.
    x = torch.ones(2000, IN).double()
    without = layer.base_layer(x)
    layer.eval()
    whole = layer(x) - without
    layer.train()
    branch = project(layer, x) - without
    assert relative_rms(branch.mean(0), whole.mean(0)) < 0.1
    assert branch.std(0).min() > 0


NOT_PLAIN = {
    "dora": lambda: adapted(use_dora=True),
    "bias of the adapter": lambda: adapted(lora_bias=True),
    "transposed": lambda: adapted(base=Conv1D(OUT, IN), fan_in_fan_out=True),
    "merged": lambda: merged(adapted()),
    "two dropouts": lambda: adapted(adapters=2, lora_dropout=0.1),
    "hook": lambda: hooked(adapted(), ""),
    "hook on the base layer": lambda: hooked(adapted(), "base_layer"),
    "hook on a factor": lambda: hooked(adapted(), "lora_B.default"),
    "parametrised": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT)),
    "own forward": lambda: own_forward(nn.Linear(IN, OUT)),
    "subclass": lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(IN, OUT),
}


def merged(layer):
    layer.merge()
    return layer


def hooked(layer, name):
    layer.get_submodule(name).register_forward_hook(lambda module, args, y: y * 2)
    return layer


def own_forward(layer):
    layer.forward = lambda x: nn.functional.linear(x, layer.weight) + 7
    return layer


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_is_not_plain_runs_as_it_is(kind):
    layer = NOT_PLAIN[kind]()
    x = torch.randn(2, 3, IN)
    assert plain(layer) is None and draws(layer)
    torch.manual_seed(5)
    expected = layer(x)
    torch.manual_seed(5)
    assert torch.equal(project(layer, x), expected)
    torch.manual_seed(5)
    assert torch.equal(torch.cat(project(layer, x, sizes=(8, 32)), dim=-1), expected)


def test_dtypes_that_peft_would_mix_are_left_to_it():
    """fp32 adapters on a base in bf16 without autocast: PEFT adds the branch in fp32."""
    layer = adapted()
    layer.base_layer.to(torch.bfloat16)
    x = torch.randn(3, IN).to(torch.bfloat16)
    assert torch.equal(project(layer, x), layer(x))


def test_without_a_gradient_a_hook_is_called():
    seen = []
    layer = adapted().eval()
    layer.base_layer.register_forward_hook(lambda *args: seen.append(args))
    with torch.no_grad():
        project(layer, torch.randn(3, IN))
    assert seen


def distance(y, exact):
    return ((y.double() - exact) ** 2).sum().sqrt().item()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16 weights"])
def test_inference_equals_the_module(kind, precision, bias, monkeypatch):
    """float32 to its rounding; in half precision no further from float64 than the module itself."""
    layer = LAYERS[kind]().eval()
    base = layer.base_layer if hasattr(layer, "base_layer") else layer
    monkeypatch.setattr(nn.Linear, "forward", lambda *args: pytest.fail("called as a module"))
    x = torch.randn(3, 50, IN * 2)[..., ::2]  # rows that lie apart, as a part of another layer's output does
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if precision == "bf16 weights":
        layer, x = layer.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None), frozen_weights():
        y = project(layer, x, bias=bias)
        assert torch.equal(project(layer, x, bias=bias), y)
        parts = project(layer, x, sizes=(8, 20, 12), bias=bias)
        assert torch.equal(torch.cat(parts, dim=-1), y)
    monkeypatch.undo()
    if not bias and base.bias is not None:
        base.bias.data.zero_()
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(x.double())
        with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
            theirs = layer(x)
    assert y.dtype == theirs.dtype and y.shape == theirs.shape
    if precision == "fp32":
        assert relative_rms(y, exact) < 1e-6
    else:
        assert distance(y, exact) <= 1.02 * distance(theirs, exact)


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_inference_calls_what_is_not_plain(kind):
    layer = NOT_PLAIN[kind]().eval()
    x = torch.randn(2, 3, IN)
    with torch.no_grad(), frozen_weights():
        assert kind == "two dropouts" or plain(layer) is None  # which are off
        assert relative_rms(project(layer, x), layer(x)) < 1e-6
        assert relative_rms(torch.cat(project(layer, x, sizes=(8, 32)), dim=-1), layer(x)) < 1e-6


@pytest.mark.parametrize("adapters", [1, 2])
def test_inference_sees_weights_that_change_and_other_adapters(adapters):
    layer = adapted(adapters=adapters).eval()
    x = torch.randn(4, IN)
    # Autocast's own cache, of weights that train, would serve the module the old ones.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False), frozen_weights():

        def check():
            assert relative_rms(project(layer, x), layer(x)) < 1e-2

        check()
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
            check()
        for name in layer.scaling:
            layer.scaling[name] *= 3
            check()
        layer.enable_adapters(False)
        check()
        layer.enable_adapters(True)
        layer.set_adapter("default")
        check()


def test_no_product_of_inference_is_followed_by_a_sum():
    """Three dimensions and a bias would make F.linear a product and a sum over all of its output."""
    layer = nn.Linear(IN, OUT).eval()
    x = torch.randn(1, 9, IN * 2)[..., ::2]
    for bias in (True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), frozen_weights():
            project(layer, x, bias=bias)  # casts the weight
            with Operations() as operations:
                project(layer, x, bias=bias)
        assert operations.names == ["aten._to_copy.default", "aten.addmm.default" if bias else "aten.mm.default"]


class Operations(TorchDispatchMode):
    """Names of what is computed, views left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "_unsafe_view" not in str(function):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class OfShape(TorchDispatchMode):
    """Names of what makes something of this shape, views left out."""

    def __init__(self, *shape):
        super().__init__()
        self.shape, self.names = shape, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is not torch.ops.aten.view.default and getattr(result, "shape", None) == self.shape:
            self.names.append(function.overloadpacket.__name__)
        return result


class Shapes(TorchDispatchMode):
    """Size and dtype of everything that is computed, views of `apart_from` left out."""

    def __init__(self, apart_from):
        super().__init__()
        self.made, self.known = set(), {each.untyped_storage().data_ptr() for each in apart_from}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self.known:
            self.made.add((tuple(sorted(result.shape)), result.dtype))
        return result


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_of_a_frozen_weight_no_gradient_and_no_lasting_copy_is_made(precision):
    layer = adapted(bias=False)
    rows = 11
    x = torch.randn(rows, IN, requires_grad=True)

    def forward():
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            return project(layer, x)

    half = 4 if precision is None else 2
    factors = 4 * (IN + OUT)
    kept = kept_for_backward(forward, layer.parameters())
    # The input, x Aᵀ, and the factors: scaled, and in half precision.
    assert kept <= half * (rows * (IN + 4) + factors)
    y = forward()
    with Shapes(layer.parameters()) as shapes:
        y.sum().backward()
    weight = tuple(sorted((IN, OUT)))
    assert (weight, torch.float32) not in shapes.made
    assert layer.base_layer.weight.grad is None and layer.lora_A["default"].weight.grad is not None
    trainable = adapted(bias=False).requires_grad_(True)
    y = project(trainable, x)
    with Shapes(trainable.parameters()) as shapes:
        y.sum().backward()
    assert (weight, torch.float32) in shapes.made  # the check sees one where there is one


def through_and_beside(layer, x, dy, d_same, *, ours):
    """Gradients of x and of every weight that trains, where x is read by the layer and by something else."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    torch.manual_seed(3)  # dropout
    y, same = project(layer, x, through=True) if ours else (layer(x), x)
    torch.autograd.backward([y, same * 1], [dy.to(y.dtype), d_same.to(same.dtype)])
    return {"x": x.grad} | {name: each.grad for name, each in layer.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("kind", [*LAYERS, "dropout"])
@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])
def test_what_else_reads_the_input_gets_its_gradient_added(kind, half):
    layer = adapted(lora_dropout=0.4) if kind == "dropout" else LAYERS[kind]()
    x, dy, d_same = torch.randn(2, 7, IN).to(half or torch.float32), torch.randn(2, 7, OUT), torch.randn(2, 7, IN)
    expected = through_and_beside(layer.double(), x.double(), dy.double(), d_same.double(), ours=kind == "dropout")
    with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
        gradients = through_and_beside(layer.float(), x, dy, d_same, ours=True)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative_rms(gradient, expected[name]) < (1e-6 if half is None else 1e-2), name


@pytest.mark.parametrize("lora_dropout", [0.0, 0.4])
def test_the_input_handed_through_is_differentiated(lora_dropout):
    layer = adapted(lora_dropout=lora_dropout).double()
    x = torch.randn(4, IN).double().requires_grad_()

    def function(x, A):
        torch.manual_seed(3)
        y, same = project(layer, x, sizes=(30, 10), through=True)
        return *y, same.sin()

    assert torch.autograd.gradcheck(function, (x, layer.lora_A["default"].weight))
    y, same = project(layer, x, through=True)
    assert torch.equal(same, x) and same.data_ptr() == x.data_ptr()
    dy, d_same = torch.randn_like(y), torch.randn_like(x)
    handed_in = d_same.clone()
    torch.manual_seed(3)
    (both,) = torch.autograd.grad([y, same], x, [dy, d_same], retain_graph=True)
    assert torch.equal(d_same, handed_in)  # it may be another's as well
    (alone,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    assert relative_rms(both, alone + d_same) < 1e-14
    (past,) = torch.autograd.grad(same, x, d_same)
    assert torch.equal(past, d_same)


def test_no_sum_of_gradients_goes_over_the_input_again():
    layer = adapted()
    source = torch.randn(6, IN, requires_grad=True)

    def names(through):
        with torch.autocast("cpu", torch.bfloat16):
            x = source.bfloat16()
            y, same = project(layer, x, through=True) if through else (project(layer, x), x)
            read = same.sin()
        with Operations() as operations:
            torch.autograd.grad([y, read], source, [torch.randn_like(y), torch.randn_like(read)])
        return [name for name in operations.names if name.startswith(("aten.add.", "aten.add_."))]

    assert len(names(through=False)) == 1 and not names(through=True)


@pytest.mark.parametrize(
    "kind", ["not plain", "no gradient", "no gradient wanted", "input in another dtype", "compiled"]
)
def test_the_input_itself_where_nothing_is_added(kind, monkeypatch):
    layer = NOT_PLAIN["dora"]() if kind == "not plain" else adapted()
    x = torch.randn(3, IN, requires_grad=kind != "no gradient")
    layer.train(kind != "no gradient wanted")
    if kind == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    half = kind == "input in another dtype"
    with torch.set_grad_enabled(kind != "no gradient wanted"), torch.autocast("cpu", torch.bfloat16, enabled=half):
        y, same = project(layer, x, through=True)
        assert same is x and y.shape == (3, OUT)
        parts, same = project(layer, x, sizes=(30, 10), through=True)
        assert same is x and relative_rms(torch.cat(parts, dim=-1), y) < 1e-2
