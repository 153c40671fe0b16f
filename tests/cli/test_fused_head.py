"""The head of a model against TRL's: the same outputs and gradients, and TRL's own where the head is not frozen."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from lm_eval_mamba.cli import fused_head
from trl.trainer.utils import add_fused_lm_head as add_theirs

import peft_mamba

from ..peft_mamba.tiny import PRECISIONS, relative_rms, tiny_model, tokens

OUTPUTS = fused_head.SFT_OUTPUTS
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def adapted(family, outputs=OUTPUTS, **config):
    """One model twice, with TRL's head and with ours."""
    model = tiny_model(family)
    peft_mamba.use_mixers(model)
    config = peft_mamba.MambaLoraConfig(preset="sll", r=4, init_lora_weights=False, **config)
    theirs = peft.get_peft_model(model, config).train()
    ours = copy.deepcopy(theirs)
    add_theirs(theirs.get_base_model(), outputs=outputs)
    assert fused_head.add_fused_lm_head(ours, outputs=outputs)
    return theirs, ours


@pytest.fixture
def scored(monkeypatch):
    """Counts how often ours makes the scores."""
    calls = []
    made = fused_head.token_scores
    monkeypatch.setattr(fused_head, "token_scores", lambda *a, **k: calls.append(a) or made(*a, **k))
    return calls


def gradients(model, loss):
    wanted = [p for p in model.parameters() if p.requires_grad]
    return [g for g in torch.autograd.grad(loss, wanted, allow_unused=True) if g is not None]


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("ignored", "number"), [(0.0, None), (0.6, 7), (0.6, None), (1.0, None)])
def test_outputs_and_gradients_of_trls(family, precision, ignored, number, scored):
    theirs, ours = adapted(family)
    ids = tokens()
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < ignored, -100)
    ids, labels, made = ids.to(DEVICE), labels.to(DEVICE), []
    for model in (theirs, ours):
        dtype = PRECISIONS[precision]
        with torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
            out = model.to(DEVICE)(ids, labels=labels, fused_lm_head=True, num_items_in_batch=number)
        made.append((out, gradients(model, out.loss + (out.entropy * out.log_probs).sum() / 9)))
    (a, d_a), (b, d_b) = made
    assert len(scored) == 1 and type(a) is type(b)
    assert a.keys() == b.keys()
    tolerance = {"fp32": 1e-5, "fp16": 3e-3, "bf16": 2e-2}[precision]
    for name in a.keys():
        assert a[name].shape == b[name].shape and a[name].dtype == b[name].dtype
        assert torch.allclose(a[name].float(), b[name].float(), atol=tolerance), name
    assert len(d_a) == len(d_b)
    for x, y in zip(d_a, d_b, strict=True):
        assert relative_rms(y, x) < tolerance or not x.any() and not y.any()


def test_labels_that_are_shifted_and_outputs_that_are_not_asked_for(scored):
    theirs, ours = adapted("mamba", outputs=("log_probs",))
    ids = tokens()
    shifted = torch.where(torch.arange(20) % 3 > 0, ids, -100)
    a, b = (model(ids, shift_labels=shifted, fused_lm_head=True) for model in (theirs, ours))
    assert len(scored) == 1 and b.entropy is None and b.is_top1 is None
    assert b.log_probs.shape == ids.shape and torch.equal(a.label_mask, b.label_mask)
    assert torch.allclose(a.log_probs, b.log_probs, atol=1e-5) and torch.allclose(a.loss, b.loss)


@pytest.mark.parametrize("what", ["trained", "adapted", "hooked", "bias", "outputs", "family", "plain", "no labels"])
def test_where_trls_own_runs(what, scored):
    family = "gpt_neox" if what == "family" else "mamba"
    model = tiny_model(family)
    peft_mamba.use_mixers(model)
    model.requires_grad_(what == "trained")
    outputs = (*OUTPUTS, "mean_logits") if what == "outputs" else OUTPUTS
    assert fused_head.add_fused_lm_head(model, outputs=outputs) == (what not in ("outputs", "family"))
    top = model.get_output_embeddings()
    if what == "adapted":
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], r=2))
    elif what == "hooked":
        top.register_forward_hook(lambda *_: None)
    elif what == "bias":
        top.bias = torch.nn.Parameter(torch.zeros(64), requires_grad=False)
    ids = tokens()
    if what == "no labels":
        with pytest.raises(TypeError):
            model(ids, fused_lm_head=True)
    elif what == "plain":
        assert model(ids, labels=ids).logits.shape == (3, 20, 64)
    else:
        out = model(input_ids=ids, labels=ids, fused_lm_head=True)
        assert out.loss.isfinite() and (what != "outputs" or out.mean_logits is not None)
    assert not scored


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_generation_and_temperature(family, scored):
    theirs, ours = adapted(family)
    prompt = tokens(1, 5)
    with pytest.raises(ValueError, match="nonsense"):
        ours.eval().generate(prompt, max_new_tokens=1, nonsense=1)
    generated = [m.eval().generate(prompt, max_new_tokens=4, do_sample=False) for m in (theirs, ours)]
    assert torch.equal(*generated) and not scored
    base = ours.get_base_model()
    del base.forward
    fused_head.add_fused_lm_head(base, temperature=0.5)
    ids = tokens()
    with torch.no_grad():
        out = ours(ids, labels=ids, fused_lm_head=True)
        log_p = (ours(ids).logits[:, :-1] / 0.5).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert len(scored) == 1 and torch.allclose(out.log_probs, log_p, atol=1e-5)


def test_a_trained_head_has_its_gradient_also_while_nothing_else_is_trained(scored):
    """Full fine-tuning, and evaluation of it, where no gradient is wanted."""
    model = tiny_model("mamba2")
    peft_mamba.use_mixers(model)
    fused_head.add_fused_lm_head(model)
    ids = tokens()
    model(ids, labels=ids, fused_lm_head=True).loss.backward()
    assert model.get_output_embeddings().weight.grad.any() and not scored
    with torch.no_grad():
        model(ids, labels=ids, fused_lm_head=True)
    assert len(scored) == 1
