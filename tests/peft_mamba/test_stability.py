"""Lyapunov exponents against products of Jacobians, and the growth of a perturbation against whole forwards."""

import math
from functools import reduce

import hypothesis.extra.numpy as arrays
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_mamba.kernels import reference
from peft_mamba.mixers import MixerState, mixers_of, use_mixers
from peft_mamba.precision import Precision
from peft_mamba.stability import (
    StabilityError,
    analyse,
    default_times,
    exponents,
    growth,
    record_exponents,
    relative_deviation,
    summarise,
)

from .tiny import ADAPTERS, relative_rms, tiny_model, tokens

ADAPTED = {row.name: row for row in ADAPTERS if row.name.endswith(("-all", "-dora", "-bias"))}
FP32 = Precision.parse("fp32")


def logarithm_of_product(jacobians: list[torch.Tensor]) -> float:
    """(1/T) log of the largest singular value of J_T … J_1."""
    product = reduce(lambda product, jacobian: jacobian @ product, jacobians)
    return torch.linalg.matrix_norm(product, 2).log().item() / len(jacobians)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_maximal_exponent_is_that_of_the_product_of_jacobians(family):
    torch.manual_seed(1)
    time, channels, states, heads = 7, 3, 4, 2
    if family == "mamba":
        A, u = -torch.rand(channels, states).double(), torch.randn(1, time, channels).double()
        dt, B = torch.rand(1, time, channels).double(), torch.randn(1, time, states).double()
        h = torch.randn(1, channels, states).double()
        raw = dt.expm1().log()  # softplus gives dt back

        def step(h, t):
            at = slice(t, t + 1)
            return reference.selective_scan(
                u[:, at], raw[:, at], A, B[:, at], B[:, at], initial_state=h, return_final_state=True
            )[1]
    else:
        A, u = -torch.rand(heads).double(), torch.randn(1, time, heads, channels).double()
        dt, B = torch.rand(1, time, heads).double(), torch.randn(1, time, 1, states).double()
        h = torch.randn(1, heads, channels, states).double()

        def step(h, t):
            at = slice(t, t + 1)
            return reference.ssd(u[:, at], dt[:, at], A, B[:, at], B[:, at], initial_state=h, return_final_state=True)[
                1
            ]

    jacobians = []
    for t in range(time):
        jacobians.append(torch.autograd.functional.jacobian(lambda h, t=t: step(h, t), h).reshape(h.numel(), -1))
        h = step(h, t)
    expected = logarithm_of_product(jacobians)
    assert summarise("", exponents(A, dt), time).maximal == pytest.approx(expected, rel=1e-10)
    assert expected < 0


@pytest.mark.parametrize("name", ["mamba", "mamba2", *ADAPTED])
def test_exponent_of_a_model_is_that_of_its_mixers_jacobians(name):
    """The step sizes of the actual mixers, with bias, limits and adapters: Jacobians of `mix` itself, in float64."""
    family, row = name.partition("-")[0], ADAPTED.get(name)
    limits = {"time_step_limit": (0.01, 0.1)} if family == "mamba2" else {}
    model = tiny_model(family, **limits)
    model = (row.on(model) if row else model).double().eval()
    if row and row.name.endswith("-bias"):  # as after training, where biases move too
        for name, parameter in model.named_parameters():
            parameter.data += 0.3 * name.endswith("bias")
    use_mixers(model)
    entered = {}
    for name, mixer in mixers_of(model):
        mixer.register_forward_pre_hook(lambda _, args, name=name: entered.update({name: args[0]}))
    with torch.no_grad(), record_exponents(model) as found:
        model(tokens(1, 5))
    for name, mixer in mixers_of(model):
        hidden, state, jacobians = entered[name].detach(), None, []
        for t in range(hidden.shape[1]):
            token = hidden[:, t : t + 1]
            if state is None:  # the zero state, in the shapes of the first
                state = MixerState(*map(torch.zeros_like, mixer.mix(token, return_final_state=True)[1]))

            def after(ssm, token=token, conv=state.conv, mixer=mixer):
                return mixer.mix(token, initial_state=MixerState(conv, ssm), return_final_state=True)[1].ssm

            # Of a diagonal Jacobian the diagonal is the gradient of the sum; the test above checks whole ones.
            ssm = state.ssm.detach().requires_grad_()
            (diagonal,) = torch.autograd.grad(after(ssm).sum(), ssm)
            jacobians.append(diagonal.flatten())
            with torch.no_grad():
                state = mixer.mix(token, initial_state=state, return_final_state=True)[1]
        expected = torch.stack(jacobians).log().mean(0)
        every = found[name] if family == "mamba" else found[name][:, None, None].expand(state.ssm.shape[1:])
        assert relative_rms(every.flatten(), expected) < 1e-10
    assert not any(module._forward_hooks for _, mixer in mixers_of(model) for module in mixer.modules())


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_never_positive(data):
    finite = {"width": 32, "allow_nan": False}
    D, N, L = (data.draw(st.integers(1, 4)) for _ in range(3))
    A_log = torch.from_numpy(data.draw(arrays.arrays("float32", (D, N), elements=st.floats(-50, 50, **finite))))
    delta = torch.from_numpy(data.draw(arrays.arrays("float32", (L, D), elements=st.floats(-200, 200, **finite))))
    found = exponents(-A_log.exp(), reference.step_size(delta, None, None))
    assert (found <= 0).all()
    layer = summarise("", found, L)
    assert layer.minimal <= layer.quantiles[0] <= layer.quantiles[1] <= layer.quantiles[2] <= layer.maximal <= 0
    assert 0 <= layer.near_zero <= 1 and layer.units == D


