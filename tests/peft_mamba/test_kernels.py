"""The chunked implementation against the reference, outputs and gradients; the reference against finite differences."""

from __future__ import annotations

import logging
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_mamba import kernels
from peft_mamba.kernels import KernelError, chunked, reference, scan

from .tiny import relative_rms


def scan_inputs(batch, length, channels, states, dtype=torch.float64):
    def random(*shape):
        return torch.randn(*shape, dtype=dtype)

    inputs = {
        "u": random(batch, length, channels),
        "delta": random(batch, length, channels),
        "A": -4 * torch.rand(channels, states, dtype=dtype),
        "B": random(batch, length, states),
        "C": random(batch, length, states),
        "D": random(channels),
        "z": random(batch, length, channels),
        "delta_bias": random(channels),
        "initial_state": random(batch, channels, states),
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def ssd_inputs(batch, length, heads, groups, dtype=torch.float64):
    def random(*shape):
        return torch.randn(*shape, dtype=dtype)

    inputs = {
        "x": random(batch, length, heads, 3),
        "dt": torch.rand(batch, length, heads, dtype=dtype),
        "A": -2 * torch.rand(heads, dtype=dtype),
        "B": random(batch, length, groups, 4),
        "C": random(batch, length, groups, 4),
        "D": random(heads),
        "initial_state": random(batch, heads, 3, 4),
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def outputs_and_gradients(operation, inputs, **rows):
    y, state = operation(**inputs, **rows, return_final_state=True)
    loss = (y.double() * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum() + (state**2).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return {"y": y, "state": state, **{f"d{name}": g for name, g in zip(inputs, gradients, strict=True)}}


def assert_same(actual, expected, tolerance):
    for name, tensor in expected.items():
        if tensor is not None and tensor.numel() and tensor.any():
            assert relative_rms(actual[name], tensor) < tolerance, name
        elif tensor is not None and actual[name] is not None:
            assert not actual[name].any(), name


ROWS = st.fixed_dictionaries(
    {"batch": st.integers(1, 3), "length": st.integers(0, 90), "padded": st.booleans(), "packed": st.booleans()}
)


def describe_rows(rows):
    batch, length = rows["batch"], rows["length"]
    lengths = torch.randint(0, length + 1, (batch,)) if rows["padded"] else None
    seq_idx = (torch.arange(length) // 11).expand(batch, -1) if rows["packed"] else None
    return {"lengths": lengths, "seq_idx": seq_idx}


@settings(max_examples=40, deadline=None)
@given(
    rows=ROWS, channels=st.integers(1, 6), states=st.integers(1, 5), step=st.integers(1, 30), threads=st.integers(1, 4)
)
def test_chunked_selective_scan_is_the_reference(rows, channels, states, step, threads):
    torch.manual_seed(rows["length"])
    inputs = scan_inputs(rows["batch"], rows["length"], channels, states)
    described = describe_rows(rows)
    expected = outputs_and_gradients(reference.selective_scan, inputs, **described)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "SCAN_BUFFER", step * rows["batch"] * channels * states)
        patch.setattr(scan, "PART_CHANNELS", 1)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        actual = outputs_and_gradients(chunked.selective_scan, inputs, **described)
    assert_same(actual, expected, 1e-12)


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, groups=st.sampled_from([1, 2, 4]), step=st.integers(1, 30))
def test_chunked_ssd_is_the_reference(rows, groups, step):
    torch.manual_seed(rows["length"])
    inputs = ssd_inputs(rows["batch"], rows["length"], 4, groups)
    described = describe_rows(rows)
    expected = outputs_and_gradients(reference.ssd, inputs, **described)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "SSD_CHUNK", step)
        actual = outputs_and_gradients(chunked.ssd, inputs, **described)
    assert_same(actual, expected, 1e-11)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(0, 12),
    width=st.integers(1, 5),
    document=st.integers(1, 4) | st.none(),
    biased=st.booleans(),
    stateful=st.booleans(),
    activation=st.sampled_from(["silu", None]),
)
@example(batch=1, length=2, width=4, document=1, biased=True, stateful=True, activation=None)
def test_chunked_convolution_is_the_reference(batch, length, width, document, biased, stateful, activation):
    torch.manual_seed(length)
    shapes = {"x": (batch, length, 3), "weight": (3, width)}
    shapes |= {"bias": (3,)} if biased else {}
    shapes |= {"initial_state": (batch, width - 1, 3)} if stateful else {}
    inputs = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}
    seq_idx = None if document is None else (torch.arange(length) // document).expand(batch, -1)

    def values_and_gradients(module):
        y = module.causal_conv1d(**inputs, activation=activation, seq_idx=seq_idx)
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
        gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        return {"y": y, **dict(zip(inputs, gradients, strict=True))}

    assert_same(values_and_gradients(chunked), values_and_gradients(reference), 1e-12)


def test_inputs_from_before_a_row_reach_its_first_document_only():
    """Also where the row is shorter than the convolution is wide."""
    x, before, weight = torch.zeros(1, 2, 1), torch.ones(1, 3, 1), torch.ones(1, 4)
    for module in (reference, chunked):
        y = module.causal_conv1d(x, weight, initial_state=before, seq_idx=torch.tensor([[0, 1]]))
        assert y.flatten().tolist() == [3.0, 0.0]


@pytest.mark.parametrize("rows", [{}, {"seq_idx": torch.tensor([[0] * 3 + [1] * 67, [0] * 70])}])
def test_states_that_are_forgotten_at_once_and_states_that_are_kept(rows):
    """Decays of exp(-1e8) and of exactly 1, in float32, gradients too: neither NaN nor a rounding that adds up."""
    torch.manual_seed(0)
    for operation, inputs, step in (
        ("selective_scan", scan_inputs(2, 70, 4, 3), "delta"),
        ("ssd", ssd_inputs(2, 70, 4, 2), "dt"),
    ):
        single = {name: tensor.detach().float() for name, tensor in inputs.items()}
        single["A"][0] = -1e5
        single["A"][1] = 0.0
        single[step][:, ::7] = 1000.0
        single = {name: tensor.requires_grad_() for name, tensor in single.items()}
        double = {name: tensor.detach().double().requires_grad_() for name, tensor in single.items()}
        actual = outputs_and_gradients(getattr(chunked, operation), single, **rows)
        assert_same(actual, outputs_and_gradients(getattr(reference, operation), double, **rows), 1e-5)


def test_inputs_stay_as_they_are_where_no_gradient_is_wanted():
    torch.manual_seed(0)
    for operation, inputs in (("selective_scan", scan_inputs(2, 20, 4, 3)), ("ssd", ssd_inputs(2, 20, 4, 2))):
        expected, state = getattr(chunked, operation)(**inputs, return_final_state=True)
        copies = {name: tensor.detach().clone() for name, tensor in inputs.items()}
        with torch.inference_mode():
            y, final = getattr(chunked, operation)(**copies, return_final_state=True)
        assert all(torch.equal(copies[name], inputs[name]) for name in inputs)
        assert relative_rms(y, expected) < 1e-14 and torch.equal(final, state)


@pytest.mark.parametrize("module", [reference, chunked])
def test_float32_error_is_that_of_float32(module):
    torch.manual_seed(0)
    for operation, inputs in (("selective_scan", scan_inputs(2, 300, 8, 16)), ("ssd", ssd_inputs(2, 300, 4, 2))):
        expected = outputs_and_gradients(getattr(reference, operation), inputs)
        single = {name: tensor.detach().float().requires_grad_() for name, tensor in inputs.items()}
        assert_same(outputs_and_gradients(getattr(module, operation), single), expected, 1e-5)


@pytest.mark.parametrize("module", [reference, chunked])
@pytest.mark.parametrize("operation", ["selective_scan", "ssd"])
def test_half_precision_in_and_out_with_a_float32_state(module, operation):
    torch.manual_seed(0)
    inputs = scan_inputs(2, 40, 8, 4) if operation == "selective_scan" else ssd_inputs(2, 40, 4, 2)
    rounded = {name: tensor.detach().bfloat16() for name, tensor in inputs.items()}
    y, state = getattr(module, operation)(**rounded, return_final_state=True)
    exact, _ = getattr(reference, operation)(**{name: tensor.double() for name, tensor in rounded.items()})
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert relative_rms(y, exact) < 4e-3  # one rounding of the output


def test_autocast_leaves_the_scans_alone():
    inputs = {name: tensor.detach().float() for name, tensor in scan_inputs(2, 20, 8, 4).items()}
    expected, _ = chunked.selective_scan(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual, _ = chunked.selective_scan(**inputs)
    assert torch.equal(actual, expected)


def test_gradcheck_of_the_reference():
    torch.manual_seed(0)
    rows = {"lengths": torch.tensor([5, 3]), "seq_idx": torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])}
    for operation, inputs in (
        (reference.selective_scan, scan_inputs(2, 5, 2, 2)),
        (reference.ssd, ssd_inputs(2, 5, 2, 1)),
    ):

        def function(*tensors, operation=operation, names=tuple(inputs)):
            return operation(**dict(zip(names, tensors, strict=True)), **rows, return_final_state=True)

        assert torch.autograd.gradcheck(function, tuple(inputs.values()))
    x, weight, bias, before = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 5, 3), (3, 4), 3, (2, 3, 3))
    )
    assert torch.autograd.gradcheck(
        lambda x, w, b, h: reference.causal_conv1d(
            x, w, b, activation="silu", initial_state=h, seq_idx=rows["seq_idx"]
        ),
        (x, weight, bias, before),
    )


