"""The `mamba_amp` backend: Mamba, Mamba-2 and any other causal LM in lm-eval, in a precision that means one thing.

    lm_eval --model mamba_amp --model_args pretrained=state-spaces/mamba-130m-hf,dtype=bf16 --tasks icl_gap

It is lm-eval's `hf` backend (`HFLM`) with another loader (`peft_mamba.checkpoints`), adapter-aware mixers
(`peft_mamba.mixers`), fp32 weights under autocast instead of cast weights, log-probabilities in fp32, adapters checked
against the model, an error where a score would be NaN, and requests that share their prefixes (`scoring`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, hash_args
from lm_eval.api.registry import register_model

from lm_eval_mamba.precisions import REQUEST, Precisions, scorers
from lm_eval_mamba.scoring.lm import PrefixTreeLM
from lm_eval_mamba.scoring.processes import Processes, end_in_order
from peft_mamba import checkpoints
from peft_mamba import kernels as mamba_kernels
from peft_mamba.adapter_io import AdapterError, SavedAdapter
from peft_mamba.mixers import mixers_of, use_mixers
from peft_mamba.nonfinite import NonFiniteError, first_nonfinite
from peft_mamba.precast import PrecastError, precast_frozen_weights
from peft_mamba.precision import Precision, PrecisionError
from peft_mamba.provenance import versions

logger = logging.getLogger(f"lm_eval.{__name__}")  # below the logger that lm-eval configures

DEFAULT_CHECKPOINT = "mini"

# Beside lm-eval's hashes in a file of --use_cache.
_CACHE_OWNER = "lm_eval_mamba: the model that these answers are of"

# Arguments of HFLM that would make a run something else than its precision says; each with what to use instead.
_REFUSED = {
    "mixed_precision_dtype": "dtype (fp32 weights under autocast to that dtype)",
    "softmax_dtype": "nothing: log-probabilities are always fp32",
    "load_in_8bit": "--model hf: weights quantised to 8 bit are not fp32 weights",
    "load_in_4bit": "--model hf: weights quantised to 4 bit are not fp32 weights",
    "quantization_config": "--model hf: quantised weights are not fp32 weights",
    "autogptq": "--model hf: quantised weights are not fp32 weights",
    "gptqmodel": "--model hf: quantised weights are not fp32 weights",
    "gguf_file": "--model hf: quantised weights are not fp32 weights",
}


@register_model("mamba_amp")
class MambaAMP(PrefixTreeLM):
    """lm-eval backend for Mamba, Mamba-2 and other causal LMs under mixed precision.

    Args:
        pretrained: hub id, local directory (transformers or original state-spaces format), `mini` or `mini-2`
            (embedded; the default is `mini`), or a loaded `PreTrainedModel`.
        dtype: fp32 (default), fp16 or bf16: fp32 weights, autocast to this dtype, log-probabilities in fp32.
        weights_dtype: cast the weights to this dtype and use no autocast. Not together with `dtype`.
        precast: False (default), or True, which keeps the weights of the mixers' linear layers on the device in `dtype`
            alone, as autocast casts them, and the fp32 ones in host memory (`peft_mamba.precast_frozen_weights`): the
            same scores, in about half the memory once the model is loaded. With dtype=fp16 or bf16, for checkpoints
            given by name.
        tokenizer: hub id, local directory or tokenizer; default the checkpoint's own, and GPT-NeoX's for checkpoints in
            the original format that have none.
        peft: local directory or hub id of a PEFT adapter; applied in full or refused.
        device: default CUDA where there is one, else the CPU.
        precisions, reference: for the divergence task groups, which get them from lm-eval as metadata; checked here,
            where no model is loaded yet. They leave other tasks in `dtype`.
        kernels: which kernels the mixers run, as PEFT_MAMBA_KERNELS: `torch`, or by operation, joined with "+":
            `selective_scan=mamba_ssm+ssd=triton`. Default: that variable, else the fastest on the device.
        scoring: auto (default): Mamba and Mamba-2 run each prefix that requests share once, other models take HFLM's
            path, padded batches of `batch_size`; plain: all do; tree: an error where that cannot be.
        state_budget: memory for the states of prefixes, in bytes or such as 2GiB; default a share of what is free.
        batch_tokens: tokens of a batch of the prefix tree, which `batch_size` does not apply to; default by what is
            free. Out of memory halves both.
        **kwargs: everything else that lm-eval's `hf` backend takes (`batch_size`, `max_length`, …).

    Raises:
        PrecisionError, PrecastError, CheckpointError, AdapterError, KernelError, ValueError: before a model is loaded,
            as far as the files tell.
        NonFiniteError: during scoring, when a log-probability is NaN; names the first layer that produced it.
    """

    _model: Any
    batch_size_per_gpu: Any
    batch_sizes: dict[int, int]
    mixed_precision_dtype: torch.dtype | None
    cache_hook: CacheHook

    def __init__(
        self,
        pretrained: str | transformers.PreTrainedModel | None = None,
        dtype: str | torch.dtype | None = None,
        weights_dtype: str | torch.dtype | None = None,
        tokenizer: Any = None,
        revision: str | None = "main",
        peft: str | None = None,
        device: str | None = None,
        precisions: str | Sequence[str] | None = None,
        reference: str | None = None,
        scoring: str = "auto",
        state_budget: str | int | None = None,
        batch_tokens: int | None = None,
        kernels: str | None = None,
        precast: bool = False,
        **kwargs: Any,
    ) -> None:
        self._set_scoring(scoring, state_budget, batch_tokens)
        for name, instead in _REFUSED.items():
            if kwargs.get(name):
                raise PrecisionError(f"mamba_amp does not take {name}={kwargs[name]}. Use {instead}.")
        self.precision = Precision.parse(dtype, weights_dtype)
        self._check_precast(precast, pretrained)
        self._precast = ExitStack() if precast else None
        self._kernels = kernels
        if kernels is not None:
            where = device or ("cuda" if torch.cuda.is_available() else "cpu")
            mamba_kernels.select(
                (torch.device(where) if isinstance(pretrained, str | None) else pretrained.device).type, kernels
            )
        self._asked = Precisions.parse(precisions, reference) if precisions or reference else None
        if self._asked is not None:
            self._check_fp32_weights()
        self._rebatched = False
        self._scoring: list[Precision] = []  # not empty while requests are scored in several precisions
        self._scored: dict[str, Precision] = {}
        self._found_batch_sizes: dict[int, int] = {}
        if pretrained is None:
            logger.info("pretrained is not given: evaluating the embedded checkpoint '%s'.", DEFAULT_CHECKPOINT)
            pretrained = DEFAULT_CHECKPOINT
        if not isinstance(pretrained, str):
            if peft is not None:
                raise AdapterError(
                    f"peft={peft} goes with the name of a checkpoint; the model given as pretrained is loaded already. "
                    "Put the adapter on it first, with PeftModel.from_pretrained."
                )
            if pretrained.dtype != self.precision.weights:
                raise PrecisionError(
                    f"the model given as pretrained has {pretrained.dtype} weights, {self.precision.name} needs "
                    f"{self.precision.weights}. Load it in that dtype, or give weights_dtype={pretrained.dtype}."
                )
            self.precision.check_device(pretrained.device)
            with mamba_kernels.use(kernels):
                use_mixers(pretrained)
        super().__init__(
            pretrained=pretrained,
            dtype=self.precision.weights,
            softmax_dtype=self.precision.softmax,
            mixed_precision_dtype=self.precision.autocast,  # HFLM would switch off an autocast around its own
            tokenizer=tokenizer,
            revision=revision,
            peft=peft,
            # HFLM's own default is CUDA, also on machines without it
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            **kwargs,
        )
        if isinstance(pretrained, str):
            self.pretrained = checkpoints.resolve(pretrained)  # lm-eval asks the hub for the commit of this name
        # HFLM learns its rank only where a machine has several CUDA devices; this covers CPUs and one GPU a process.
        if self.world_size == 1 and getattr(self, "accelerator", None) is not None:
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._precast is not None:
            self._model.requires_grad_(False)
            self._precast.enter_context(precast_frozen_weights(self._model, self.precision.name))
        scorers.add(self)
        plain = self._plain_because()
        if self.world_size > 1:
            end_in_order()
            if plain is None:
                self._processes = Processes(self.rank, self.world_size)
        if self.rank == 0:
            logger.info("requests %s", "share their prefixes" if plain is None else f"stand alone ({plain})")
            logger.info("precision %s", self.precision)
            logger.info("kernels %(kernels)s (%(reason)s)", self.kernel_path)

    def _check_precast(self, precast: Any, pretrained: Any) -> None:
        if not isinstance(precast, bool):
            raise PrecastError(f"precast={precast!r} is neither True nor False.")
        if precast and self.precision.autocast is None:
            raise PrecastError(
                f"precast=True: {self.precision.name} casts no weights in autocast. Give dtype=bf16 or fp16, or leave "
                "precast out."
            )
        if precast and not isinstance(pretrained, str | None):
            raise PrecastError(
                "precast=True: the model given as pretrained is yours. Put peft_mamba.precast_frozen_weights(model, "
                "dtype) around the evaluation, which gives the weights back at its end."
            )

    @property
    def kernel_path(self) -> dict[str, str]:
        """Which kernels the mixers run, and why; `transformers` for models without Mamba mixers."""
        if mixers_of(self.model):
            with mamba_kernels.use(self._kernels):
                return mamba_kernels.describe(self.device.type)
        return {"kernels": "transformers", "reason": f"{type(self.model).__name__} has no Mamba mixer"}

    # loading

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        self._config = checkpoints.load_config(pretrained, **kwargs)

    def _get_backend(self, config: Any, backend: str = "default", trust_remote_code: bool | None = False) -> None:
        if backend == "seq2seq":
            raise checkpoints.CheckpointError("mamba_amp evaluates causal LMs; use --model hf for backend=seq2seq.")
        self.backend = "causal"
        self.AUTO_MODEL_CLASS = checkpoints.AutoMambaForCausalLM

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, revision: str | None = "main", **kwargs: Any) -> None:
        if tokenizer is None and isinstance(pretrained, str):
            tokenizer = checkpoints.tokenizer_source(pretrained, revision, subfolder=kwargs.get("subfolder"))
        # A revision is the checkpoint's; a tokenizer from elsewhere has not got it.
        super()._create_tokenizer(
            pretrained, tokenizer, revision=revision if tokenizer == pretrained else "main", **kwargs
        )

    def _create_model(self, pretrained: str, peft: str | None = None, **kwargs: Any) -> None:
        self.precision.check_device(self.device)
        adapter = SavedAdapter.read(peft, revision=kwargs.get("revision")) if peft else None
        super()._create_model(pretrained, **kwargs)
        with mamba_kernels.use(self._kernels):
            use_mixers(self._model)
        # HFLM would first shrink padded embeddings to the tokenizer's size, and keep silent about adapter weights that
        # find no layer.
        if adapter is not None:
            self._model = adapter.apply(self._model)

    # scoring

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with self.precision.scope(self.device), mamba_kernels.use(self._kernels):
            yield

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        self._last_input = inps
        with self._computing():
            return super()._model_call(inps, attn_mask, labels)

    def _select_cont_toks(
        self, logits: torch.Tensor, contlen: int | None = None, inplen: int | None = None
    ) -> torch.Tensor:
        logits = super()._select_cont_toks(logits, contlen, inplen)
        # A NaN or +inf logit makes the log-probabilities of its whole position NaN: one column tells.
        if logits[:, 0].isnan().any():
            raise self._nonfinite(lambda: self.model(self._last_input))
        return logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        def refuse_nan(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if scores.isnan().any():
                raise self._nonfinite(lambda: self.model(input_ids))
            return scores

        processors = transformers.LogitsProcessorList([refuse_nan])
        with self._computing():
            return super()._model_generate(context, max_length, stop, logits_processor=processors, **kwargs)

    def _nonfinite(self, forward: Any) -> NonFiniteError:
        with self._computing():
            where = first_nonfinite(self.model, forward)
        hint = ""
        if self.precision.autocast is torch.float16:
            instead = "leave fp16 out: precisions=fp32+bf16" if self._scoring else "try dtype=bf16"
            hint = f" fp16 holds nothing above 65504; {instead}."
        return NonFiniteError(
            f"log-probabilities are NaN in {self.precision.name}: "
            f"{where or 'the forward pass, repeated, was finite'}. No score is reported.{hint}"
        )

    # scoring in several precisions

    def loglikelihood_by_precision(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[dict[str, tuple[float, bool]]]:
        """Score each request in several precisions; what the divergence task groups ask for.

        Args:
            requests: their arguments are (context, continuation, options); `options["precisions"]` are names of
                precisions, `options["rebatched"]` asks for other batches than the run's own: one request at a time, or
                8 where the run itself takes one at a time, and no shared prefixes.

        Returns:
            For each request, precision -> (log-probability, greedy). In each precision the requests stand in the same
            batches, so that what differs is the precision alone.

        Raises:
            PrecisionError: the weights are cast (`weights_dtype`), the device lacks a precision, or the model was given
                other `precisions` than the tasks.
            NonFiniteError: a log-probability is NaN; names the precision and the first layer that produced it.
        """
        self._check_fp32_weights()
        answers: list[Any] = [None] * len(requests)
        groups: dict[tuple[tuple[str, ...], bool], list[int]] = {}
        stored = self.cache_hook.dbdict
        for i, request in enumerate(requests):
            options = request.args[2]
            # The options are part of the key, and a request is served in all of its precisions or in none: answers of
            # two precisions that were not scored in the same batches never meet.
            key = hash_args(REQUEST, request.args)
            if stored is not None and key in stored:
                answers[i] = stored[key]
            else:
                groups.setdefault((tuple(options["precisions"]), options["rebatched"]), []).append(i)
        for names, rebatched in sorted(groups, key=lambda group: group[1]):  # rebatched ones need the run's batch size
            indices = groups[names, rebatched]
            scored = self._score([requests[i] for i in indices], names, rebatched, disable_tqdm)
            for i, answer in zip(indices, scored, strict=True):
                answers[i] = answer
                if stored is not None:
                    stored[hash_args(REQUEST, requests[i].args)] = answer
        return answers

    def _score(self, requests: list[Instance], names: Sequence[str], rebatched: bool, disable_tqdm: bool) -> Any:
        if self._asked is not None and not set(names) <= set(self._asked.names):
            raise PrecisionError(
                f"the model was given precisions={self._asked}, the tasks {', '.join(names)}. lm-eval hands model "
                "arguments on to tasks as metadata, but not to a TaskManager of your own: give it metadata= with them."
            )
        if self.precision.name != "fp32":
            logger.warning("dtype=%s does not apply here: these tasks are scored in %s.", self.precision.name, names)
        precisions = [Precision.parse(name) for name in names]
        for precision in precisions:
            precision.check_device(self.device)
        plain = [Instance("loglikelihood", r.doc, r.args[:2], r.idx, r.metadata) for r in requests]
        batch_size, cache_hook = self.batch_size_per_gpu, self.cache_hook
        if rebatched:
            own = max(self.batch_sizes.values(), default=0) if batch_size == "auto" else batch_size
            self.batch_size_per_gpu = 8 if own == 1 else 1
        self._rebatched = rebatched
        self.cache_hook = CacheHook(None)  # HFLM would store each answer as a plain one of this context
        self._scoring, self._found_batch_sizes = precisions, {}
        self._scored |= dict(zip(names, precisions, strict=True))
        try:
            return self.loglikelihood(plain, disable_tqdm=disable_tqdm)
        finally:
            self.batch_size_per_gpu, self.cache_hook, self._scoring = batch_size, cache_hook, []
            self._rebatched = False

    def _plain_because(self) -> str | None:
        return "other batches were asked for" if self._rebatched else super()._plain_because()

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        if not self._scoring:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        found = False
        while not found:
            answers, halved = [], self._halved()
            for precision in self._scoring:
                with self._computing_in(precision):
                    answers.append(super()._loglikelihood_tokens(requests, disable_tqdm, override_bs))
                self._found_batch_sizes = dict(self.batch_sizes)
            # Where memory ran out in one precision, its batches were not those of the others: all again, smaller.
            found = self._halved() == halved
        names = [precision.name for precision in self._scoring]
        together = [dict(zip(names, by_precision, strict=True)) for by_precision in zip(*answers, strict=True)]
        for by_precision in together:
            infinite = [name for name, (logprob, _) in by_precision.items() if math.isinf(logprob)]
            if infinite and len(infinite) < len(names):  # in all: the model itself rules the token out
                raise NonFiniteError(
                    f"a log-probability is -inf in {', '.join(infinite)} alone: the logit left the range of that "
                    f"precision in the output head. No score is reported; choose other precisions than {infinite[0]}."
                )
        return together

    def _halved(self) -> int:
        return self._budget.halved if self._budget is not None else 0

    def _batch_scheduler(self, pos: int, n_reordered_requests: Any) -> int:
        if self._scoring and not self.batch_sizes:  # HFLM forgets them at each call
            self.batch_sizes = dict(self._found_batch_sizes)
        return super()._batch_scheduler(pos, n_reordered_requests)

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        # Which precision needs most memory depends on the model: autocast adds copies of weights and of logits.
        sizes = []
        for precision in self._scoring or [self.precision]:
            with self._computing_in(precision):
                sizes.append(super()._detect_batch_size(requests, pos))
        return min(sizes)

    @contextmanager
    def _computing_in(self, precision: Precision) -> Iterator[None]:
        own = self.precision, self.mixed_precision_dtype
        self.precision, self.mixed_precision_dtype = precision, precision.autocast
        try:
            yield
        finally:
            self.precision, self.mixed_precision_dtype = own

    def _check_fp32_weights(self) -> None:
        if self._precast is not None:
            raise PrecastError("precast=True: tasks in several precisions need the fp32 weights. Leave precast out.")
        if self.precision.weights != torch.float32:
            raise PrecisionError(
                f"{self.precision.name}: a divergence is one of fp32 weights under autocast, and these weights are "
                f"{self.precision.weights}. Leave weights_dtype out."
            )

    # results

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Called for lm-eval's `--use_cache`, which keys an answer by the text of its request alone.

        Raises:
            ValueError: the file holds answers of another model, adapter or precision, or of another backend.
        """
        answers = cache_hook.dbdict
        if answers is not None:
            ours = self._identity()
            theirs = answers.get(_CACHE_OWNER)
            if theirs != ours and len(answers) > 0:
                raise ValueError(
                    f"--use_cache: the answers in {answers.filename} are of {theirs or 'another backend'}; this run is "
                    f"{ours}. Give another path, or delete the file."
                )
            answers[_CACHE_OWNER] = ours
        super().set_cache_hook(cache_hook)

    def _identity(self) -> str:
        checkpoint = checkpoints.describe(self.model)
        parts = {
            "pretrained": checkpoint["source"],
            "revision": checkpoint["commit"] or checkpoint["revision"],
            "peft": self.peft,
            "precision": self.precision.name,
            "max_length": self.max_length,
        }
        return ",".join(f"{name}={value}" for name, value in parts.items() if value is not None)

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's model information and what this backend decided; goes into the results file's `config`."""
        return super().get_model_info() | {
            "precision": self.precision.as_dict(),
            "precast": self._precast is not None,
            "scored_by_precision": {name: precision.as_dict() for name, precision in self._scored.items()} or None,
            "kernel_path": self.kernel_path,
            "checkpoint": checkpoints.describe(self.model),
            "adapter": {"source": self.peft, **_describe_adapter(self.model)} if self.peft else None,
            "versions": versions(),
        }


def _describe_adapter(model: Any) -> dict[str, Any]:
    config = model.peft_config[model.active_adapter]
    return {
        "name": model.active_adapter,
        "type": str(config.peft_type),
        "base_model": config.base_model_name_or_path,
        "r": getattr(config, "r", None),
        "target_modules": sorted(config.target_modules) if isinstance(config.target_modules, set | list) else None,
    }