def test_distribution_is_over_channels_by_their_slowest_state():
    layer = summarise("x", torch.tensor([[-4.0, -0.1], [-2.0, -3.0], [-1.0, -9.0]], dtype=torch.float64), tokens=5)
    assert (layer.maximal, layer.minimal, layer.quantiles[1]) == (-0.1, -2.0, -1.0)
    assert layer.near_zero == pytest.approx(1 / 3)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_growth_is_linear_in_epsilon(family):
    model, text = tiny_model(family), tokens(1, 24)[0]
    use_mixers(model)
    large, small = (growth(model, text, FP32, epsilon=each, times=(1, 2, 4, 8, 24)) for each in (1e-2, 1e-3))
    for one, tenth in (
        (large.output, small.output),
        *((large.states[name], small.states[name]) for name in large.states),
    ):
        # fp32 rounds at 6e-8; a tenth of the perturbation has ten times its share of that
        assert one == pytest.approx([10 * each for each in tenth], rel=0.01, abs=3e-6)
        assert one[0] > 1e-3


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_growth_is_that_of_whole_forwards(family, precision):
    """States and logits at t of the run in segments are those of a forward of the first t tokens."""
    model, text, chosen = tiny_model(family), tokens(1, 21)[0], Precision.parse(precision)
    use_mixers(model)
    found = growth(model, text, chosen, epsilon=0.3, times=(3, 4, 21), seed=5)
    embeddings = model.get_input_embeddings()(text[None]).detach()
    direction = torch.randn(embeddings.shape[-1], generator=torch.Generator().manual_seed(5))
    moved = embeddings.clone()
    moved[0, 0] += 0.3 * embeddings[0, 0].norm() * direction / direction.norm()
    tolerance = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.2}[precision]
    for index, t in enumerate(found.times):
        with torch.no_grad(), chosen.scope(text.device):
            plain, perturbed = (model(inputs_embeds=each[:, :t], use_cache=True) for each in (embeddings, moved))
        expected = relative_deviation(perturbed.logits[:, -1], plain.logits[:, -1])
        assert found.output[index] == pytest.approx(expected, rel=tolerance)
        for layer, (name, _) in enumerate(mixers_of(model)):
            states = (run.cache_params.get_recurrent_state(layer) for run in (perturbed, plain))
            assert found.states[name][index] == pytest.approx(relative_deviation(*states), rel=tolerance)


def before_and_after(name: str, **options):
    """Of the plain model, and of the one with the adapter of this name."""
    row = next(row for row in ADAPTERS if row.name == name)
    models = tiny_model(row.family), row.on(tiny_model(row.family)).eval()
    return (analyse(model, tokens(1, 12)[0], **options) for model in models)


@pytest.mark.parametrize("name", ["mamba-x_proj", "mamba-dt_proj", "mamba2-in_proj", "mamba-embeddings"])
def test_adapters_change_it(name):
    plain, adapted = before_and_after(name)
    for before, after in zip(plain.layers, adapted.layers, strict=True):
        assert after.name == f"base_model.model.{before.name}" and after.maximal != before.maximal
    assert [each.precision for each in adapted.growth] == ["fp32", "fp16", "bf16"]
    assert adapted.growth[0].output != plain.growth[0].output


def test_an_adapter_behind_the_recurrence_leaves_its_exponent():
    plain, adapted = before_and_after("mamba-out_proj", precisions=())
    assert adapted.layers[0].maximal == plain.layers[0].maximal
    assert adapted.layers[1].maximal != plain.layers[1].maximal


def test_times_and_the_same_seed():
    assert [default_times(n) for n in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8]]
    model, text = tiny_model("mamba"), tokens(1, 9)[0]
    first, again, other = (analyse(model, text, seed=seed, precisions=["fp32"]) for seed in (0, 0, 1))
    assert first == again and first.layers == other.layers and first.growth != other.growth


def test_overflow_is_not_a_number():
    assert math.isnan(relative_deviation(torch.tensor([math.inf]), torch.tensor([math.inf])))
    assert math.isnan(relative_deviation(torch.zeros(2), torch.zeros(2)))


def test_errors():
    model, text = tiny_model("mamba"), tokens(1, 6)[0]
    for arguments, message in (
        ((tiny_model("gpt_neox"), text, {}), "GPTNeoXForCausalLM has no Mamba or Mamba-2 mixer"),
        ((tiny_model("mamba").train(), text, {}), "model.eval"),
        ((model, text[None], {}), r"shape \(1, 6\); expected \(tokens,\)"),
        ((model, text, {"epsilon": 0}), "epsilon=0 .* above 0"),
        ((model, text, {"epsilon": math.inf}), "epsilon=inf"),
        ((model, text, {"times": [1, 7]}), r"times=\(1, 7\) must ascend within 1 … 6"),
        ((model, text, {"times": [2, 2]}), "must ascend"),
        ((model, text, {"times": []}), "must ascend"),
    ):
        with pytest.raises(StabilityError, match=message):
            analyse(*arguments[:2], **arguments[2])
    with torch.no_grad():
        model.get_input_embeddings().weight[text[0]] = 0
    with pytest.raises(StabilityError, match="embedding of the first token .* is zero"):
        analyse(model, text)
