"""Checkpoints that mamba_ssm itself saved, loaded by our class: the same logits as mamba_ssm's own model.

Also holds the float64 reference of the CPU tests against mamba_ssm, since those tests rest on it. Needs a GPU
and mamba-ssm with causal-conv1d. Each family runs in a process of its own, because in fp32 mamba_ssm's Triton
kernels multiply in TF32 (an error of 1e-3 of its own) unless TRITON_F32_DEFAULT says otherwise before they
are compiled.

    python -m pytest tests/gpu/test_original_checkpoints.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("causal_conv1d", exc_type=ImportError)
pytest.importorskip("mamba_ssm", exc_type=ImportError)

LENGTH = 100  # no multiple of the chunk size
SIZES = {"n_layer": 3, "vocab_size": 1000, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
CONFIGS = {  # sizes that the compiled kernels take: 8 heads, so that every stride is a multiple of 8
    "mamba": {**SIZES, "d_model": 128, "ssm_cfg": {}, "pad_vocab_size_multiple": 16},
    "mamba-untied": {
        **SIZES,
        "d_model": 128,
        "ssm_cfg": {"layer": "Mamba1", "bias": True},
        "tie_embeddings": False,
    },
    "mamba2": {**SIZES, "d_model": 256, "ssm_cfg": {"layer": "Mamba2", "chunk_size": 64}},
    "mamba2-groups": {
        **SIZES,
        "d_model": 256,
        "ssm_cfg": {"layer": "Mamba2", "chunk_size": 64, "ngroups": 2},
    },
}


# sys.argv[1] is this file; the current directory stays importable, as it is under `python -m pytest`
RUN = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_mamba_ssm(name, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", RUN, __file__, name, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_F32_DEFAULT": "ieee"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True, map_location="cpu")
    reference = reference_logits(CONFIGS[name], weights, result["ids"])
    for logits in (result["ours"], reference):
        assert error_of(logits, result["mamba_ssm"]) < 1e-5


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative RMS error, in float64; NaN fails the comparison that follows."""
    found, expected = found.double(), expected.double()
    assert found.shape == expected.shape
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()


def save_logits(name: str, directory: str) -> None:
    """Writes a checkpoint as mamba_ssm does, and result.pt: the input ids and the logits of both classes."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    from peft_mamba.checkpoints import AutoMambaForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    config = MambaConfig(**CONFIGS[name])
    theirs = MambaLMHeadModel(config, device="cuda", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms and D start at one, biases at zero: let each one count
            parameter += 0.1 * parameter.std().clamp(min=0.1) * torch.randn_like(parameter)
    theirs.save_pretrained(directory)

    ours = AutoMambaForCausalLM.from_pretrained(directory, device_map={"": "cuda:0"})
    assert {parameter.device for parameter in ours.parameters()} == {torch.device("cuda:0")}
    ids = torch.randint(0, config.vocab_size, (2, LENGTH), device="cuda")
    with torch.no_grad():
        result = {"ids": ids, "mamba_ssm": theirs(ids).logits, "ours": ours(ids, use_cache=False).logits}
    torch.save({key: value.cpu() for key, value in result.items()}, Path(directory) / "result.pt")


if __name__ == "__main__":
    save_logits(*sys.argv[2:])
else:
    from ..peft_mamba.original_reference import reference_logits
