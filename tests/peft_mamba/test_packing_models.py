"""The boundaries of packed documents reach the mixers, whatever is around a model and whatever comes with them."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

from peft_mamba import kernels, use_mixers
from peft_mamba.mixers import packing, packing_support, state
from peft_mamba.mixers.state import number_documents

from .test_packing import (
    EXAMPLES,
    FAMILIES,
    IMPLEMENTATIONS,
    documents,
    gradients,
    logits_apart,
    loss_apart,
    packed,
    trained,
    without,
)
from .tiny import relative_rms, tiny_model, tokens

ROWS = [[3, 1, 16], [12, 8]]


@pytest.fixture(params=FAMILIES)
def model(request):
    model = tiny_model(request.param)
    use_mixers(model)
    return model


@pytest.mark.parametrize("given_as", ["seq_idx", "position_ids"])
def test_padding_between_and_inside_documents(model, given_as):
    """Padding has any number or position: beside a document its own or another's, inside it one that looks new."""
    batch = packed(ROWS)
    mask = torch.ones(2, 27, dtype=torch.long)
    mask[0, [0, 1, 5, 9, 10, 25, 26]] = mask[1, [4, 5, 6, 7, 8, 9, 26]] = 0

    def spread(x, filler):
        return torch.full((2, 27), filler, dtype=x.dtype).masked_scatter(mask == 1, x)

    numbers = spread(batch[given_as], -1 if given_as == "seq_idx" else 0)
    with torch.no_grad():
        out = model(spread(batch["input_ids"], 0), attention_mask=mask, use_cache=True, **{given_as: numbers})
        assert relative_rms(out.logits[mask == 1], logits_apart(model, ROWS, batch["input_ids"])) < 1e-5
        last = model(batch["input_ids"][:1, 4:], use_cache=True).cache_params
        for layer in range(2):
            state = out.cache_params.get_recurrent_state(layer)[:1]
            assert relative_rms(state, last.get_recurrent_state(layer)) < 1e-5


def test_a_cache_holds_the_last_document_and_the_first_goes_on_from_it(model):
    """Also from a document shorter than the convolution's window."""
    rows = [[17, 1, 2], [15, 5]]
    batch, more = packed(rows), packed([[4, 6], [1, 9]], seed=1)
    with torch.no_grad():
        cache = model(batch["input_ids"], seq_idx=batch["seq_idx"], use_cache=True).cache_params
        on = model(more["input_ids"], seq_idx=more["seq_idx"] + 7, cache_params=cache, use_cache=True)
        after = model(more["input_ids"][:, :1], cache_params=on.cache_params, use_cache=True).logits
        ids = torch.cat([batch["input_ids"], more["input_ids"], more["input_ids"][:, :1]], dim=1)
        alone = logits_apart(model, [[17, 1, 6, 7], [15, 6, 10]], ids)
    expected = torch.cat([alone[:31][20:30], alone[31:][20:30], alone[30:31], alone[61:]])
    assert relative_rms(torch.cat([on.logits[0], on.logits[1], after[:, 0]]), expected) < 1e-5


def test_what_cannot_be_right_is_refused(model):
    batch = without(packed(ROWS), "labels")
    for wrong in (batch["seq_idx"][:1], batch["seq_idx"][:, 1:], batch["seq_idx"][0]):
        with pytest.raises(ValueError, match=r"seq_idx has shape \(.*\(2, 20\) tokens"):
            model(batch["input_ids"], seq_idx=wrong)
        with pytest.raises(ValueError, match=r"seq_idx has shape .* \(2, 20\)"):
            model.backbone(batch["input_ids"], seq_idx=wrong)
        with pytest.raises(ValueError, match=r"seq_idx has shape .* \(2, 20\)"):
            model.backbone.layers[0].mixer(torch.randn(2, 20, 32), seq_idx=wrong)
    with pytest.raises(ValueError, match=r"position_ids have shape \(2, 19\).*\(2, 20\) tokens"):
        model(batch["input_ids"], position_ids=batch["position_ids"][:, 1:])
    with torch.no_grad():
        first = model(batch["input_ids"], use_cache=True)
        onward = model(
            batch["input_ids"], position_ids=20 + torch.arange(20)[None], cache_params=copy.deepcopy(first.cache_params)
        )
        assert torch.equal(
            onward.logits, model(batch["input_ids"], cache_params=copy.deepcopy(first.cache_params)).logits
        )
        with pytest.raises(ValueError, match="position_ids restart at 0"):
            model(**without(batch, "seq_idx"), cache_params=first.cache_params)


