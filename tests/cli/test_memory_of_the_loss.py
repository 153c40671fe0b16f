"""No step of mamba-ft holds the logits of its whole batch, nor a gradient of a matrix that is frozen."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

VOCABULARY, HIDDEN = 768, 64  # of the embedded models; no other layer of theirs is as wide as the vocabulary


class Sizes(TorchDispatchMode):
    """Rows of everything that is as wide as the vocabulary, and how often something has the embeddings' shape."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.embeddings = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor) and each.ndim and each.shape[-1] == VOCABULARY:
                self.rows.append(each.numel() // VOCABULARY)
            if "zeros" in str(function) or "embedding_dense_backward" in str(function):
                self.embeddings += each.shape == (VOCABULARY, HIDDEN)
        return result


@pytest.mark.parametrize("model", ["mini", "mini-2"])
@pytest.mark.parametrize("preset", ["sll", "full"])
def test_logits_come_a_chunk_at_a_time(ft, model, preset):
    rows = TOKEN_CHUNK_SIZE // 512 + 2
    data = ("--device", "cpu", "--split", "train[:800]", "--packing", "--max-length", "512", "--max-steps", "1")
    with Sizes() as sizes:
        status, said, figures = ft("--model", model, "--preset", preset, *data, "--batch-size", rows, quick=False)
    assert status == 0, said
    assert figures["tokens"] > 1.1 * TOKEN_CHUNK_SIZE
    assert 0 < max(sizes.rows) <= TOKEN_CHUNK_SIZE
    # The matrix is the embedding and the head: neither end makes a gradient of its size where it is frozen.
    assert (sizes.embeddings > 0) == (preset == "full")
