"""`mamba-study stability`, as typed."""

import json

import pytest
from click.testing import CliRunner
from lm_eval_mamba.cli.study import main

import peft_mamba  # noqa: F401  # registers its LoRA with PEFT, before the test makes an adapter
from peft_mamba import MambaLoraConfig
from peft_mamba.checkpoints import AutoMambaForCausalLM


def stability(*arguments):
    ran = CliRunner().invoke(main, ["stability", "--device", "cpu", *map(str, arguments)], env={"COLUMNS": "120"})
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return ran


@pytest.mark.parametrize("model, unit, units", [("mini", "channels", 128), ("mini-2", "heads", 8)])
def test_embedded_models(model, unit, units, tmp_path):
    output = tmp_path / "deep" / "report.json"
    ran = stability("--model", model, "--tokens", 40, "--output", output)
    assert ran.exit_code == 0, ran.output
    for text in (f"{model}: Lyapunov exponents", unit, "λ_max", "near 0", "off by 0.001", "fp16 logits", "bf16 state"):
        assert text in ran.output
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["model"]["source"] == model and report["peft"] is None
    assert report["text"]["source"] == "embedded" and report["text"]["tokens"] == 40
    assert report["exponents"]["unit"] == unit and len(report["exponents"]["layers"]) == 2
    for layer in report["exponents"]["layers"]:
        assert layer["units"] == units and layer["minimal"] < layer["quantiles"][1] < layer["maximal"] < 0
    assert [growth["precision"] for growth in report["growth"]] == ["fp32", "fp16", "bf16"]
    for growth in report["growth"]:
        assert growth["times"] == [1, 2, 4, 8, 16, 32, 40] and len(growth["output"]) == 7 and growth["output"][0] > 0
        assert [len(of_state) for of_state in growth["states"].values()] == [7, 7]


def test_file_adapter_and_one_precision(tiny, tmp_path):
    import peft

    text, adapter, reports = tmp_path / "text.txt", tmp_path / "adapter", []
    text.write_text("Ada met a wolf. " * 8, encoding="utf-8")
    adapted = peft.get_peft_model(
        AutoMambaForCausalLM.from_pretrained(str(tiny["mamba"])),
        MambaLoraConfig(target_modules=["x_proj"], r=1, init_lora_weights=False),
    )
    adapted.save_pretrained(adapter)
    for extra in ((), ("--peft", adapter)):
        output = tmp_path / f"{len(extra)}.json"
        ran = stability(
            "--model", tiny["mamba"], "--text", text, "--tokens", 32, "--precision", "bfloat16", "--precision", "bf16",
            "--epsilon", "0.01", "--output", output, *extra,
        )  # fmt: skip
        assert ran.exit_code == 0, ran.output
        reports.append(json.loads(output.read_text(encoding="utf-8")))
    plain, with_adapter = reports
    assert [growth["precision"] for growth in plain["growth"]] == ["bf16"]
    assert plain["text"]["source"] == str(text) and plain["perturbation"]["epsilon"] == 0.01
    assert with_adapter["peft"] == str(adapter)
    for before, after in zip(plain["exponents"]["layers"], with_adapter["exponents"]["layers"], strict=True):
        assert before["maximal"] != after["maximal"]


def test_what_overflows_is_null_in_the_report(tiny, tmp_path):
    import torch

    model = AutoMambaForCausalLM.from_pretrained(str(tiny["mamba2"]))
    with torch.no_grad():
        model.backbone.layers[1].mixer.in_proj.weight *= 1e7  # beyond fp16
    broken, text, output = tmp_path / "broken", tmp_path / "text.txt", tmp_path / "report.json"
    model.save_pretrained(broken)
    for file in tiny["mamba2"].glob("tokenizer*"):
        (broken / file.name).write_bytes(file.read_bytes())
    text.write_text("a wolf", encoding="utf-8")
    ran = stability("--model", broken, "--text", text, "--tokens", 6, "--precision", "fp16", "--output", output)
    assert ran.exit_code == 0 and "not finite" in ran.output
    assert None in json.loads(output.read_text(encoding="utf-8"))["growth"][0]["output"]


def test_errors_come_before_the_weights(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoMambaForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    short, bytes_ = tmp_path / "short.txt", tmp_path / "bytes.txt"
    short.write_text("a wolf", encoding="utf-8")
    bytes_.write_bytes(b"\xff\xfe\xff")
    for arguments, messages in (
        (("--model", tmp_path / "none"), ("none",)),
        (("--model", tiny["gpt_neox"], "--text", short), ("type gpt_neox", "Mamba", "Give one of these")),
        (("--model", tiny["mamba"]), ("needs --text FILE",)),
        (("--model", tiny["mamba"], "--text", short), ("has 6 tokens", "asks for 256", "--tokens 6")),
        (("--model", tiny["mamba"], "--text", bytes_), ("UTF-8", "plain text")),
        (("--model", "mini", "--text", tmp_path / "none"), ("does not exist",)),
        (("--model", "mini", "--epsilon", "0"), ("0 perturbs nothing", "above 0")),
        (("--model", "mini", "--epsilon", "-1"), ("-1 perturbs nothing",)),
        (("--model", "mini", "--epsilon", "nan"), ("nan perturbs nothing",)),
        (("--model", "mini", "--tokens", "1"), ("1 is not in the range",)),
        (("--model", "mini", "--precision", "fp8"), ("fp8 is not a precision", "Choose one of")),
        (("--model", "mini", "--device", "gpu"), ("cannot use 'gpu'", "give cpu")),
        (("--model", "mini", "--device", "meta"), ("holds no values",)),
        (("--model", "mini", "--peft", tmp_path), ("no PEFT adapter",)),
    ):
        ran = stability(*arguments)
        said = " ".join(ran.output.replace("│", " ").split())
        assert ran.exit_code != 0 and all(message in said for message in messages), (arguments, ran.output)
        assert "Traceback" not in ran.output
