"""Through every door of PEFT; bad input is refused by name before anything changes; other models are PEFT's."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import (
    PEFT_TYPE_TO_TUNER_MAPPING,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PeftType,
    get_peft_model,
)
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import AutoModelForCausalLM

from peft_mamba import MambaLoraConfig, TargetError, report
from peft_mamba.tuner import MambaLoraModel, register

from .tiny import gradients_reach, randomise_adapters, relative_rms, tiny_model, tokens

FAMILIES = ("mamba", "mamba2")


def logits(model, batch=None):
    with torch.no_grad():
        return model.eval()(tokens() if batch is None else batch).logits


def snapshot(model):
    """What must not change when an adapter is refused."""
    return [(name, type(module)) for name, module in model.named_modules()]


@pytest.fixture
def saved(tmp_path):
    """A base model and an adapter of it on disk, and what the two give together."""

    def save(family, **options):
        tiny_model(family).save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = get_peft_model(base, MambaLoraConfig(**{"preset": "all", "r": 2} | options))
        randomise_adapters(model)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter", logits(model)

    return save


class TestDoors:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_from_pretrained(self, family, saved):
        base, adapter, expected = saved(family)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(adapter)), expected)
        trainable = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)
        gradients_reach(trainable, tokens(), ("in_proj", "out_proj"))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_adapter_methods_of_transformers(self, family, saved):
        base, adapter, expected = saved(family)
        model = AutoModelForCausalLM.from_pretrained(base)
        model.load_adapter(str(adapter))
        assert torch.equal(logits(model), expected)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_plain_lora_config(self, family):
        """x_proj, dt_proj and out_proj through PEFT's own config: out_proj raises there, the others were dead."""
        kinds = {"mamba": ("x_proj", "dt_proj", "out_proj"), "mamba2": ("in_proj", "out_proj")}[family]
        model = get_peft_model(tiny_model(family), LoraConfig(target_modules=list(kinds), r=2))
        randomise_adapters(model)
        gradients_reach(model, tokens(), kinds)
        everything = get_peft_model(tiny_model(family), LoraConfig(target_modules="all-linear", r=2))
        assert len(everything.base_model.targeted_module_names) == {"mamba": 8, "mamba2": 4}[family]
        pattern = get_peft_model(tiny_model(family), LoraConfig(target_modules=r".*layers\.1.*\.(in|out)_proj", r=2))
        assert len(pattern.base_model.targeted_module_names) == 2

    @pytest.mark.parametrize("family", FAMILIES)
    def test_several_adapters(self, family):
        base = tiny_model(family)
        plain = logits(copy.deepcopy(base))
        model = get_peft_model(base, MambaLoraConfig(preset="all", r=2), adapter_name="first")
        model.add_adapter("second", MambaLoraConfig(preset="sll", r=3))
        randomise_adapters(model)
        outputs = {}
        for name in ("first", "second"):
            model.set_adapter(name)
            outputs[name] = logits(model)
            model.train()
            model.zero_grad()
            model(tokens(), labels=tokens()).loss.backward()
            for parameter_name, parameter in model.named_parameters():
                assert (parameter.grad is not None) == (f".{name}" in parameter_name), parameter_name
        assert relative_rms(outputs["first"], outputs["second"]) > 1e-3
        model.set_adapter("first")
        assert torch.equal(logits(model), outputs["first"])
        with model.disable_adapter():
            assert relative_rms(logits(model), plain) < 1e-5
        model.base_model.add_weighted_adapter(["first"], [1.0], "copy", combination_type="linear")
        model.set_adapter("copy")
        assert relative_rms(logits(model), outputs["first"]) < 1e-5
        model.delete_adapter("first")
        model.set_adapter("second")
        merged = model.merge_and_unload(adapter_names=["second"])
        assert relative_rms(logits(merged), outputs["second"]) < 1e-5

    def test_one_batch_with_several_adapters(self):
        model = get_peft_model(tiny_model("mamba"), MambaLoraConfig(preset="all", r=2))
        model.add_adapter("other", MambaLoraConfig(preset="all", r=2))
        randomise_adapters(model)
        expected = []
        for row, name in enumerate(("default", "other")):
            model.set_adapter(name)
            expected.append(logits(model)[row])
        names = ["default", "other", "__base__"]
        with torch.no_grad():
            mixed = model.eval()(tokens(), adapter_names=names).logits
        for row in range(2):
            assert relative_rms(mixed[row], expected[row]) < 1e-5

    @pytest.mark.parametrize("family", FAMILIES)
    def test_whole_modules_train_beside_it(self, family):
        """modules_to_save, of modules whose weights the mixer reads itself as well: conv1d, and dt_proj's bias."""
        whole = ["conv1d", "lm_head"] + (["dt_proj"] if family == "mamba" else [])
        model = get_peft_model(
            tiny_model(family, tie_word_embeddings=False),
            LoraConfig(target_modules=["in_proj"], r=2, modules_to_save=whole),
        )
        model.train()
        model(tokens(), labels=tokens()).loss.backward()
        copies = [name for name, p in model.named_parameters() if ".modules_to_save." in name]
        assert len({name.split(".modules_to_save.")[0].rpartition(".")[2] for name in copies}) == len(whole)
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                assert parameter.grad is not None and parameter.grad.any(), name

    def test_lm_eval(self, tiny, tmp_path):
        """lm-eval's own `peft=`, which cuts the embeddings to the tokenizer's 257 entries before it loads."""
        base = AutoModelForCausalLM.from_pretrained(tiny["mamba"])
        model = get_peft_model(base, MambaLoraConfig(preset="sll", r=2))
        randomise_adapters(model)
        model.save_pretrained(tmp_path)
        requests = [Instance("loglikelihood", {}, ("one two", " three"), 0)]
        common = {"device": "cpu", "dtype": "float32", "pretrained": str(tiny["mamba"])}
        scores = [HFLM(**common, **more).loglikelihood(requests) for more in ({"peft": str(tmp_path)}, {})]
        ids = torch.tensor([HFLM(**common).tok_encode("one two three")])
        expected = logits(model, ids)[0, 6:-1, :257].log_softmax(-1).gather(1, ids[0, 7:, None]).sum().item()
        assert scores[0][0][0] == pytest.approx(expected, rel=1e-5)
        assert scores[0][0][0] != pytest.approx(scores[1][0][0], rel=1e-3)

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_trl(self, family, checkpointing, tiny, tmp_path):
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(tiny[family]),
            args=SFTConfig(
                output_dir=str(tmp_path),
                max_steps=3,
                per_device_train_batch_size=2,
                learning_rate=1e-2,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=checkpointing,
                report_to=[],
                disable_tqdm=True,
                save_strategy="no",
            ),
            train_dataset=Dataset.from_list([{"text": "a" * (5 + i)} for i in range(8)]),
            processing_class=AutoTokenizer.from_pretrained(tiny[family]),
            peft_config=MambaLoraConfig(preset="sll", r=2),
        )
        before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        trainer.train()
        for name, parameter in trainer.model.named_parameters():
            assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
        assert report(trainer.model).mixers == 2


