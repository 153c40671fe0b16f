"""Documents packed into rows are what they are apart, on a GPU, with mamba-ssm installed and without it.

python -m pytest tests/gpu/test_packing.py
"""

from __future__ import annotations

import copy

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from peft_mamba import kernels, report
from peft_mamba.mixers import packing_support

from ..peft_mamba.test_packing import EXAMPLES, MODELS, assert_equal, documents, packed, trained
from ..peft_mamba.tiny import tokens

# Also documents longer than the 256 tokens of a chunk of mamba-ssm's SSD.
ROWS = (*EXAMPLES, [[300, 1, 2, 97], [128, 128, 144]])
TOLERANCE = {"fp32": 1e-5, "bf16": 0.1}


@pytest.fixture(autouse=True)
def true_float32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(name: str, training: str):
    """The model on the GPU, and the same in float64 on the CPU, where other tests hold it to transformers."""
    model, exact = trained(name, training)
    return copy.deepcopy(model).cuda(), exact


@pytest.mark.parametrize("given_as", ["seq_idx", "position_ids"])
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("training", ["full", "sll"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_is_apart(path, name, training, precision, rows, given_as):
    model, exact = on_gpu(name, training)
    assert packing_support(model) is None and report(model).kernels["kernels"] == path
    batch = packed(rows)
    inputs = {name: tensor.cuda() for name, tensor in batch.items() if name in ("input_ids", "labels", given_as)}
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        loss = model(**inputs).loss
    alone = documents(batch["input_ids"], rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.ENVIRONMENT_VARIABLE, "torch")
        assert_equal(model, loss, exact, alone, TOLERANCE[precision])


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", MODELS)
def test_packed_by_trl_is_apart(path, name, precision):
    model, exact = on_gpu(name, "sll")
    add_fused_lm_head(model.get_base_model())
    lengths = ROWS[-1][0]
    alone = list(tokens(1, sum(lengths)).split(lengths, dim=1))
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(
        [{"input_ids": ids[0].tolist()} for ids in alone]
    )
    inputs = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        loss = model(**inputs, fused_lm_head=True, use_cache=False).loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(kernels.ENVIRONMENT_VARIABLE, "torch")
        assert_equal(model, loss, exact, alone, TOLERANCE[precision])
