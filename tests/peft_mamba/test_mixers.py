"""The mixers against transformers' own classes: same outputs, without what those get wrong about padding and states."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import FalconMambaConfig, FalconMambaForCausalLM

from peft_mamba import use_mixers
from peft_mamba.kernels import ENVIRONMENT_VARIABLE
from peft_mamba.mixers import Mamba2Mixer, MambaMixer, mixers_of
from peft_mamba.mixers.projection import project
from peft_mamba.mixers.state import RowOrder, reorder

from .tiny import relative_rms, tiny_model, tokens

FAMILIES = ("mamba", "mamba2")
# What a model's configuration can switch that the mixers read.
VARIANTS = {
    "plain": {},
    "biases": {"use_bias": True},
    "no-conv-bias": {"use_conv_bias": False},
    "gelu": {"hidden_act": "gelu"},
    "width-3": {"conv_kernel": 3},
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """The same weights twice: with our mixers, and with transformers'."""
    theirs = tiny_model(request.param)
    ours = copy.deepcopy(theirs)
    use_mixers(ours)
    return ours, theirs


def states_of(cache, layers=2):
    return [cache.get_recurrent_state(layer) for layer in range(layers)] + [
        cache.get_conv_state(layer) for layer in range(layers)
    ]


@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family, variant, implementation, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, implementation)
    theirs = tiny_model(family, **VARIANTS[variant])
    ours = copy.deepcopy(theirs)
    assert use_mixers(ours) == 2
    batch = tokens(2, 37)
    for model in (ours, theirs):
        model.train()
        model(batch, labels=batch).loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_rms(parameter.grad, gradients[name].grad) < 1e-5, name
    with torch.no_grad():
        ours.eval(), theirs.eval()
        expected = theirs(batch, use_cache=True)
        actual = ours(batch, use_cache=True)
    assert relative_rms(actual.logits, expected.logits) < 1e-5
    for state, reference in zip(states_of(actual.cache_params), states_of(expected.cache_params), strict=True):
        assert relative_rms(state, reference) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_transformers(pair, side):
    """At every real token, in training and in scoring (its PyTorch path; its fused path lets left padding in)."""
    ours, theirs = pair
    batch, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[0, :5] = mask[1, :12] = 0
    if side == "right":
        mask = mask.flip(1)
    with torch.no_grad():
        expected, actual = (model(batch, attention_mask=mask).logits[mask == 1] for model in (theirs, ours))
    assert relative_rms(actual, expected) < 1e-5


@settings(max_examples=25, deadline=None)
@given(data=st.data(), family=st.sampled_from(FAMILIES), length=st.integers(2, 24))
def test_padding_anywhere_changes_nothing(data, family, length):
    """A row is what its tokens are alone: outputs, and the states that later tokens go on from.

    (From two tokens on: Mamba2Model drops the mask of a single one before any mixer sees it.)
    """
    ours = tiny_model(family)
    use_mixers(ours)
    mask = torch.tensor(
        [data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)) for _ in range(2)], dtype=torch.long
    )
    batch = tokens(2, length, seed=length)
    with torch.no_grad():
        padded = ours(batch, attention_mask=mask, use_cache=True)
        for row in range(2):
            alone = batch[row : row + 1, mask[row] == 1]
            if alone.numel():
                expected = ours(alone, use_cache=True)
                assert relative_rms(padded.logits[row, mask[row] == 1], expected.logits[0]) < 1e-5
                for state, reference in zip(
                    states_of(padded.cache_params), states_of(expected.cache_params), strict=True
                ):
                    assert relative_rms(state[row], reference[0]) < 1e-5
            else:
                assert not any(state[row].any() for state in states_of(padded.cache_params))


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    parts=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    padding=st.lists(st.integers(0, 4), min_size=4, max_size=4),
)
def test_resuming_gives_what_one_forward_gives(family, parts, padding):
    """Any split into forwards, each padded by itself on either side, with the state of a cache between them."""
    ours = tiny_model(family)
    use_mixers(ours)
    batch = tokens(2, sum(parts), seed=sum(parts))
    cache, logits = None, []
    with torch.no_grad():
        whole = ours(batch, use_cache=True)
        for part, pad in zip(batch.split(parts, dim=1), padding, strict=False):
            mask = torch.ones_like(part)
            columns = slice(0, part.shape[1])
            if pad:
                columns = slice(0, part.shape[1]) if pad % 2 else slice(pad, None)
                sides = (0, pad) if pad % 2 else (pad, 0)
                part, mask = (torch.nn.functional.pad(t, sides) for t in (part, mask))
            out = ours(part, attention_mask=mask, cache_params=cache, use_cache=True)
            cache = out.cache_params
            logits.append(out.logits[:, columns])
    assert relative_rms(torch.cat(logits, dim=1), whole.logits) < 1e-5
    for state, expected in zip(states_of(cache), states_of(whole.cache_params), strict=True):
        assert relative_rms(state, expected) < 1e-5


