"""Frozen weights held in half precision compute the same bits, and nothing takes them for the weights themselves."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from peft_mamba import PrecastError, precast, precast_frozen_weights, use_mixers
from peft_mamba.frozen import frozen_weights
from peft_mamba.mixers import LEVELS, recompute
from peft_mamba.precast import precastable
from peft_mamba.precision import PrecisionError

from .test_graphs import state
from .test_projection import Shapes
from .test_recompute import step, trained
from .tiny import ADAPTERS, PRECISIONS, randomise_adapters, tiny_model, tokens

FAMILIES = ("mamba", "mamba2")
SEVERAL_KINDS = [row for row in ADAPTERS if row.options]
HOOKS = ("state_dict_hooks", "load_state_dict_pre_hooks")
LAYERS = {"mamba": ("in_proj", "x_proj", "dt_proj", "out_proj"), "mamba2": ("in_proj", "out_proj")}


def half(model):
    """Which parameters are not in fp32."""
    return {name for name, parameter in model.named_parameters() if parameter.dtype != torch.float32}


def hooks(model):
    modules = [each for each in model.modules() if isinstance(each, nn.Linear)]
    return tuple(sum(map(len, (vars(each)[f"_{kind}"] for each in modules))) for kind in HOOKS)


def two_adapters(family, **options):
    """Of several scales; with dropout no layer is plain."""
    kinds = list(LAYERS[family])
    model = get_peft_model(tiny_model(family), LoraConfig(target_modules=kinds, r=2, use_rslora=True, **options))
    model.add_adapter("other", LoraConfig(target_modules=kinds, r=3, lora_alpha=5, **options))
    model.base_model.set_adapter(["default", "other"])
    randomise_adapters(model)
    return model.train()


def train(model, dtype, steps=2):
    """Loss and gradients of SGD steps, under autocast."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.05)
    seen = []
    for _ in range(steps):
        loss, _, gradients = step(model, dtype)
        seen.append((loss, {name: gradient.clone() for name, gradient in gradients.items()}))
        optimizer.step()
    return seen


