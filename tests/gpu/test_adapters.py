"""The table of adapters on a GPU, with mamba-ssm installed and without it, in every precision.

python -m pytest tests/gpu/test_adapters.py
"""

from __future__ import annotations

import contextlib

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from peft_mamba import kernels, report, use_mixers

from ..peft_mamba.tiny import ADAPTERS, PRECISIONS, gradients_reach, relative_rms, tiny_model, tokens

each_adapter = pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)


@pytest.fixture(params=PRECISIONS)
def precision(request):
    """A context to run the model in."""
    dtype = PRECISIONS[request.param]
    return request.param, lambda: torch.autocast("cuda", dtype) if dtype else contextlib.nullcontext()


def logits(model, autocast):
    with torch.no_grad(), autocast():
        return model.eval()(tokens().cuda()).logits.float()


@each_adapter
def test_gradients_reach_all_of_it_and_nothing_else(adapter, path, precision):
    model = adapter.on(tiny_model(adapter.family).cuda())
    with precision[1]():
        gradients_reach(model, tokens().cuda(), adapter.kinds)
    assert report(model).kernels["kernels"] == path


@each_adapter
def test_equals_the_cpu(adapter, path):
    """fp32 logits and adapter gradients against the same model on the CPU, where tests hold it to transformers."""
    results = []
    for device, forced in (("cpu", "torch"), ("cuda", path)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(kernels.ENVIRONMENT_VARIABLE, forced)
            model = adapter.on(tiny_model(adapter.family).to(device)).train("dropout" not in adapter.name)
            batch = tokens().to(device)
            out = model(batch, labels=batch, use_cache=False)
            out.loss.backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            results.append({"logits": out.logits, **gradients})
    for name, expected in results[0].items():
        assert relative_rms(results[1][name], expected) < 5e-5, name


@each_adapter
def test_merged_disabled_and_trained_are_one_model(adapter, path, precision):
    name, autocast = precision
    tolerance = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2}[name]
    base = tiny_model(adapter.family).cuda()
    use_mixers(base)
    plain = logits(base, autocast)
    model = adapter.on(base)
    adapted = logits(model, autocast)
    assert relative_rms(adapted, plain) > 1e-5
    with model.disable_adapter():
        assert relative_rms(logits(model, autocast), plain) < tolerance
    if "dropout" not in adapter.name:
        with torch.no_grad(), autocast():
            assert relative_rms(model.train()(tokens().cuda()).logits, adapted) < tolerance
    assert relative_rms(logits(model.merge_and_unload(), autocast), adapted) < tolerance


@pytest.mark.parametrize(
    "adapter", [row for row in ADAPTERS if row.name.endswith(("-all", "-sll", "-dora"))], ids=lambda row: row.name
)
def test_training_lowers_the_loss(adapter, path, precision):
    model = adapter.on(tiny_model(adapter.family).cuda()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    scaler = torch.amp.GradScaler("cuda", enabled=precision[0] == "fp16")
    losses = []
    for _ in range(15):
        with precision[1]():
            loss = model(tokens().cuda(), labels=tokens().cuda()).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