def test_gradients_flow_through_a_state(pair):
    """Through the mixer's own states, which is how a document longer than memory trains."""
    mixer = copy.deepcopy(mixers_of(pair[0])[0][1]).double()
    x = torch.randn(2, 12, 32, dtype=torch.float64, requires_grad=True)
    whole, final = mixer.mix(x, return_final_state=True)
    (expected,) = torch.autograd.grad(whole.square().sum() + final.ssm.square().sum(), x)
    first, state = mixer.mix(x[:, :7], return_final_state=True)
    second, state = mixer.mix(x[:, 7:], initial_state=state, return_final_state=True)
    (actual,) = torch.autograd.grad(torch.cat([first, second], 1).square().sum() + state.ssm.square().sum(), x)
    assert relative_rms(actual, expected) < 1e-12


def test_packed_documents_stay_apart(pair):
    mixer = mixers_of(pair[0])[0][1]
    x = torch.randn(1, 15, 32)
    seq_idx = torch.tensor([[0] * 4 + [1] * 11], dtype=torch.int32)
    with torch.no_grad():
        packed = mixer(x, seq_idx=seq_idx)
        apart = torch.cat([mixer(x[:, :4]), mixer(x[:, 4:])], dim=1)
        assert relative_rms(packed, apart) < 1e-6
        # With padding between and before them as well.
        mask = torch.tensor([[0, 1, 1, 1, 1, 0, 0, *[1] * 11]])
        padded = torch.zeros(1, 18, 32).index_copy(1, mask[0].nonzero()[:, 0], x)
        spread = torch.tensor([[0] * 6 + [1] * 12], dtype=torch.int32)
        assert relative_rms(mixer(padded, attention_mask=mask, seq_idx=spread)[mask == 1], apart[0]) < 1e-6


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_generation_equals_transformers(pair, options):
    ours, theirs = pair
    batch, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    expected, actual = (
        model.generate(batch, attention_mask=mask, max_new_tokens=10, **options) for model in (theirs, ours)
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_step_size_keeps_its_bias_in_float32_under_autocast(dtype):
    """A bias of about -4 with a product of about 1e-3: added in half precision, most of the product would be gone."""
    linear = torch.nn.Linear(4, 64)
    with torch.no_grad():
        linear.bias.fill_(-4.6)
        linear.weight.mul_(1e-2)
    x = torch.randn(8, 4)
    with torch.autocast("cpu", dtype):
        product = project(linear, x, bias=False)
    assert product.dtype == dtype
    exact = torch.nn.functional.linear(x, linear.weight)
    assert relative_rms(product, exact) < 0.01
    assert relative_rms(linear(x).to(dtype).float() + 4.6, exact) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_float32(pair, dtype):
    ours, _ = pair
    batch = tokens()
    with torch.no_grad():
        expected = ours(batch).logits
        with torch.autocast("cpu", dtype):
            actual = ours(batch).logits
    assert relative_rms(actual, expected) < (0.03 if dtype == torch.bfloat16 else 0.004)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision(pair, dtype):
    """As `dtype=bfloat16` loads them: the state is float32 all the same, and resuming works."""
    ours, batch = copy.deepcopy(pair[0]), tokens()
    with torch.no_grad():
        expected = ours(batch).logits
        ours.to(dtype)
        out = ours(batch[:, :12], use_cache=True)
        actual = torch.cat([out.logits, ours(batch[:, 12:], cache_params=out.cache_params, use_cache=True).logits], 1)
    assert relative_rms(actual, expected) < (0.05 if dtype == torch.bfloat16 else 0.006)
    assert out.cache_params.get_recurrent_state(0).dtype == torch.float32
    assert out.cache_params.get_conv_state(0).dtype == dtype


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(pair, reentrant):
    ours = copy.deepcopy(pair[0]).train()
    batch = tokens()
    ours(batch, labels=batch).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in ours.named_parameters()}
    ours.zero_grad()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours(batch, labels=batch).loss.backward()
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in ours.named_parameters())