def assert_same_bits(mine, expected):
    for (loss, gradients), (other, others) in zip(mine, expected, strict=True):
        assert torch.equal(loss, other) and gradients.keys() == others.keys() != set()
        for name, gradient in gradients.items():
            assert gradient.dtype == others[name].dtype and torch.equal(gradient, others[name]), name


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("adapter", SEVERAL_KINDS, ids=lambda adapter: adapter.name)
def test_trains_the_same_bits(adapter, level):
    model = adapter.on(tiny_model(adapter.family)).train()
    recompute(model, level)
    other = copy.deepcopy(model)
    count = 2 * len(LAYERS[adapter.family])
    if adapter.options.get("use_dora"):
        with pytest.raises(PrecastError, match=f"{count} are under DoRA"), precast_frozen_weights(model, "bf16"):
            pytest.fail("entered")
        return
    with precast_frozen_weights(model, "bf16") as held:
        assert held == len(half(model)) == count
        assert_same_bits(train(model, torch.bfloat16), train(other, torch.bfloat16))
    mine, expected = model.state_dict(), other.state_dict()
    assert mine.keys() == expected.keys() and all(torch.equal(each, expected[name]) for name, each in mine.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_adapters_train_the_same_bits(family, dropout, dtype):
    model = two_adapters(family, lora_dropout=dropout)
    other = copy.deepcopy(model)
    with precast_frozen_weights(model, dtype):
        assert_same_bits(train(model, dtype), train(other, dtype))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_under_gradient_checkpointing(family, reentrant):
    model = trained(family, "sll")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    other = trained(family, "sll")
    with precast_frozen_weights(model, "bf16"):
        assert_same_bits(train(model, torch.bfloat16), train(other, torch.bfloat16))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_casts_a_weight(family):
    model = trained(family, "all", vocab_size=80)  # the head, which autocast casts, is of another shape
    shapes = {tuple(sorted(each.shape)) for each in precastable(model)}

    def cast():
        with Shapes(model.parameters()) as made:
            step(model, torch.bfloat16)
        return {shape for shape, dtype in made.made if dtype == torch.bfloat16} & shapes

    assert cast() == shapes
    with precast_frozen_weights(model, "bf16"):
        assert not cast()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_the_bytes_and_every_original_back(family, precision):
    model = trained(family, "bias")
    objects = list(model.parameters())
    before = [(each.detach().clone(), each.data_ptr()) for each in objects]
    size = sum(each.nbytes for each in objects)
    assert hooks(model) == (0, 0)
    weights = precastable(model)
    held = {name for name, each in model.named_parameters() if any(each is weight for weight in weights)}
    assert {name.split(".mixer.")[1] for name in held} == {f"{kind}.base_layer.weight" for kind in LAYERS[family]}
    with precast_frozen_weights(model, precision):
        assert half(model) == held
        assert {each.dtype for each in weights} == {PRECISIONS[precision]}
        assert size - sum(each.nbytes for each in model.parameters()) == sum(2 * each.numel() for each in weights)
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
    for parameter, (value, address) in zip(objects, before, strict=True):
        assert torch.equal(parameter, value) and parameter.data_ptr() == address
    assert hooks(model) == (0, 0)
    assert torch.isfinite(copy.deepcopy(model)(tokens(), labels=tokens()).loss)
    with precast_frozen_weights(model, precision) as count:
        assert count == len(weights)


def test_what_fails_inside_leaves_the_weights_as_they_were():
    model = trained("mamba", "sll")
    before = [each.clone() for each in model.parameters()]
    with pytest.raises(ZeroDivisionError), precast_frozen_weights(model, "bf16"):
        raise ZeroDivisionError
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert not half(model)


@pytest.mark.parametrize(("where", "name"), [(torch.Tensor, "cpu"), (precast, "with_room")], ids=["host", "device"])
def test_memory_that_runs_out_halfway_leaves_the_weights_as_they_were(where, name, monkeypatch):
    model = trained("mamba", "sll")
    before = [(each.clone(), each.data_ptr()) for each in model.parameters()]
    calls, take = [], getattr(where, name)

    def full(*args):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return take(*args)

    monkeypatch.setattr(where, name, full)
    with pytest.raises(torch.OutOfMemoryError), precast_frozen_weights(model, "bf16"):
        pytest.fail("entered")
    for parameter, (value, address) in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value) and parameter.data_ptr() == address
    assert hooks(model) == (0, 0)


def test_all_originals_have_left_the_device_before_a_cast_weight_comes(monkeypatch):
    """In their places, it would lie with room between."""
    model = trained("mamba2", "sll")
    weights = precastable(model)
    left, take = [], precast.with_room
    watched = lambda *args: (left.append([each.dtype for each in weights]), take(*args))[1]  # noqa: E731
    monkeypatch.setattr(precast, "with_room", watched)
    with precast_frozen_weights(model, "bf16"):
        assert left == [[torch.bfloat16] * len(weights)] * len(weights)


EXCLUDED = {
    "trained": lambda mixer: mixer.in_proj.base_layer.weight.requires_grad_(True),
    "merged": lambda mixer: mixer.in_proj.merge(),
    "hooks": lambda mixer: mixer.in_proj.base_layer.register_forward_hook(lambda *args: None),
    "hooks around": lambda mixer: mixer.in_proj.register_forward_hook(lambda *args: None),
    "parametrised": lambda mixer: nn.utils.parametrizations.weight_norm(mixer.in_proj.base_layer),
    "dtype": lambda mixer: mixer.in_proj.base_layer.to(torch.bfloat16),
    "tied": lambda mixer: mixer.register_parameter("tied", mixer.in_proj.base_layer.weight),
    "shared memory": lambda mixer: mixer.register_buffer("view", mixer.in_proj.base_layer.weight.data[:3]),
    "a variant": lambda mixer: mixer.in_proj.lora_variant.update(default=object()),
    "another layer": lambda mixer: setattr(
        mixer.in_proj, "base_layer", nn.modules.linear.NonDynamicallyQuantizableLinear(32, 128).requires_grad_(False)
    ),
    "not wrapped by PEFT alone": lambda mixer: setattr(
        mixer.in_proj, "__class__", type("Linear", (type(mixer.in_proj),), {})
    ),
}