class TestRefused:
    """Before training, by name; and the model is left as it was."""

    @pytest.mark.parametrize(
        "family, options, message",
        [
            ("mamba", {"target_modules": ["conv1d", "in_proj"]}, r"layers\.0\.mixer\.conv1d .*modules_to_save"),
            ("mamba2", {"target_modules": r".*\.conv1d"}, r"layers\.0\.mixer\.conv1d cannot be adapted: its kernels"),
            ("mamba", {"target_modules": ["in_proj", "q_proj"]}, "mamba has no module q_proj"),
            ("mamba2", {"target_modules": ["x_proj", "in_proj"]}, "mamba2 has no module x_proj"),
            ("mamba", {"preset": "all", "r": 8}, r"dt_proj has rank 4 at most, and r=8.*rank_pattern=\{'dt_proj': 4\}"),
            ("mamba", {"preset": "w", "r": 21}, r"x_proj has rank 20 at most"),
            ("mamba2", {"preset": "sll", "r": 33}, r"embeddings has rank 32 at most"),
            ("mamba", {"preset": "w", "r": 2, "rank_pattern": {"x_proj": 30}}, "x_proj has rank 20 at most, and r=30"),
            ("mamba", {"target_modules": "all-linear", "r": 8}, "dt_proj has rank 4 at most"),
            (
                "mamba",
                {"target_parameters": ["A_log"], "target_modules": ["in_proj"]},
                r"target_parameters=\['A_log'\]",
            ),
            ("mamba", {"target_modules": ["norm"]}, r"layers\.0\.norm \(MambaRMSNorm\) cannot be adapted"),
        ],
    )
    def test_targets(self, family, options, message):
        model = tiny_model(family)
        before = snapshot(model)
        with pytest.raises(TargetError, match=message):
            get_peft_model(model, MambaLoraConfig(**options))
        assert snapshot(model) == before

    def test_a_trained_adapter_of_a_higher_rank_still_loads(self, tmp_path, monkeypatch):
        """As PEFT alone makes them; to go on training it is refused."""
        with monkeypatch.context() as patch:
            patch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.LORA, LoraModel)
            model = get_peft_model(tiny_model("mamba"), LoraConfig(target_modules=["x_proj"], r=30))
            randomise_adapters(model)
            model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model("mamba"), tmp_path)
        assert relative_rms(logits(loaded), logits(model)) < 1e-5
        with pytest.raises(TargetError, match="x_proj has rank 20 at most"):
            PeftModel.from_pretrained(tiny_model("mamba"), tmp_path, is_trainable=True)

    def test_a_rank_of_just_the_size_is_not(self):
        config = MambaLoraConfig(preset="all", r=32, rank_pattern={"dt_proj": 4, "x_proj": 20})
        ranks = {row.kind: row.ranks for row in report(get_peft_model(tiny_model("mamba"), config)).rows}
        assert ranks == {"in_proj": (32,), "x_proj": (20,), "dt_proj": (4,), "out_proj": (32,)}

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_quantised_base(self, family):
        class PackedLinear(nn.Module):
            """A quantised layer of a library that PEFT has no LoRA layer for."""

        model = tiny_model(family)
        model.backbone.layers[0].mixer.in_proj = PackedLinear()
        with pytest.raises(TargetError, match=r"layers\.0\.mixer\.in_proj \(PackedLinear\) cannot be adapted"):
            get_peft_model(model, LoraConfig(target_modules=["in_proj"], r=2))

    def test_a_weight_in_a_format_that_peft_does_not_know(self):
        class Int8Linear(nn.Linear):
            """A subclass that keeps integers where PEFT expects numbers."""

        model = tiny_model("mamba")
        for layer in model.backbone.layers:
            replaced = Int8Linear(64, 32, bias=False)
            replaced.weight = nn.Parameter(torch.zeros(32, 64, dtype=torch.int8), requires_grad=False)
            layer.mixer.out_proj = replaced
        with pytest.raises(TargetError, match=r"mixer\.out_proj.*quantised \(Int8Linear, torch\.int8\)"):
            get_peft_model(model, LoraConfig(target_modules=["out_proj"], r=2))

    @pytest.mark.parametrize(
        "made_on, loaded_on, message",
        [
            (("mamba", {}), ("mamba2", {}), "mamba2 has no module dt_proj, x_proj"),
            (("mamba", {"num_hidden_layers": 3}), ("mamba", {}), r"no layer: .*layers\.2\.mixer"),
            (("mamba", {}), ("mamba", {"num_hidden_layers": 3}), r"lacks weights of layers.*layers\.2\.mixer"),
            (("mamba", {}), ("mamba", {"state_size": 4}), r"x_proj\.lora_B.*\(20, 2\), the model's layer \(12, 2\)"),
        ],
    )
    def test_an_adapter_that_does_not_fit(self, made_on, loaded_on, message, tmp_path):
        family, config = made_on
        get_peft_model(tiny_model(family, **config), MambaLoraConfig(preset="all", r=2)).save_pretrained(tmp_path)
        family, config = loaded_on
        with pytest.raises(TargetError, match=message):
            PeftModel.from_pretrained(tiny_model(family, **config), tmp_path)

    @pytest.mark.parametrize(
        "made_for, loaded_on, options",
        [(200, 64, {}), (64, 72, {}), (64, 60, {"use_dora": True})],
        ids=["another one", "a larger one", "dora"],
    )
    def test_an_adapter_for_another_vocabulary(self, made_for, loaded_on, options, tmp_path):
        """Rows are cut for padding only: not so many, not where some are missing, not under norms over all of them."""
        config = MambaLoraConfig(target_modules=["embeddings"], r=2, **options)
        get_peft_model(tiny_model("mamba", vocab_size=made_for), config).save_pretrained(tmp_path)
        with pytest.raises(TargetError, match="lora_embedding_A"):
            PeftModel.from_pretrained(tiny_model("mamba", vocab_size=loaded_on), tmp_path)


