"""The kernels and mixers on a GPU, with mamba-ssm and without: against the float64 reference and transformers.

python -m pytest tests/gpu/test_mixers.py
"""

from __future__ import annotations

import copy

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from peft_mamba import kernels, report, use_mixers
from peft_mamba.kernels import reference

from ..peft_mamba.test_kernels import assert_same, outputs_and_gradients, scan_inputs, ssd_inputs
from ..peft_mamba.tiny import relative_rms, tiny_model, tokens

FAMILIES = ("mamba", "mamba2")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def true_float32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(inputs, dtype):
    """Inputs of a test on the GPU: what a kernel takes in half precision in `dtype`, the rest in float32."""
    in_float32 = {"A", "D", "delta_bias", "dt", "initial_state"}
    return {
        name: tensor.detach().to("cuda", torch.float32 if name in in_float32 else dtype).requires_grad_()
        for name, tensor in inputs.items()
    }


def described(batch, length, padded, packed):
    lengths = torch.tensor([length, length // 3, 0][:batch]) if padded else None
    seq_idx = (torch.arange(length, dtype=torch.int32) // 13).expand(batch, -1) if packed else None
    return {"lengths": lengths, "seq_idx": seq_idx}


def to_gpu(rows):
    return {name: None if tensor is None else tensor.cuda() for name, tensor in rows.items()}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 37, 300])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("operation", ["selective_scan", "ssd"])
def test_outputs_and_gradients(path, operation, dtype, length, padded, packed):
    torch.manual_seed(length)
    make = scan_inputs if operation == "selective_scan" else ssd_inputs
    sizes = (3, length, 16, 16) if operation == "selective_scan" else (3, length, 4, 2)
    inputs = make(*sizes)
    if operation == "ssd":  # Triton's products need sizes of 16 and more
        inputs = {
            name: torch.randn(*tensor.shape[:-2], tensor.shape[-2], 16).double().requires_grad_()
            if name in ("x", "B", "C")
            else tensor
            for name, tensor in inputs.items()
        }
        inputs["initial_state"] = torch.randn(3, 4, 16, 16).double().requires_grad_()
    gpu, rows = on_gpu(inputs, dtype), described(3, length, padded, packed)
    exact = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in gpu.items()}
    expected = outputs_and_gradients(getattr(reference, operation), exact, **rows)
    actual = outputs_and_gradients(getattr(kernels, operation), gpu, **to_gpu(rows))
    assert_same(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_selective_scan_without_gradient(path, dtype, stateful, padded):
    """Scoring: where mamba-ssm's own scan runs with a state that it does not take itself."""
    for length in (1, 2, 37, 300):
        torch.manual_seed(length)
        inputs = on_gpu(scan_inputs(3, length, 16, 16), dtype)
        if not stateful:
            del inputs["initial_state"]
        rows = described(3, length, padded, False)
        with torch.no_grad():
            exact = {name: tensor.cpu().double() for name, tensor in inputs.items()}
            y, state = reference.selective_scan(**exact, **rows, return_final_state=True)
            actual, final = kernels.selective_scan(**inputs, **to_gpu(rows), return_final_state=True)
        assert relative_rms(actual, y) < TOLERANCE[dtype]
        assert relative_rms(final, state) < TOLERANCE[dtype] / 3
        assert actual.dtype == dtype and final.dtype == torch.float32


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("padded", [False, True])
def test_selective_scan_in_training(path, dtype, padded):
    """No state in or out, so that mamba-ssm's backward runs; padding in it too, whose step size is exactly zero."""
    torch.manual_seed(0)
    inputs = on_gpu(scan_inputs(3, 130, 16, 16), dtype)
    del inputs["initial_state"]
    exact = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in inputs.items()}
    rows, results = described(3, 130, padded, False), []
    for operation, given, those in (
        (reference.selective_scan, exact, rows),
        (kernels.selective_scan, inputs, to_gpu(rows)),
    ):
        y, _ = operation(**given, **those)
        results.append(dict(zip(given, torch.autograd.grad(y.square().sum(), list(given.values())), strict=True)))
    assert_same(results[1], results[0], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 2, 3, 37])