@pytest.mark.parametrize("kind", EXCLUDED)
def test_what_more_than_a_product_reads_is_not_cast(kind):
    model = trained("mamba", "all")
    mixer = model.base_model.model.backbone.layers[0].mixer
    mixer.in_proj.base_layer.requires_grad_(False)
    EXCLUDED[kind](mixer)
    before = half(model)
    with precast_frozen_weights(model, "bf16") as count:
        assert count == 7
        assert not any("layers.0.mixer.in_proj" in name for name in half(model) - before)
        assert not any(module in ("tied", "view") for module in half(model))


@pytest.mark.parametrize(
    ("build", "dtype", "error", "said"),
    [
        (lambda: trained("mamba", "sll"), torch.float32, PrecastError, "dtype=torch.float32 .* Give bf16 or fp16"),
        (lambda: trained("mamba", "sll"), "int8", PrecisionError, "dtype=int8"),
        (lambda: trained("mamba", "full"), "bf16", PrecastError, "8 are trained"),
        (lambda: use_bf16(trained("mamba2", "sll")), "bf16", PrecastError, "4 are torch.bfloat16"),
        (lambda: tiny_model("mamba"), "bf16", PrecastError, "no mixer of ours.*use_mixers"),
    ],
)
def test_what_cannot_be_held_is_refused(build, dtype, error, said):
    with pytest.raises(error, match=said), precast_frozen_weights(build(), dtype):
        pytest.fail("entered")


def use_bf16(model):
    return model.to(torch.bfloat16)


def test_a_device_without_the_precision_is_named(monkeypatch):
    model = trained("mamba", "sll")
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device: False)
    with pytest.raises(PrecisionError, match="no autocast on cpu"), precast_frozen_weights(model, "bf16"):
        pytest.fail("entered")
    assert not half(model)


MISUSES = {
    "no autocast": lambda model: model(tokens()),
    "no autocast, no gradient": lambda model: torch.no_grad()(model)(tokens()),
    "another autocast": lambda model: torch.autocast("cpu", torch.float16)(model)(tokens()),
    "training them": lambda model: step(model.requires_grad_(True), torch.bfloat16),
    "casting the model": lambda model: step(model.half(), torch.bfloat16),
    "compiled": lambda model: torch.compile(model, backend="eager")(tokens(), use_cache=False),
    "again": lambda model: precast_frozen_weights(model, "bf16").__enter__(),
    "a part again": lambda model: precast_frozen_weights(model.base_model.model.backbone, "bf16").__enter__(),
    "merging in place": lambda model: model.merge_adapter(),
    "merging for good": lambda model: model.merge_and_unload(),
    "another adapter": lambda model: model.add_adapter("other", LoraConfig(target_modules=["in_proj"])),
    "loading weights": lambda model: model.load_state_dict(model.state_dict()),
    "copying": copy.deepcopy,
    "pickling": pickle.dumps,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("misuse", MISUSES)
def test_nothing_takes_half_precision_for_the_weights(misuse, family):
    model = trained(family, "sll")
    expected = {name: each.clone() for name, each in model.state_dict().items()}
    torch.compiler.reset()
    cast = misuse == "casting the model"  # which itself nothing sees before the end
    with (
        pytest.raises(PrecastError, match="wrote to") if cast else nullcontext(),
        precast_frozen_weights(model, "bf16"),
    ):
        with pytest.raises(PrecastError, match="Leave precast_frozen_weights first"):
            MISUSES[misuse](model)
    mine = model.state_dict()
    if not cast:
        assert mine.keys() == expected.keys() and all(torch.equal(mine[name], each) for name, each in expected.items())
        model.merge_and_unload()
    torch.compiler.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_under_its_autocast(family):
    torch.compiler.reset()
    model = trained(family, "sll").eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = compiled(tokens(), use_cache=False).logits
        with precast_frozen_weights(model, "bf16"):
            assert torch.equal(compiled(tokens(), use_cache=False).logits, expected)
        assert torch.equal(compiled(tokens(), use_cache=False).logits, expected)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.merge(),
        lambda layer: layer.base_layer.weight.data.mul_(2),
        lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(layer.base_layer.weight.data.clone(), False)),
        lambda layer: layer.base_layer.float(),
    ],
    ids=["merge", "data", "another parameter", "dtype"],
)
def test_what_is_written_past_all_checks_is_told_at_the_end(write):
    model = trained("mamba", "sll")
    layer = model.base_model.model.backbone.layers[1].mixer.x_proj
    weights = [(each, each.clone()) for each in precastable(model)]
    with pytest.raises(PrecastError, match=r"wrote to 1 of .*layers\.1\.mixer\.x_proj;"):
        with precast_frozen_weights(model, "bf16"):
            write(layer)
    assert all(torch.equal(each, before) for each, before in weights)


