"""lm-eval's `hf` backend with its requests arranged as a prefix tree, for models whose memory is a state."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from peft_mamba.mixers import mixers_of
from peft_mamba.mixers.packing import MODELS
from peft_mamba.mixers.state import CachedMixer
from peft_mamba.nonfinite import NonFiniteError

from .budget import Budget, parse_bytes
from .encoding import encoded_pairs
from .generation import GreedyGenerator
from .processes import Processes
from .scorer import Answer, NaNScore, PrefixScorer, Work

logger = logging.getLogger(f"lm_eval.{__name__}")

SCORING = ("auto", "tree", "plain")
# What greedy decoding here takes of lm-eval's generation arguments; any other goes to transformers' generate.
GREEDY_ARGUMENTS = {"until", "max_gen_toks", "do_sample", "temperature"}
# What a generation_config may say without making greedy decoding another thing.
HARMLESS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "use_cache"),
    *("max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
}


class PrefixTreeLM(HFLM):
    """HFLM that reads no prefix twice where the model is a Mamba, and is HFLM elsewhere.

    A subclass brings `_computing`, the scope that forwards run in, and `_nonfinite`.

    Attributes:
        work: what the last call that scored by prefix tree did, in tokens.
    """

    work: Work | None = None
    accelerator: Any
    _processes: Processes | None = None

    def _set_scoring(self, scoring: str, state_budget: str | int | None, batch_tokens: int | None) -> None:
        """Check and keep the arguments that say how requests are scored; before the model is loaded.

        Raises:
            ValueError: unknown or without meaning.
        """
        if scoring not in SCORING:
            raise ValueError(f"scoring={scoring} is none of {', '.join(SCORING)}.")
        self._scoring_mode = scoring
        self._state_bytes = None if state_budget is None else parse_bytes(state_budget)
        self._batch_tokens = None if batch_tokens is None else int(batch_tokens)
        if self._batch_tokens is not None and self._batch_tokens < 1:
            raise ValueError(f"batch_tokens={batch_tokens} is no number of tokens; a batch has at least 1.")
        self._budget: Budget | None = None

    def _plain_because(self) -> str | None:
        """Why requests take HFLM's path, in words; None where they form a prefix tree.

        Raises:
            ValueError: scoring=tree was asked for and cannot be.
        """
        if self._scoring_mode == "plain":
            return "scoring=plain"
        reason = self._no_tree()
        if reason is not None and self._scoring_mode == "tree":
            raise ValueError(f"scoring=tree: {reason}. Use scoring=auto.")
        return reason

    def _no_tree(self) -> str | None:
        base = self._base_model()
        if not isinstance(base, MODELS) or not hasattr(base, "backbone"):
            return f"{type(base).__name__} has no state to go on from"
        if not all(isinstance(mixer, CachedMixer) for _, mixer in mixers_of(base)):
            return "the model runs mixers of its own"
        adapter = getattr(self.model, "active_peft_config", None)
        if adapter is not None and adapter.is_prompt_learning:
            return f"a {adapter.peft_type} adapter puts tokens of its own before each request"
        if len({parameter.device for parameter in base.parameters()}) > 1:
            return "the model is spread over several devices"
        return None

    def _base_model(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _find_budget(self) -> Budget:
        """The budget of this run: found once, so that all precisions have the same batches, and halved for good."""
        if self._budget is None:
            self._budget = Budget.find(self._base_model(), self.device, self._state_bytes, self._batch_tokens)
        return self._budget

    # log-likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        pairs = tqdm(
            encoded_pairs(self, [request.args for request in requests]),
            total=len(requests),
            desc="Tokenizing inputs",
            disable=disable_tqdm or self.rank != 0,
        )
        return self._loglikelihood_tokens(list(pairs), disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        if self._plain_because() is not None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        return self._by_tree(requests, disable_tqdm)

    def _by_tree(self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool) -> list[Answer]:
        own = self._truncated(requests)
        # A process that finds answers in its cache asks for less than others, or for nothing.
        processes = None if self.cache_hook.dbdict is not None else self._processes
        share = None if processes is None else processes.share(own)
        todo = own if share is None else share.requests
        found: list[Any] = [None] * len(todo)
        bar = tqdm(total=len(found), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")

        def answered(number: int, answer: Answer) -> None:
            found[number] = answer
            if share is None:
                self._remember(requests[number][0], answer)
            bar.update(1)

        scorer = PrefixScorer(self._base_model(), self.device, self._find_budget())
        with bar, torch.no_grad(), self._computing():
            try:
                scorer.score(todo, answered)
            except NaNScore as error:
                raise self._nan_in(error.tokens) from error
        self.work = scorer.work
        return found if processes is None or share is None else processes.answers(share, found)

    def _remember(self, text: Any, answer: Answer) -> None:
        if text is not None:  # a window of loglikelihood_rolling, which is stored as a whole
            self.cache_hook.add_partial("loglikelihood", text, answer)

    def _truncated(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[tuple[list[int], int]]:
        """(tokens, length of the continuation): cut from the left to what the model may see, as HFLM does."""
        kept, cut, most = [], 0, self.max_length
        for text, context, continuation in requests:
            if not context or not 0 < len(continuation) <= most:
                raise ValueError(
                    f"A request has {len(context)} tokens of context and {len(continuation)} of continuation; expected "
                    f"at least one of either, and a continuation of at most max_length={most}: {text!r}"
                )
            tokens = context + continuation
            if len(tokens) > most + 1:
                cut, tokens = cut + 1, tokens[-(most + 1) :]
            kept.append((tokens, len(continuation)))
        if cut:
            logger.warning(
                "%d of %d requests are longer than max_length=%d and were truncated from the left.",
                *(cut, len(requests), most),
            )
        return kept

    def _nan_in(self, tokens: list[int]) -> NonFiniteError:
        inputs = torch.tensor([tokens], device=self.device)
        return self._nonfinite(lambda: self.model(inputs))

    def _nonfinite(self, forward: Any) -> NonFiniteError:
        raise NotImplementedError

    def _computing(self) -> AbstractContextManager[None]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        if self._plain_because() is not None:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        windows: list[tuple[None, list[int], list[int]]] = []
        ends = []
        for request in requests:
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(window)) for window in rolling]
            ends.append(len(windows))
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        totals = []
        for request, start, end in zip(requests, [0, *ends], ends, strict=False):
            totals.append(sum(logprob for logprob, _ in scores[start:end]))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    # generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        texts: list[Any] = [None] * len(requests)
        plain: list[int] = []
        for numbers in groups.values():
            if (reason := self._no_greedy_tree(requests[numbers[0]].args[1])) is not None:
                logger.info("%d requests are generated by transformers: %s.", len(numbers), reason)
                plain += numbers
                continue
            for number, text in self._generate_by_tree(requests, numbers, disable_tqdm):
                texts[number] = text
        if plain:
            generated = super().generate_until([requests[i] for i in plain], disable_tqdm)
            for number, text in zip(plain, generated, strict=True):
                texts[number] = text
        return texts

    def _no_greedy_tree(self, gen_kwargs: dict[str, Any]) -> str | None:
        """Why texts with these arguments take HFLM's path; None where they start from a prefix tree."""
        if (reason := self._plain_because()) is not None:
            return reason
        kwargs = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        if kwargs.get("do_sample"):
            return "sampling"
        if others := {name for name, value in kwargs.items() if value is not None} - GREEDY_ARGUMENTS:
            return f"generation arguments {', '.join(sorted(others))}"
        config = self._base_model().generation_config
        if others := config.to_diff_dict().keys() - HARMLESS:
            return f"the checkpoint's generation_config sets {', '.join(sorted(others))}"
        return None

    def _generate_by_tree(
        self, requests: list[Instance], numbers: list[int], disable_tqdm: bool
    ) -> list[tuple[int, str]]:
        """The number of each request and its text, for requests that have the same arguments."""
        gen_kwargs = requests[numbers[0]].args[1]
        kwargs = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(kwargs["until"], eos=eos)
        longest = self.max_length - kwargs["max_gen_toks"]
        if longest <= 0:
            raise ValueError(
                f"max_gen_toks={kwargs['max_gen_toks']} leaves no room for a prompt in max_length={self.max_length}."
            )
        # As HFLM's batches are encoded; each string by itself, so that no neighbour decides about its BOS token.
        prompts = [self.tok_encode(requests[i].args[0], left_truncate_len=longest) for i in numbers]
        ends = self._base_model().generation_config.eos_token_id
        generator = GreedyGenerator(
            self._base_model(),
            self.device,
            self._find_budget(),
            set(ends if isinstance(ends, list) else [ends]) - {None},
            _Stopped(self.tokenizer, until),
        )
        bar = tqdm(total=len(numbers), disable=disable_tqdm or self.rank != 0, desc="Running generate_until requests")
        texts = []
        with bar, torch.no_grad(), self._computing():
            try:
                for i, tokens in generator.generate(prompts, kwargs["max_gen_toks"]):
                    text = self._text(tokens, until)
                    self.cache_hook.add_partial("generate_until", requests[numbers[i]].args, text)
                    bar.update(1)
                    texts.append((numbers[i], text))
            except NaNScore as error:
                raise self._nan_in(error.tokens) from error
        logger.debug(
            "prefix tree: %d tokens asked in prompts, %d run with those generated",
            *(sum(map(len, prompts)), generator.tokens_run),
        )
        return texts

    def _text(self, tokens: list[int], until: list[str]) -> str:
        think = self.think_end_token
        if isinstance(think, int) and think in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(think) :]
        text = self.tok_decode(tokens)
        if isinstance(think, int):
            text = text.lstrip()
        return postprocess_generated_text(
            generation=text, stop=until, think_end_token=think if isinstance(think, str) else None
        )


class _Stopped:
    """Whether texts contain a stop sequence near their end, in the tokenizer's words for it or others."""

    def __init__(self, tokenizer: Any, until: list[str]) -> None:
        self.tokenizer, self.until = tokenizer, [stop for stop in until if stop]
        lengths = [len(tokenizer.encode(stop, add_special_tokens=False)) for stop in self.until]
        # Tokens that came since the last look, and two in case the text spells it in more.
        self.back = max(lengths, default=0) + 2 + 8

    def __call__(self, texts: list[list[int]]) -> list[bool]:
        decoded = self.tokenizer.batch_decode([tokens[-self.back :] for tokens in texts])
        return [any(stop in text for stop in self.until) for text in decoded]