class TestOtherModels:
    """Exactly as with PEFT alone."""

    @pytest.mark.parametrize("preset", ["all", "sll"])
    def test_pythia(self, preset, monkeypatch):
        adapted = {}
        for tuner in (MambaLoraModel, LoraModel):
            monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.LORA, tuner)
            config = MambaLoraConfig(preset=preset, r=2).resolve(tiny_model("gpt_neox"))
            torch.manual_seed(0)
            adapted[tuner] = get_peft_model(tiny_model("gpt_neox"), config)
            randomise_adapters(adapted[tuner])
        ours, theirs = adapted.values()
        assert torch.equal(logits(ours), logits(theirs))
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert torch.equal(logits(ours.merge_and_unload()), logits(theirs.merge_and_unload()))

    def test_peft_alone_decides_what_they_may_adapt(self):
        """A rank above the size and a name without a module pass there, as they do without this package."""
        config = LoraConfig(target_modules=["dense", "nowhere"], r=64)
        assert report(get_peft_model(tiny_model("gpt_neox"), config)).trainable
        with pytest.raises(ValueError, match="not found in the base model"):
            get_peft_model(tiny_model("gpt_neox"), LoraConfig(target_modules=["nowhere"]))

    def test_a_module_that_is_no_transformers_model(self):
        model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], r=2))
        assert type(model.base_model) is MambaLoraModel and model(torch.ones(1, 4)).shape == (1, 4)


def test_registering_is_said_when_it_takes_another_plugins_place(monkeypatch, caplog):
    class Elsewhere(LoraModel):
        pass

    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is MambaLoraModel
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.LORA, Elsewhere)
    with caplog.at_level(logging.WARNING):
        register()
    assert "takes the place of" in caplog.text and PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is MambaLoraModel
