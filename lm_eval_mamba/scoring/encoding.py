"""Requests as token ids, many strings at a time: a fast tokenizer encodes a list on all cores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

# Requests whose encodings are held as lists of Python integers.
TOGETHER = 1024

Pair = tuple[str, str]


def encoded_pairs(lm: Any, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, list[int], list[int]]]:
    """(pair, tokens of its context, tokens of its continuation) as lm-eval's own `loglikelihood` makes them.

    Args:
        lm: an HFLM.
        pairs: (context, continuation).
    """
    for start in range(0, len(pairs), TOGETHER):
        part = pairs[start : start + TOGETHER]
        # The first three of lm-eval's calls of tok_encode: a context, a whole, a continuation of nothing.
        strings = [string for context, continuation in part if context for string in _moved(context, continuation)]
        encode = _Encoder(lm, strings, [continuation for context, continuation in part if not context])
        for context, continuation in part:
            if context:
                context_tokens, whole = (encode(string) for string in _moved(context, continuation))
                yield (context, continuation), context_tokens, whole[len(context_tokens) :]
                continue
            tokens = encode(continuation, add_special_tokens=False)
            if tokens and tokens[0] == lm.prefix_token_id:
                yield (context, continuation), tokens[:1], tokens[1:]
            else:
                yield (context, continuation), [lm.prefix_token_id], tokens


def _moved(context: str, continuation: str) -> tuple[str, str]:
    """The context without its trailing spaces, and all of it; the spaces belong to the continuation's first word."""
    return context.rstrip(), context + continuation


class _Encoder:
    """lm.tok_encode, out of one call of the tokenizer where that gives the same."""

    def __init__(self, lm: Any, strings: Iterable[str], bare: Iterable[str]) -> None:
        self._lm = lm
        prefix = lm.tokenizer.decode(lm.prefix_token_id)
        special = {} if lm.add_bos_token is None else {"add_special_tokens": lm.add_bos_token}
        # One that starts with the BOS token already is a case of its own, left to tok_encode.
        self._known: dict[bool | None, dict[str, list[int]]] = {}
        self._known[None] = self._encode([s for s in strings if not (prefix and s.startswith(prefix))], special)
        self._known[False] = self._encode(bare, {"add_special_tokens": False})

    def _encode(self, strings: Iterable[str], special: dict[str, bool]) -> dict[str, list[int]]:
        unique = list(dict.fromkeys(strings))
        if not unique:
            return {}
        tokenizer = self._lm.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or backend.truncation is not None or backend.padding is not None:
            encoded = tokenizer(unique, return_attention_mask=False, **special)["input_ids"]
        else:  # what the tokenizer itself calls, without the place of each token in its string
            encoded = [encoding.ids for encoding in backend.encode_batch_fast(unique, **special)]
        return dict(zip(unique, encoded, strict=True))

    def __call__(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        known = self._known[add_special_tokens].get(string)
        return self._lm.tok_encode(string, add_special_tokens=add_special_tokens) if known is None else known