def test_one_row_of_positions_serves_all_rows_and_positions_that_never_restart_pack_nothing(model):
    ids, positions = tokens(2, 20), torch.tensor([[*range(8), *range(12)]])
    with torch.no_grad():
        out = model(ids, position_ids=positions).logits.flatten(0, 1)
        assert relative_rms(out, logits_apart(model, [[8, 12]] * 2, ids)) < 1e-5
        assert relative_rms(model(ids, position_ids=torch.arange(20)[None]).logits, model(ids).logits) < 1e-6


def test_arguments_by_position(model):
    batch = packed(ROWS)
    ids, seq_idx, mask = batch["input_ids"], batch["seq_idx"], torch.ones(2, 20, dtype=torch.long)
    mask[:, -1] = 0
    # Where transformers has attention_mask differs between the two.
    before = () if model.config.model_type == "mamba" else (None,) * 6
    with torch.no_grad():
        hidden = model.backbone(ids, None, None, False, None, None, mask, seq_idx=seq_idx)[0]
        expected = logits_apart(model, ROWS, ids)[(mask == 1).flatten()]
        for logits in (model(ids, *before, mask, seq_idx=seq_idx).logits, model.lm_head(hidden)):
            assert relative_rms(logits[mask == 1], expected) < 1e-5


def test_numbers_of_documents():
    numbers = torch.tensor([[5, 5, -1, -1, 5, 5], [0, 1, 2, 2, 9, 9]])
    assert number_documents(numbers, None).tolist() == [[0, 0, 1, 1, 2, 2], [0, 1, 2, 2, 3, 3]]
    assert number_documents(numbers, torch.tensor([4, 0])).tolist() == [[0, 0, 1, 1, 1, 1], [0] * 6]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_recomputes_with_its_own_documents(family, reentrant):
    """Two forwards of different packings, then their backwards: also with a checkpoint wrapped around each layer."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    rows = [[5, 1, 14]], [[11, 9]]
    model, exact = trained(family, "full")
    expected = [gradients(exact, loss_apart(exact, documents(packed(row)["input_ids"], row))) for row in rows]
    model = copy.deepcopy(model)
    for wrap in (False, True):
        if wrap:
            model.gradient_checkpointing_disable()
            layers = model.backbone.layers
            model.backbone.layers = nn.ModuleList(
                checkpoint_wrapper(layer, preserve_rng_state=False) for layer in layers
            )
        else:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        losses = [model(**packed(row)).loss for row in rows]
        for loss, reference in zip(losses, expected, strict=True):
            actual = gradients(model, loss)
            for (name, gradient), other in zip(actual.items(), reference.values(), strict=True):
                assert relative_rms(gradient, other) < 1e-5, name


def test_a_model_stays_itself(model, tmp_path):
    """Names, weights, configuration; one hook a model class however often asked; copies and pickles pack alike."""
    plain = tiny_model(model.config.model_type)
    use_mixers(model)
    assert sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()) == 2
    assert list(model.state_dict()) == list(plain.state_dict())
    for each, name in ((model, "ours"), (plain, "theirs")):
        each.save_pretrained(tmp_path / name)
    assert (tmp_path / "ours/config.json").read_text() == (tmp_path / "theirs/config.json").read_text()
    batch = packed(ROWS)
    with torch.no_grad():
        expected = model(**batch).logits
        assert relative_rms(model(batch["input_ids"]).logits, expected) > 0.05
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(**batch).logits, expected)


def test_packs_under_hooks_of_a_model_spread_over_devices(model):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    batch = packed(ROWS)
    expected = logits_apart(model, ROWS, batch["input_ids"])
    for module in (*model.backbone.layers, model.backbone, model):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    with torch.no_grad():
        assert relative_rms(model(**batch).logits.flatten(0, 1), expected) < 1e-5


def test_packs_when_compiled():
    model = tiny_model("mamba", num_hidden_layers=1)  # tracing takes seconds a family, and its hooks do the most
    use_mixers(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        batch = without(packed(ROWS), "labels", "position_ids")
        out = compiled(**batch, use_cache=False).logits
        assert relative_rms(out.flatten(0, 1), logits_apart(model, ROWS, batch["input_ids"])) < 1e-5
    torch.compiler.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_packs_when_distributed(family, tmp_path):
    """DDP, and FSDP2 with its classes made of ours, recomputing in backward: gradients as without."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    batch = packed(EXAMPLES[1])
    model, exact = trained(family, "full")
    expected = gradients(exact, loss_apart(exact, documents(batch["input_ids"], EXAMPLES[1])))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        replica, sharded = copy.deepcopy(model), copy.deepcopy(model)
        sharded.gradient_checkpointing_enable()
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for layer in sharded.backbone.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        assert packing_support(sharded) is None
        for wrapped, inner in ((DistributedDataParallel(replica), replica), (sharded, sharded)):
            wrapped(**batch).loss.backward()
            for name, parameter in inner.named_parameters():
                gradient = getattr(parameter.grad, "full_tensor", lambda of=parameter: of.grad)()
                assert relative_rms(gradient, expected[name]) < 1e-5, name
    finally:
        torch.distributed.destroy_process_group()