@pytest.mark.parametrize("operation", ["selective_scan", "ssd"])
def test_seq_idx_keeps_documents_apart(operation):
    """A packed row gives what its documents give one by one, and the last document's state."""
    torch.manual_seed(0)
    inputs = scan_inputs(1, 12, 3, 2) if operation == "selective_scan" else ssd_inputs(1, 12, 4, 2)
    del inputs["initial_state"]
    sequences = [name for name, tensor in inputs.items() if tensor.ndim > 2]
    run = getattr(reference, operation)
    y, state = run(**inputs, seq_idx=torch.tensor([[0] * 5 + [1] * 7]), return_final_state=True)
    for part in (slice(0, 5), slice(5, 12)):
        alone = {name: t[:, part] if name in sequences else t for name, t in inputs.items()}
        y_alone, state_alone = run(**alone, return_final_state=True)
        assert relative_rms(y[:, part], y_alone) < 1e-14
    assert relative_rms(state, state_alone) < 1e-14


@pytest.mark.parametrize("operation", ["selective_scan", "ssd"])
def test_padding_leaves_the_state_exactly_as_it_is(operation):
    torch.manual_seed(0)
    inputs = scan_inputs(2, 9, 3, 2) if operation == "selective_scan" else ssd_inputs(2, 9, 4, 2)
    for module in (reference, chunked):
        _, state = getattr(module, operation)(**inputs, lengths=torch.tensor([0, 0]), return_final_state=True)
        assert torch.equal(state, inputs["initial_state"])