def test_torch_compile_goes_around_the_scans_and_says_so(pair):
    ours = copy.deepcopy(pair[0])
    torch.compiler.reset()
    batch = tokens()
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    compiled = torch.compile(ours, backend="eager")
    with torch.no_grad():
        expected = ours(batch, attention_mask=mask, use_cache=False).logits[mask == 1]
        actual = compiled(batch, attention_mask=mask, use_cache=False).logits[mask == 1]
        assert relative_rms(actual, expected) < 1e-6
        with pytest.raises(Exception, match="torch.compile goes around them"):
            torch.compile(ours, backend="eager", fullgraph=True)(batch, use_cache=False)
    torch.compiler.reset()


def test_a_model_stays_itself(pair):
    """Same class hierarchy, names and weights; copies and pickles; asked twice, nothing more happens."""
    ours, theirs = pair
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert use_mixers(ours) == 2
    assert sum(len(module._forward_pre_hooks) for module in ours.modules()) <= 2
    for _, mixer in mixers_of(ours):
        assert type(mixer) in (MambaMixer, Mamba2Mixer) and isinstance(mixer, type(mixers_of(theirs)[0][1]))
    batch = tokens()
    with torch.no_grad():
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(copied(batch).logits, ours(batch).logits)


def test_other_models_are_left_alone():
    assert use_mixers(tiny_model("gpt_neox")) == 0
    falcon = FalconMambaForCausalLM(FalconMambaConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, state_size=4))
    before = [type(module) for module in falcon.modules()]
    assert use_mixers(falcon) == 0
    assert [type(module) for module in falcon.modules()] == before


@pytest.mark.parametrize(("family", "mixer_class"), [("mamba", MambaMixer), ("mamba2", Mamba2Mixer)])
def test_mixers_run_under_hooks_of_a_model_spread_over_devices(family, mixer_class, monkeypatch):
    """accelerate keeps the forward that it found on the module, which a change of class alone would leave in place."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, ran, mix = tiny_model(family), [], mixer_class.mix
    for _, mixer in mixers_of(model):
        add_hook_to_module(mixer, AlignDevicesHook(execution_device="cpu"))
    use_mixers(model)
    monkeypatch.setattr(mixer_class, "mix", lambda self, *a, **k: ran.append(self.layer_idx) or mix(self, *a, **k))
    model(tokens())
    assert ran == [0, 1]


def test_a_forward_put_on_a_mixer_is_refused():
    model = tiny_model("mamba")
    model.backbone.layers[1].mixer.forward = lambda *args, **kwargs: None
    with pytest.raises(NotImplementedError, match=r"backbone\.layers\.1\.mixer has a forward set on the module itself"):
        use_mixers(model)


def test_offloaded_weights_are_refused():
    from accelerate import cpu_offload

    model = cpu_offload(tiny_model("mamba"), execution_device="cpu")
    with pytest.raises(NotImplementedError, match=r"backbone\.layers\.0\.mixer.* is offloaded"):
        use_mixers(model)


def test_masks_that_cannot_be_read_are_refused(pair):
    ours, _ = pair
    mixer, x = mixers_of(ours)[0][1], torch.randn(2, 5, 32)
    for mask in (torch.ones(2, 1, 5, 5), torch.ones(2, 4)):
        with pytest.raises(ValueError, match="attention_mask has shape"):
            mixer(x, attention_mask=mask)


def test_row_order_is_a_permutation_that_keeps_tokens_in_order():
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    order = RowOrder.of(mask, 5)
    assert order.take.tolist() == [[1, 2, 4, 0, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert order.lengths.tolist() == [3, 5, 0]
    x = torch.randn(3, 5, 2)
    assert torch.equal(reorder(reorder(x, order.take), order.back), x)
