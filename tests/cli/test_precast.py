"""--precast: where it can be had, and that what is learned and saved is the same to the bit."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lm_eval_mamba.cli import finetune, memory
from lm_eval_mamba.cli import model as models
from lm_eval_mamba.cli.settings import ModelFacts, SettingsError, resolve
from lm_eval_mamba.cli.trainer import MambaTrainer
from rich.console import Console
from safetensors.torch import load_file

from peft_mamba.mixers import mixers_of
from peft_mamba.precision import Precision

from .test_settings import PLAIN

HALF = {**PLAIN, "precision": "bf16"}


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_it_is_the_default_for_adapters_in_half_precision(family):
    facts = ModelFacts(family, 130_000_000)
    assert resolve(HALF, {}, facts).settings.precast is True
    assert resolve({**HALF, "precision": "fp16", "gradient_checkpointing": True}, {}, facts).settings.precast is True
    assert resolve({**HALF, "precast": False}, {}, facts).settings.precast is False
    assert resolve(PLAIN, {}, facts).settings.precast is None
    assert resolve({**HALF, "preset": "full"}, {}, facts).settings.precast is None
    assert resolve(HALF, {}, ModelFacts("gpt_neox", 160_000_000)).settings.precast is None


@pytest.mark.parametrize(
    ("given", "family", "said"),
    [
        ({"preset": "full"}, "mamba", "--preset full trains all"),
        ({"precision": "fp32"}, "mamba2", "--precision fp32 computes"),
        ({}, "gpt_neox", "this is gpt_neox"),
    ],
)
def test_where_it_would_do_nothing_it_is_refused(given, family, said):
    with pytest.raises(SettingsError, match=f"--precast: .*{said}"):
        resolve({**HALF, **given, "precast": True}, {}, ModelFacts(family, 130_000_000))


def test_it_decides_nothing_that_a_resumed_run_depends_on():
    facts = ModelFacts("mamba", 130_000_000)
    with_it, without = (resolve({**HALF, "precast": each}, {}, facts).settings for each in (True, False))
    assert with_it.differences({**vars(without)}) == []


@pytest.mark.parametrize(
    ("device", "processes", "asked", "used"),
    [("cuda", 1, True, True), ("cuda", 2, True, False), ("cuda", 1, False, False), ("cpu", 1, True, False)],
)
def test_it_is_for_one_gpu(monkeypatch, capsys, device, processes, asked, used):
    model = torch.nn.Linear(2, 2)
    entered = []

    def enter(model, dtype):
        entered.append((model, dtype))
        return ExitStack()

    monkeypatch.setattr(finetune, "precast_frozen_weights", enter)
    settings = resolve({**HALF, "precast": asked}, {}, ModelFacts("mamba", 130_000_000)).settings
    process = SimpleNamespace(device=torch.device(device), num_processes=processes)
    with ExitStack() as held:
        settings = finetune._with_precast(model, settings, process, Console(), held)
    assert entered == [(model, "bf16")] * used
    assert ("--precast: off, it is for one device" in capsys.readouterr().out) == (processes > 1)
    assert settings.precast is (asked and processes == 1)


@pytest.fixture
def on_a_cpu(monkeypatch):
    """As on a GPU; what mixers compute with in training is noted: kind of layer and dtype."""
    seen: set[tuple[str, torch.dtype]] = set()
    step = MambaTrainer.training_step

    def watch(self, model, *args, **kwargs):
        for _, mixer in mixers_of(model):
            weights = {name: getattr(layer, "weight", None) for name, layer in mixer.named_children()}
            seen.update((name, weight.dtype) for name, weight in weights.items() if weight is not None)
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(MambaTrainer, "training_step", watch)

    def switch(on):
        seen.clear()
        problem = None if on else "off"
        monkeypatch.setattr(finetune, "_no_precast", lambda process: problem)
        return seen

    return switch


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("model", "preset"), [("mini", "sll"), ("mini-2", "all")])
def test_the_same_is_learned_and_saved_and_gone_on_with(ft, tmp_path, on_a_cpu, model, preset, precision):
    arguments = ("--model", model, "--preset", preset, "--precision", precision, "--dropout", "0.1")
    arguments += ("--save-steps", "2", "--eval-steps", "2")
    results = []
    for on in (False, True):
        output, seen = tmp_path / str(on), on_a_cpu(on)
        status, said, figures = ft(*arguments, output=output)
        assert status == 0, said
        assert figures["settings"]["precast"] is True
        wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision] if on else torch.float32
        assert ("in_proj", wanted) in seen and ("conv1d", torch.float32) in seen and len(dict(seen)) == len(seen)
        losses = [entry.get("loss", entry.get("eval_loss")) for entry in figures["loss_history"]]
        results.append((losses, load_file(output / "adapter_model.safetensors")))
    (losses, weights), (others_losses, others) = results
    assert losses == others_losses and len(losses) == 4 + 3  # of every step; before, halfway, after
    assert weights.keys() == others.keys() and all(".lora_" in name for name in weights)
    assert all(torch.equal(each, others[name]) for name, each in weights.items())
    (output / "run.json").unlink()
    shutil.rmtree(output / "checkpoint-4")
    status, said, _ = ft("--resume", output=output, quick=False)
    assert status == 0 and "checkpoint-2" in said, said
    again = load_file(output / "adapter_model.safetensors")
    assert all(torch.equal(each, again[name]) for name, each in weights.items())


def test_on_a_cpu_it_is_refused(ft):
    status, said, _ = ft("--device", "cpu", "--precision", "bf16", "--precast")
    assert status == 1 and "--precast: this runs on cpu, in whose memory" in said


def test_the_estimate_counts_what_is_held_as_half(monkeypatch):
    settings = resolve({**HALF, "model": "mini"}, {}, ModelFacts("mamba", 110_000)).settings
    skeleton = models.skeleton({"model": "mini", "revision": None, "trust_remote_code": False})
    model, _ = models.with_adapter(skeleton, settings)
    monkeypatch.setattr(memory, "_kept", lambda *args: (0.0, 0.0))
    on, off, cpu = (
        memory.estimate(model, chosen, Precision.parse("bf16"), torch.device(device)).weights
        for chosen, device in ((settings, "cuda"), (replace(settings, precast=False), "cuda"), (settings, "cpu"))
    )
    held = sum(
        each.numel()
        for name, each in model.named_parameters()
        if each.ndim == 2 and not each.requires_grad and ".mixer." in name and "A_log" not in name
    )
    assert off == cpu == 4 * sum(each.numel() for each in model.parameters())
    assert off - on == 2 * held > 0