def test_convolution_is_torchs_with_the_earlier_inputs_in_front():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 11, 6), torch.randn(6, 4), torch.randn(6)
    full = torch.nn.functional.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=6)[..., :11]
    assert relative_rms(reference.causal_conv1d(x, weight, bias), full.transpose(1, 2)) < 1e-6
    resumed = reference.causal_conv1d(x[:, 5:], weight, bias, initial_state=x[:, 2:5])
    assert relative_rms(resumed, full.transpose(1, 2)[:, 5:]) < 1e-6
    packed = reference.causal_conv1d(x, weight, bias, seq_idx=torch.tensor([[0] * 5 + [1] * 6] * 2))
    assert relative_rms(packed[:, 5:], reference.causal_conv1d(x[:, 5:], weight, bias)) < 1e-6
    short = {"initial_state": torch.randn(2, 3, 6), "seq_idx": torch.tensor([[0, 1, 1]] * 2)}
    packed = reference.causal_conv1d(x[:, :3], weight, bias, **short)  # shorter than the kernel is wide
    assert relative_rms(packed[:, 1:], reference.causal_conv1d(x[:, 1:3], weight, bias)) < 1e-6
    with pytest.raises(ValueError, match="gelu"):
        reference.causal_conv1d(x, weight, activation="gelu")


