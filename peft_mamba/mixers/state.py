"""What goes into and out of a mixer's state: padding is moved out of the way, caches are read and written.

A mixer is causal, so a row whose padding lies behind its tokens computes them as if it were alone. Left padding and
holes are brought into that form by reordering the tokens of each row, once on the way in and back on the way out; what
is left to do is to leave the state as it is from the row's length on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.modules import module as _global
from transformers.cache_utils import Cache

from ..kernels.reference import accumulator_dtype, first_of_document
from .recomputation import runs_again
from .sequences import PackedSequences

Tensor = torch.Tensor


class MixerState(NamedTuple):
    """What one mixer keeps of the tokens it has seen, in the layout of transformers' caches.

    conv: (B, C, K), the last K inputs of the convolution, newest last, zeros before the first token. C = D for Mamba-1,
        D + 2·G·N for Mamba-2. The oldest is no part of any later output, and not there in a `StatePool`.
    ssm: float32, (B, D, N) for Mamba-1, (B, H, P, N) for Mamba-2.
    """

    conv: Tensor
    ssm: Tensor


class PackedRows(NamedTuple):
    """What takes the place of `attention_mask` on its way to a mixer where rows hold several documents.

    attention_mask: (B, ≥ L), 0 on padding; None: there is none.
    seq_idx: (B, L) int, changing at the first token of each document.
    cu_seqlens: (S+1,) int32, where the documents of all rows start and end when the rows are laid end to end, if there
        is no padding; seq_idx then counts the documents of each row from 0. None: to be found out by each mixer.
    """

    attention_mask: Tensor | None
    seq_idx: Tensor
    cu_seqlens: Tensor | None = None


class RowOrder(NamedTuple):
    """The reordering that puts each row's tokens first, in their order, and its padding behind them."""

    take: Tensor  # (B, L) position in the padded row of each token of the compact row
    back: Tensor  # (B, L) the inverse
    lengths: Tensor  # (B,) tokens that are not padding

    @classmethod
    def of(cls, attention_mask: Tensor, length: int) -> RowOrder:
        """From a (B, ≥ L) mask, 0 on padding; only its last L columns are about these tokens.

        Raises:
            ValueError: the mask is not two-dimensional, or shorter than the tokens.
        """
        if attention_mask.ndim != 2 or attention_mask.shape[1] < length:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; a Mamba mixer takes (batch, tokens) with at "
                f"least the {length} tokens of this forward."
            )
        real = attention_mask[:, -length:] != 0
        lengths = real.sum(1)
        # A token goes to the count of tokens before it; padding goes behind, to the length plus the padding before it.
        back = torch.where(real, real.cumsum(1), lengths[:, None] + (~real).cumsum(1)) - 1
        positions = torch.arange(length, device=back.device).expand_as(back)
        return cls(torch.empty_like(back).scatter_(1, back, positions), back, lengths)


def reorder(x: Tensor, positions: Tensor) -> Tensor:
    """out[b, t] = x[b, positions[b, t]] for x of shape (B, L, ...)."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, (positions + rows * x.shape[1]).flatten()).view_as(x)


def inputs_before(state: MixerState | None, width: int) -> Tensor | None:
    """(B, width - 1, C): the inputs that a convolution of this width still reads, as kernels take them."""
    return None if state is None else state.conv[..., state.conv.shape[-1] - (width - 1) :].transpose(1, 2)


def conv_window(x: Tensor, before: Tensor | None, lengths: Tensor | None, width: int) -> Tensor:
    """(B, C, width): the last `width` inputs up to each row's length, for inputs x (B, L, C) that follow `before`."""
    if before is None:
        before = x.new_zeros(len(x), x.shape[2], width)
    x = x.transpose(1, 2)
    if lengths is None:
        return torch.cat([before, x[..., -width:]], dim=-1)[..., -width:]
    columns = lengths[:, None] + torch.arange(width, device=x.device)
    inputs = torch.cat([before, x], dim=-1)
    return inputs.gather(2, columns[:, None, :].expand(-1, inputs.shape[1], -1))


def state_after(x: Tensor, ssm: Tensor, before: MixerState | None, lengths: Tensor | None, width: int) -> MixerState:
    """What is left after inputs x (B, L, C) of a convolution and this state of the scan; see `CachedMixer.mix`."""
    return MixerState(conv_window(x, None if before is None else before.conv, lengths, width), ssm)


