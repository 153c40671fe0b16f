"""Training on a GPU: the norms' kernels, linear layers in half precision, and what each level of recomputation costs.

python -m pytest tests/gpu/test_training.py
"""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from peft import get_peft_model

from peft_mamba import MambaLoraConfig, precast_frozen_weights, use_cuda_graphs, use_mixers
from peft_mamba.kernels import ENVIRONMENT_VARIABLE, fused, norm
from peft_mamba.mixers import LEVELS, product, projection, recompute
from peft_mamba.mixers.projection import project

from ..peft_mamba.test_projection import adapted, run, through_and_beside
from ..peft_mamba.test_recompute import TRAINED, step, trained
from ..peft_mamba.tiny import PRECISIONS, randomise_adapters, relative_rms, tiny_model, tokens

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weight_grad", [True, False])
@pytest.mark.parametrize(
    ("size", "group", "rows", "gated", "residual"),
    [
        (1536, 1536, 4097, False, False),
        (2560, 2560, 300, False, True),
        (48, 48, 1, False, True),
        (3072, 3072, 1000, True, False),
        (5120, 2560, 77, True, False),
        (130, 65, 33, True, False),
        (64, 64, 0, True, False),
    ],
)
def test_rms_norm_against_float64(size, group, rows, gated, residual, weight_grad, dtype):
    if fused.kernels(norm.KERNELS) is None:
        pytest.skip("Triton is not installed")
    x = torch.randn(rows, size, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(size, device="cuda", requires_grad=weight_grad)
    # A part of a wider tensor, as in_proj gives it.
    wide = torch.randn(rows, 2 * size, device="cuda").to(dtype)
    gate = wide[:, size:].requires_grad_() if gated else None
    dy, dr = torch.randn(rows, size, device="cuda"), torch.randn(rows, size, device="cuda")

    def function(x, weight, gate):
        out = dtype if x.dtype == dtype else torch.float64
        if residual:
            y, same = norm.rms_norm_residual(x, weight, 1e-5, out_dtype=out)
        else:
            y, same = norm.rms_norm(x, weight, 1e-5, gate=gate, group_size=group, out_dtype=out), x
        inputs = [each for each in (x, weight, gate) if each is not None and each.requires_grad]
        gradients = torch.autograd.grad(
            [y, same * 1], inputs, [dy.to(y.dtype), (dr if residual else dr * 0).to(x.dtype)]
        )
        return [y, *gradients]

    actual = function(x, weight, gate)
    double = [
        None if each is None else each.detach().double().requires_grad_(each.requires_grad)
        for each in (x, weight, gate)
    ]
    for mine, expected in zip(actual, function(*double), strict=True):
        assert mine.shape == expected.shape
        assert relative_rms(mine, expected) < TOLERANCE[dtype] or not expected.any()


@pytest.mark.parametrize("sizes", [None, (16, 16, 8)])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("options", [{}, {"adapters": 2}], ids=["one", "two"])
def test_linear_layers_against_float64(options, precision, sizes):
    layer = adapted(**options).cuda()
    x, dy = torch.randn(2, 9, 24, device="cuda"), torch.randn(2, 9, 40, device="cuda")
    y64, expected = run(layer.double(), x.double(), dy.double(), ours=False)
    layer.float()
    with torch.autocast("cuda", PRECISIONS[precision]):
        y, gradients = run(layer, x, dy, ours=True, sizes=sizes)
    assert relative_rms(y, y64) < 1e-2
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32 and relative_rms(gradient, expected[name]) < 1e-2, name
    assert project(layer, x[:, :0]).shape == (2, 0, 40)


@pytest.mark.parametrize("size", [(24, 40, 18), (3072, 128, 8192)], ids=["small", "x_proj"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_one_kernel_makes_the_gradient_of_an_input_that_is_read_twice(precision, size, monkeypatch):
    kernels = fused.kernels("products_triton") or pytest.skip("Triton is not installed")
    calls, add_products = [], kernels.add_products
    monkeypatch.setattr(kernels, "add_products", lambda *args: calls.append(len(args)) or add_products(*args))
    width, out, rows = size
    layer = adapted(base=torch.nn.Linear(width, out)).cuda()
    x, d_same = (torch.randn(rows, width, device="cuda").to(PRECISIONS[precision]) for _ in range(2))
    dy = torch.randn(rows, out, device="cuda")
    expected = through_and_beside(layer.double(), x.double(), dy.double(), d_same.double(), ours=False)
    with torch.autocast("cuda", PRECISIONS[precision]):
        gradients = through_and_beside(layer.float(), x, dy, d_same, ours=True)
    assert calls == [3]  # the other gradient, the layer's product and the adapter's
    for name, gradient in gradients.items():
        assert relative_rms(gradient, expected[name]) < 1e-2, name
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    with torch.autocast("cuda", PRECISIONS[precision]):
        again = through_and_beside(layer, x, dy, d_same, ours=True)
    assert len(calls) == 1 and relative_rms(again["x"], expected["x"]) < 1e-2


@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize("columns", [(3072, 3072), (1536,), (130,)], ids=["in_proj", "out_proj", "small"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_products_of_a_gradient_at_the_sizes_of_a_model(columns, rank, dtype):
    kernels = fused.kernels("products_triton") or pytest.skip("Triton is not installed")
    rows, total = 8191, sum(columns)
    g, up, t = (torch.randn(n, m, device="cuda").to(dtype) for n, m in ((rows, total), (total, rank), (rows, rank)))
    parts = list(zip((each.contiguous() for each in g.split(columns, dim=1)), up.split(columns), strict=True))
    q, d = kernels.from_both_sides(parts, t, 2.0, torch.float32)
    assert relative_rms(q, g.double() @ up.double()) < TOLERANCE[dtype]
    assert relative_rms(d, 2 * g.double().t() @ t.double()) < 1e-5
    assert all(map(torch.equal, kernels.from_both_sides(parts, t, 2.0, torch.float32), (q, d)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_every_level_trains_the_same(family, kind, precision, path):
    model = trained(family, kind).cuda()
    batch = {"input_ids": tokens().cuda(), "labels": tokens().cuda()}

    def run_step():
        model.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        with torch.autocast("cuda", PRECISIONS[precision], enabled=precision != "fp32"):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}

    recompute(model, "none")
    expected = run_step()
    for level in LEVELS[1:]:
        recompute(model, level)
        for name, gradient in run_step().items():
            # Atomic sums in mamba-ssm's backward, rounded to half precision further up.
            assert relative_rms(gradient, expected[name]) < (1e-4 if precision == "fp32" else 1e-2), (level, name)


def test_the_cpu_trains_the_same():
    _, _, expected = step(trained("mamba2", "sll"))
    model = trained("mamba2", "sll").cuda()
    _, _, gradients = step(model, input_ids=tokens().cuda(), labels=tokens().cuda())
    for name, gradient in gradients.items():
        assert relative_rms(gradient, expected[name]) < 1e-4, name


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_each_level_takes_less_memory(family, path):
    own = {"num_heads": 16, "head_dim": 64, "state_size": 64, "n_groups": 1} if family == "mamba2" else {}
    model = tiny_model(family, hidden_size=512, num_hidden_layers=12, vocab_size=512, **own).cuda()
    use_mixers(model)
    model.train().requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    ids = torch.randint(1, 500, (8, 512), device="cuda")
    peaks = []
    for level in LEVELS:
        recompute(model, level)
        for _ in range(2):  # the first one tunes kernels, with memory of its own
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model.backbone(input_ids=ids, use_cache=False).last_hidden_state.square().mean()
            loss.backward()
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
    # Beside what PyTorch alone needs within one layer, what `mixer` saves is little.
    assert peaks[0] > (1.0 if path == "torch" else 1.15) * peaks[1] and peaks[1] > 1.5 * peaks[2], peaks


@pytest.mark.parametrize("how", ["", "precast", "graphs"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_the_input_gradient_of_an_adapted_layer_is_one_product(family, level, how, monkeypatch):
    """Of in_proj and out_proj, for whose outputs' gradients the kernels find the place; against a product each."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")

    def gradients(one_product):
        calls = []
        with monkeypatch.context() as patch:
            above = product._above
            patch.setattr(product, "_above", lambda *args: calls.append(args) or above(*args))
            if not one_product:
                patch.setattr(projection, "useful", lambda *_: False)
                patch.setattr(product, "_reads_once", lambda *_: False)
            own = {"num_heads": 16, "n_groups": 1} if family == "mamba2" else {}
            model = tiny_model(family, hidden_size=128, **own)
            model = get_peft_model(model, MambaLoraConfig(r=16, lora_alpha=32, preset="sll")).cuda().train()
            randomise_adapters(model)
            recompute(model, level)
            if how == "graphs":
                use_cuda_graphs(model)
            ids = tokens(4, 32).cuda()
            for _ in range(4 if how == "graphs" else 1):
                model.zero_grad()
                with torch.autocast("cuda", torch.float16):
                    if how == "precast":
                        with precast_frozen_weights(model, "fp16"):
                            model(input_ids=ids, labels=ids, use_cache=False).loss.mul(64).backward()
                    else:
                        model(input_ids=ids, labels=ids, use_cache=False).loss.mul(64).backward()
        return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}, len(calls)

    mine, calls = gradients(True)
    expected, none = gradients(False)
    times = 3 if how == "graphs" else 1  # two steps, and one that is captured
    assert (calls, none) == (4 * times, 0)
    for name, gradient in expected.items():
        assert relative_rms(mine[name], gradient) < 1e-2, name