@pytest.fixture
def choice(monkeypatch):
    """The choice of kernels, without what was found out before and without what the environment forces."""
    monkeypatch.delenv(kernels.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    caches = (kernels.choice._load, kernels.choice._warn, kernels.choice._select)
    for cache in caches:
        cache.cache_clear()
    yield kernels.choice
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def installed(choice, monkeypatch):
    """Pretend that implementations import, or fail to with a reason: installed(triton="", mamba_ssm="broken")."""

    def pretend(**problems):
        load = choice._load

        def pretended(name, operation):
            if name not in problems or operation not in choice.IMPLEMENTATIONS[name]:
                return load(name, operation)
            return (None, problems[name]) if problems[name] else (lambda *args, **kwargs: name, "")

        monkeypatch.setattr(choice, "_load", pretended)
        choice._select.cache_clear()

    return pretend


class TestChoice:
    def test_a_cpu_gets_torch(self, choice):
        assert kernels.select("cpu").name == "torch"
        assert kernels.describe("cpu") == {
            "kernels": "torch",
            "reason": "the fastest here for cpu",
            **dict.fromkeys(kernels.OPERATIONS, "torch"),
        }

    def test_cuda_gets_the_first_of_each_row_that_runs(self, choice, installed, monkeypatch):
        monkeypatch.setitem(choice.PREFERRED_ON_CUDA, "ssd", ("triton", "mamba_ssm"))
        monkeypatch.setitem(choice.PREFERRED_ON_CUDA, "causal_conv1d", ("mamba_ssm", "triton"))
        installed(triton="", mamba_ssm="")
        chosen = kernels.select("cuda")
        assert chosen.ssd() == "triton" and chosen.causal_conv1d() == "mamba_ssm"
        assert "ssd=triton,causal_conv1d=mamba_ssm" in chosen.name
        installed(triton="", mamba_ssm="mamba-ssm is not installed")
        chosen = kernels.select("cuda")
        assert chosen.causal_conv1d() == "triton"
        assert chosen.paths["causal_conv1d"] == "triton (mamba_ssm: mamba-ssm is not installed)"
        installed(triton="no libcuda", mamba_ssm="broken")
        assert kernels.select("cuda").name == "torch" and "no libcuda" in kernels.describe("cuda")["reason"]

    def test_the_environment_forces_one(self, choice, monkeypatch):
        monkeypatch.setenv(kernels.ENVIRONMENT_VARIABLE, "reference")
        assert kernels.select("cpu").name == "reference"
        assert kernels.describe("cpu")["reason"] == "asked for by name"

    def test_by_operation_and_by_context(self, choice, monkeypatch):
        monkeypatch.setenv(kernels.ENVIRONMENT_VARIABLE, "selective_scan=reference,torch")
        chosen = kernels.select("cpu")
        assert chosen.selective_scan is reference.selective_scan and chosen.ssd is chunked.ssd
        assert kernels.select("cpu", chosen.name).paths == chosen.paths  # what is shown can be asked for
        with kernels.use("ssd=reference"):
            assert kernels.select("cpu").paths == {
                "selective_scan": "torch (the fastest here for cpu)",
                "ssd": "reference (asked for by name)",
                "causal_conv1d": "torch (the fastest here for cpu)",
            }
            with kernels.use(None):
                assert kernels.select("cpu").ssd is reference.ssd
        assert kernels.select("cpu").selective_scan is reference.selective_scan

    def test_backward_of_another_thread_sees_the_context(self, choice):
        """Gradient checkpointing runs the forward again in a thread of autograd."""
        with kernels.use("reference"), ThreadPoolExecutor() as pool:
            assert pool.submit(lambda: kernels.select("cpu").name).result() == "reference"

    def test_an_operation_that_the_forced_kernels_lack(self, choice, installed, monkeypatch):
        monkeypatch.setitem(choice.IMPLEMENTATIONS, "triton", {"ssd": "triton.ssd"})
        installed(triton="", mamba_ssm="")
        chosen = kernels.select("cuda", "triton")
        assert chosen.ssd() == "triton" and chosen.causal_conv1d() == "mamba_ssm"
        assert chosen.paths["causal_conv1d"] == "mamba_ssm (triton has no causal_conv1d)"
        with pytest.raises(KernelError, match="'triton' have no causal_conv1d"):
            kernels.select("cuda", "causal_conv1d=triton")

    def test_what_was_forced_is_never_replaced(self, choice, monkeypatch):
        with pytest.raises(KernelError, match="mamba_ssm.*runs on cuda, not on cpu"):
            kernels.select("cpu", "mamba_ssm")
        with pytest.raises(KernelError, match="triton.*ssd.*runs on cuda, not on cpu"):
            kernels.select("cpu", "ssd=triton")
        for wrong, said in (
            ("scan=torch", "'scan'"),
            ("torch,reference", "twice"),
            ("ssd=torch,ssd=torch", "ssd twice"),
        ):
            with pytest.raises(KernelError, match=said):
                kernels.select("cpu", wrong)
        with pytest.raises(KernelError, match="'nonsense'"), kernels.use("nonsense"):
            pass
        monkeypatch.setenv(kernels.ENVIRONMENT_VARIABLE, "cuda")
        with pytest.raises(KernelError, match=r"'cuda'.*\['reference', 'torch', 'triton', 'mamba_ssm'\]"):
            kernels.select("cpu")
        assert "'cuda'" in kernels.describe("cpu")["reason"]

    def test_a_broken_installation_is_said_once(self, choice, monkeypatch, tmp_path, caplog):
        """A mamba_ssm that is there and does not import, as with an extension built for another torch."""
        package = tmp_path / "mamba_ssm"
        package.mkdir()
        (package / "__init__.py").write_text("raise ImportError('selective_scan_cuda.so: undefined symbol')")
        monkeypatch.syspath_prepend(tmp_path)
        for module in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.delitem(sys.modules, "peft_mamba.kernels.mamba_ssm", raising=False)
        with caplog.at_level(logging.WARNING):
            assert "mamba_ssm" not in kernels.select("cuda").name
        assert caplog.text.count("undefined symbol") == 1
        assert "undefined symbol" in kernels.describe("cuda")["reason"]
        assert "undefined symbol" in kernels.available("cuda")["mamba_ssm"]