def test_convolution(path, dtype, length):
    torch.manual_seed(0)
    x, before = torch.randn(3, length, 32), torch.randn(3, 3, 32)
    weight, bias = torch.randn(32, 4), torch.randn(32)
    seq_idx = (torch.arange(length, dtype=torch.int32) // 5).expand(3, -1)
    for more in ({}, {"initial_state": before}, {"seq_idx": seq_idx}, {"initial_state": before, "seq_idx": seq_idx}):
        given = {
            "x": x.to("cuda", dtype),
            "weight": weight.cuda(),
            "bias": bias.cuda(),
            **{name: tensor.cuda() if name == "seq_idx" else tensor.to("cuda", dtype) for name, tensor in more.items()},
        }
        leaves = {name: tensor.requires_grad_() for name, tensor in given.items() if name != "seq_idx"}
        exact = {
            name: tensor.detach().cpu().double().requires_grad_() if name in leaves else tensor.cpu()
            for name, tensor in given.items()
        }
        results = []
        for operation, those in ((reference.causal_conv1d, exact), (kernels.causal_conv1d, given)):
            y = operation(**those, activation="silu")
            gradients = torch.autograd.grad(y.square().sum(), [those[name] for name in leaves])
            results.append({"y": y, **dict(zip(leaves, gradients, strict=True))})
        assert_same(results[1], results[0], TOLERANCE[dtype])


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(path, family):
    """Without padding, which its fused kernels let in; they run Mamba-2's products in TF32."""
    theirs = tiny_model(family, num_heads=8, head_dim=8).cuda()  # heads that its convolution's strides allow
    ours = copy.deepcopy(theirs)
    use_mixers(ours)
    batch = tokens(3, 40).cuda()
    with torch.no_grad():
        for mode in (True, False):
            expected = theirs.train(mode)(batch, use_cache=False).logits
            actual = ours.train(mode)(batch, use_cache=False).logits
            assert relative_rms(actual, expected) < (1e-5 if family == "mamba" else 2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_reference_on_the_cpu(path, family):
    """fp32, outputs and gradients, padded on both sides; tests on the CPU hold that one to transformers'."""
    cpu = tiny_model(family).train()
    use_mixers(cpu)
    ours = copy.deepcopy(cpu).cuda()
    batch, mask = tokens(3, 40), torch.ones(3, 40, dtype=torch.long)
    mask[0, :11] = mask[1, 25:] = 0
    labels = batch.masked_fill(mask == 0, -100)
    actual = ours(batch.cuda(), attention_mask=mask.cuda(), labels=labels.cuda())
    actual.loss.backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.ENVIRONMENT_VARIABLE, "reference")
        expected = cpu(batch, attention_mask=mask, labels=labels)
        expected.loss.backward()
    assert relative_rms(actual.logits.cpu()[mask == 1], expected.logits[mask == 1]) < 1e-5
    gradients = {name: parameter.grad for name, parameter in cpu.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert relative_rms(parameter.grad, gradients[name]) < 2e-5, name


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_resumption(path, family, precision):
    ours = tiny_model(family).cuda()
    use_mixers(ours)
    tolerance = 1e-5 if precision is None else 2e-2 if precision == torch.bfloat16 else 3e-3
    batch, mask = tokens(3, 40).cuda(), torch.ones(3, 40, dtype=torch.long, device="cuda")
    mask[0, :7] = mask[1, 30:] = mask[2, 10:13] = 0
    with torch.no_grad(), torch.autocast("cuda", precision, enabled=precision is not None):
        padded = ours(batch, attention_mask=mask, use_cache=True)
        again = ours(batch[:, :5], cache_params=copy.deepcopy(padded.cache_params), use_cache=True)
        step = ours(batch[:, :1], cache_params=copy.deepcopy(padded.cache_params), use_cache=True)
        for row in range(3):
            real = batch[row : row + 1, mask[row] == 1]
            alone = ours(torch.cat([real, batch[row : row + 1, :5]], 1)).logits[0].float()
            assert relative_rms(padded.logits[row, mask[row] == 1], alone[:-5]) < tolerance
            assert relative_rms(again.logits[row], alone[-5:]) < tolerance
            assert relative_rms(step.logits[row, 0], alone[-5]) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_the_cpu(path, family):
    ours = tiny_model(family)
    use_mixers(ours)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(kernels.ENVIRONMENT_VARIABLE)
        expected = ours.generate(tokens(2, 8), max_new_tokens=8, do_sample=False)
    assert torch.equal(ours.cuda().generate(tokens(2, 8).cuda(), max_new_tokens=8, do_sample=False).cpu(), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_compile(path, family):
    ours = tiny_model(family).cuda().train()
    use_mixers(ours)
    batch = tokens().cuda()
    ours(batch, labels=batch).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in ours.named_parameters()}
    ours.zero_grad()
    torch.compile(ours)(batch, labels=batch).loss.backward()
    for name, parameter in ours.named_parameters():
        assert relative_rms(parameter.grad, expected[name]) < 1e-4, name
    torch.compiler.reset()


def test_the_best_there_is_runs_and_is_reported(monkeypatch):
    monkeypatch.delenv(kernels.ENVIRONMENT_VARIABLE, raising=False)
    model = tiny_model("mamba").cuda()
    use_mixers(model)
    assert report(model).kernels["kernels"] == "triton"
    assert "fastest" in report(model).kernels["reason"]