def test_packing_support_asks_the_kernels(model, monkeypatch):
    assert packing_support(model) is None and packing_support(nn.ModuleList([model])) is None
    for name in IMPLEMENTATIONS:
        monkeypatch.setenv(kernels.ENVIRONMENT_VARIABLE, name)
        assert packing_support(model, "cuda") is None
    monkeypatch.setenv(kernels.ENVIRONMENT_VARIABLE, "mamba_ssm")
    assert "'mamba_ssm' were asked for by name but cannot run" in packing_support(model)
    assert "runs transformers' own mixers" in packing_support(tiny_model(model.config.model_type))
    assert "GPTNeoXForCausalLM has no Mamba" in packing_support(tiny_model("gpt_neox"))

    def unpacked(x, weight, bias=None, *, activation=None, initial_state=None):
        return x

    chosen = kernels.select("cpu", "torch")
    monkeypatch.setattr(kernels, "select", lambda device: dataclasses.replace(chosen, causal_conv1d=unpacked))
    assert (
        packing_support(model)
        == "The torch kernels for cpu cannot keep packed documents apart: causal_conv1d mixes them."
    )


@pytest.mark.parametrize("given_as", ["seq_idx", "position_ids"])
def test_documents_are_laid_end_to_end_once_a_forward(model, given_as, monkeypatch):
    """Not in every mixer, since the host waits for it; scans get one row of sequences, which they run side by side."""
    found, scans, scan = [], [], kernels.selective_scan
    laid_end_to_end = packing.laid_end_to_end

    def watched_scan(u, *args, **kwargs):
        scans.append((u.shape[:2], kwargs))
        return scan(u, *args, **kwargs)

    def watched_search(seq_idx):
        found.append(laid_end_to_end(seq_idx))
        return found[-1]

    monkeypatch.setattr(kernels, "selective_scan", watched_scan)
    monkeypatch.setattr(packing, "laid_end_to_end", watched_search)
    batch = packed(ROWS)
    logits = model(batch["input_ids"], use_cache=False, **{given_as: batch[given_as]}).logits
    assert relative_rms(logits.flatten(0, 1), logits_apart(model, ROWS, batch["input_ids"])) < 1e-5
    ((numbers, bounds),) = found
    assert bounds.tolist() == [0, 3, 4, 20, 32, 40] and bounds.dtype == torch.int32
    assert numbers[:, -1].tolist() == [2, 1]
    for shape, rows in scans[:2]:
        assert shape == (1, 40) and rows["cu_seqlens"] is bounds and "seq_idx" not in rows
    scans.clear()
    model(batch["input_ids"], use_cache=True, **{given_as: batch[given_as]})  # a cache holds the state of each row
    assert len(found) == 1 and all(shape == (2, 20) and rows["cu_seqlens"] is None for shape, rows in scans)


@pytest.mark.parametrize("padding", ["none", "right", "left", "hole", "cached right"])
def test_a_mask_that_changes_nothing_is_spared_the_layers(model, padding, monkeypatch):
    """Right padding is behind all that is computed, unless a state is left behind it."""
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    start = {"none": 12, "right": 9, "cached right": 9, "left": 0, "hole": 4}[padding]
    mask[0, start : start + 3] = 0
    real = torch.where(mask[0] == 1)[0]
    orders = []
    monkeypatch.setattr(state.RowOrder, "of", lambda *args, of=state.RowOrder.of: orders.append(1) or of(*args))
    logits = model(ids, attention_mask=mask, use_cache=padding == "cached right").logits
    assert len(orders) == (0 if padding in ("none", "right") else 2)
    assert relative_rms(logits[0, real], model(ids[:1, real], use_cache=False).logits[0]) < 1e-5
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(ids, attention_mask=torch.tensor([[1, 1, 0]] * 2), use_cache=False)