def decay_rates(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in float32 at least."""
    return -torch.exp(A_log.to(accumulator_dtype(A_log)))


def number_documents(seq_idx: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, L) int32: the documents of each row counted from 0, for any numbers that change where a document starts.

    Kernels differ in what they make of numbers that come back later in a row, are negative, or do not start at 0; of
    these all make the same. From `lengths` on there is padding, which counts to the last document, whose state it
    must leave as it is.
    """
    starts = first_of_document(seq_idx)
    assert starts is not None  # as seq_idx is not
    if lengths is not None:
        starts = starts & (torch.arange(seq_idx.shape[1], device=seq_idx.device) < lengths[:, None])
    return starts.cumsum(1, dtype=torch.int32)


def laid_end_to_end(seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """seq_idx (B, L) counted from 0 in each row, and cu_seqlens (S+1,) int32 of all documents of all rows.

    To know how many documents there are, the host waits for the device: once a forward, not in each mixer.
    """
    documents = number_documents(seq_idx, None)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    bounds = starts.flatten().nonzero().flatten().to(torch.int32)
    return documents, torch.cat([bounds, bounds.new_tensor([documents.numel()])])


def keep_last_document(conv: Tensor, documents: Tensor, lengths: Tensor | None) -> Tensor:
    """The window (B, C, K) of `conv_window` with zeros for inputs of documents before the one that the row ends in."""
    numbers = conv_window(documents[..., None], None, lengths, conv.shape[-1])  # what came before belongs to document 0
    return conv.masked_fill(numbers != numbers[..., -1:], 0.0)


def read_cache(cache: Cache | None, layer: int, width: int) -> MixerState | None:
    """The state that earlier forwards left in `cache` for this layer; None where there is none yet."""
    if cache is None:
        return None
    conv, ssm = cache.get_conv_state(layer), cache.get_recurrent_state(layer)
    if conv is None or ssm is None:
        return None
    conv = conv[..., -width:]
    if torch.is_grad_enabled():
        # The cache is overwritten in place below, which would pull the tensors out from under a backward.
        conv, ssm = conv.clone(), ssm.clone()
    return MixerState(conv, ssm)


def write_cache(cache: Cache, layer: int, state: MixerState) -> None:
    """Leave `state` in `cache` for the next forward."""
    width = state.conv.shape[-1]
    cache.update_conv_state(state.conv, layer, conv_kernel_size=width)
    cache.update_recurrent_state(state.ssm, layer)


class CachedMixer:
    """The forward that both mixers share: padding out of the way, state from the cache, `mix`, state into the cache.

    A mixer brings `mix`, the function of its state, and inherits the rest of itself from transformers' class.
    """

    layer_idx: int
    conv_kernel_size: int
    _forward_hooks: dict

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | PackedRows | PackedSequences | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        sequences: PackedSequences | None = None,
        **kwargs,
    ) -> Tensor:
        """Mix (B, L, hidden_size) over time; same shape out.

        Args:
            cache_params: where the state is read from, if one is there, and left.
            attention_mask: (B, ≥ L), 0 on padding, which may lie anywhere; the outputs there mean nothing. Or mask
                and seq_idx in one, or `sequences`.
            seq_idx: (B, L) int, changing at the first token of each document packed into a row. The first document
                goes on from the state in the cache; the last one's is left there.
            cu_seqlens: what `laid_end_to_end` says of seq_idx; used without cache and padding.
            sequences: of the batch's one row, each with a state of its own from a pool, which takes the place of a
                cache.
            kwargs: what transformers passes to all mixers and attention layers alike; this one needs none of it.

        Raises:
            ValueError: attention_mask or seq_idx do not fit the tokens.
        """
        if isinstance(attention_mask, PackedSequences):
            sequences, attention_mask = attention_mask, None
        if sequences is not None:
            return self.mix(hidden_states, sequences=sequences)[0]
        if isinstance(attention_mask, PackedRows):
            attention_mask, seq_idx, cu_seqlens = attention_mask
        if seq_idx is not None and seq_idx.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"seq_idx has shape {tuple(seq_idx.shape)}; a Mamba mixer takes (batch, tokens) = "
                f"{tuple(hidden_states.shape[:2])}."
            )
        state = read_cache(cache_params, self.layer_idx, self.conv_kernel_size)
        order = None if attention_mask is None else RowOrder.of(attention_mask, hidden_states.shape[1])
        if order is not None:
            hidden_states = reorder(hidden_states, order.take)
            seq_idx = None if seq_idx is None else reorder(seq_idx, order.take)
        lengths = None if order is None else order.lengths
        # A single token crosses no boundary, and kernels are faster without.
        documents = seq_idx if seq_idx is not None and seq_idx.shape[1] > 1 else None
        if documents is None or order is not None or cache_params is not None:
            cu_seqlens = None
        if documents is not None and cu_seqlens is None:
            documents = number_documents(documents, lengths)
        hidden_states, state = self.mix(
            hidden_states,
            initial_state=state,
            lengths=lengths,
            seq_idx=documents,
            cu_seqlens=cu_seqlens,
            return_final_state=cache_params is not None,
        )
        if cache_params is not None and state is not None:
            if documents is not None:
                state = state._replace(conv=keep_last_document(state.conv, documents, lengths))
            write_cache(cache_params, self.layer_idx, state)
        return hidden_states if order is None else reorder(hidden_states, order.back)

    def _output_unread(self) -> bool:
        """Whether this forward only serves its own backward, so that nothing reads what it returns."""
        return runs_again() and not (self._forward_hooks or _global._global_forward_hooks)

    def mix(
        self,
        hidden_states: Tensor,
        *,
        initial_state: MixerState | None = None,
        lengths: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_final_state: bool = False,
        sequences: PackedSequences | None = None,
    ) -> tuple[Tensor, MixerState | None]:
        """The mixer as a function of its state: (B, L, hidden_size) and the state after each row's last token.

        Args:
            initial_state: after the tokens that came before; None: there were none.
            lengths: (B,), tokens at and after it are padding.
            seq_idx: as for forward.
            cu_seqlens: (S+1,) int32, beside seq_idx the bounds of all rows' documents, as of `laid_end_to_end`, without
                states.
            return_final_state: False saves the work of it, and the second result is None.
            sequences: of a batch of one row, in place of all the above. Their states come and go through its pool, and
                the second result is None.
        """
        raise NotImplementedError