def test_a_weight_that_is_not_a_number_was_not_written_to():
    model = trained("mamba", "sll")
    layer = model.base_model.model.backbone.layers[1].mixer.x_proj.base_layer
    layer.weight.data[0, 0] = float("nan")
    with precast_frozen_weights(model, "bf16"):
        pass
    assert layer.weight[0, 0].isnan()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_are_the_originals(family, tmp_path):
    model = trained(family, "sll")
    base = model.get_base_model()
    expected = {name: each.clone() for name, each in model.state_dict().items()}
    fresh = tiny_model(family).requires_grad_(False)
    use_mixers(fresh)
    with precast_frozen_weights(model, "bf16"), precast_frozen_weights(fresh, "bf16"):
        saved = model.state_dict()
        assert saved.keys() == expected.keys()
        assert all(each.dtype == torch.float32 and torch.equal(each, expected[name]) for name, each in saved.items())
        model.save_pretrained(tmp_path / "adapter")
        fresh.save_pretrained(tmp_path / "base")
        # What resuming does: an adapter that is there gets its weights.
        model.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
        assert base.dtype == torch.float32
    reloaded = type(fresh).from_pretrained(tmp_path / "base")
    assert all(torch.equal(each, fresh.state_dict()[name]) for name, each in reloaded.state_dict().items())
    adapted = PeftModel.from_pretrained(reloaded, tmp_path / "adapter")
    theirs, mine = get_peft_model_state_dict(adapted), get_peft_model_state_dict(model)
    assert theirs.keys() == mine.keys() and all(torch.equal(each, mine[name]) for name, each in theirs.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_keeps_nothing_that_is_wrong(family):
    model = trained(family, "sll").eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), frozen_weights():
        expected = model(tokens(), use_cache=False).logits
        with precast_frozen_weights(model, "bf16"):
            assert torch.equal(model(tokens(), use_cache=False).logits, expected)
            assert torch.equal(model(tokens(), use_cache=False).logits, expected)
        assert torch.equal(model(tokens(), use_cache=False).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_from_inside_is_not_for_outside(family):
    """Weights are held at other addresses and in another dtype; a graph is replayed for the state of its capture."""
    model = trained(family, "all")
    before = state(model)
    with precast_frozen_weights(model, "bf16"):
        inside = state(model)
        assert isinstance(inside, tuple) and inside != before
        step(model, torch.bfloat16)
        assert state(model) == inside
    assert state(model) != inside


def test_on_the_meta_device_it_is_known_what_would_be_held():
    model = trained("mamba", "sll")
    count = len(precastable(model))
    assert len(precastable(copy.deepcopy(model).to("meta"))) == count == 8
