"""Any checkpoint of a causal language model, loaded: exactly, or not at all.

Upstream fills weights that a checkpoint lacks with random numbers and goes on with a warning. Here every
tensor of the model comes from the checkpoint, and every tensor of the checkpoint goes into the model, or
loading stops and names them, for the Mamba families before anything is allocated.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    Mamba2ForCausalLM,
    MambaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import extract_commit_hash

from .original import convert_config, convert_state_dict
from .source import HUB_OPTIONS, CheckpointError, Source, first_few, is_original

MAMBA_CLASSES: dict[str, Any] = {"mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}
# Causal masks, which GPT-2, GPT-J and GPT-Neo checkpoints stored as buffers; transformers excuses only some.
HARMLESS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$")
SAFETENSORS_ADVICE = "Convert it to safetensors on a machine where you trust it (safetensors.torch.save_file)."


def load_config(
    pretrained: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    subfolder: str | None = "",
    gguf_file: str | None = None,
    **hub: Any,
) -> PreTrainedConfig:
    """The config of a checkpoint in transformers or in original state-spaces format, without its weights.

    pretrained: an embedded name, a local directory or a hub id. hub: options of the hub's client, as in
    `huggingface_hub.hf_hub_download` (cache_dir, token, local_files_only, …). Raises CheckpointError if there
    is none, or if it is not that of a causal language model that can be loaded.
    """
    source = Source.open(pretrained, revision=revision, subfolder=subfolder, hub=hub)
    return _config(source, trust_remote_code, gguf_file)[0]


class AutoMambaForCausalLM:
    """`transformers.AutoModelForCausalLM` that also knows the original format and the embedded names.

        model = AutoMambaForCausalLM.from_pretrained("state-spaces/mamba2-130m", device_map={"": "cuda:0"})

    A causal LM of another family (GPT-NeoX, OLMo, …) goes the same way and to the same standard.
    """

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str,
        *,
        revision: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        device_map: str | int | torch.device | dict | None = None,
        trust_remote_code: bool | None = False,
        subfolder: str | None = "",
        gguf_file: str | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Loads a model, in eval mode, with the arguments of `AutoModelForCausalLM.from_pretrained`.

        dtype is that of the *weights*: a checkpoint stored in half precision is cast, float32 by default,
        "auto" keeps what is stored. An original checkpoint becomes a MambaForCausalLM or Mamba2ForCausalLM
        that computes the same function; its embedding keeps the padded rows, and `config.vocab_size` counts
        them. kwargs go to transformers (max_memory, quantization_config, offload_folder, token, …). Raises
        CheckpointError as `load_config` does, and if a weight is missing, unexpected or of another shape than
        the config's, or a weight file is unreadable or holds anything but tensors.
        """
        hub = {key: kwargs[key] for key in kwargs if key in HUB_OPTIONS}
        source = Source.open(pretrained, revision=revision, subfolder=subfolder, hub=hub)
        config, original = _config(source, bool(trust_remote_code), gguf_file)
        files = [] if gguf_file or kwargs.get("variant") else source.weight_files()
        tensors = read_tensors(files)
        options = {"dtype": dtype, "device_map": device_map, **kwargs}
        if original:
            model = _from_original(source, config, tensors, options)
        else:
            options |= {"trust_remote_code": trust_remote_code, "gguf_file": gguf_file}
            model = _from_transformers(source, config, tensors, options)
        model.config._name_or_path = model.name_or_path = source.path  # where PEFT looks for an adapter's base
        model.checkpoint_origin = {
            "format": "state-spaces" if original else "transformers",
            "source": pretrained,
            "revision": None if source.is_local else revision,
            "commit": extract_commit_hash(files[0], None) if files else None,
            "parameters": model.num_parameters(),
        }
        return model


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """What a results file says of a model, as JSON values.

    class, family ("mamba", "mamba2", or another model_type), format ("transformers" or "state-spaces"),
    source (as the user named it), revision and commit (of a hub id), parameters (their number). Takes the
    model that `AutoMambaForCausalLM` returned, also inside a PEFT model, whose adapter does not count. Of a
    model from elsewhere the format, revision and commit are None.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    elsewhere = {
        "format": None,
        "source": base.config._name_or_path or None,
        "revision": None,
        "commit": None,
        "parameters": base.num_parameters(),
    }
    origin = getattr(base, "checkpoint_origin", elsewhere)
    return {"class": type(base).__name__, "family": base.config.model_type, **origin}


def read_tensors(files: Iterable[str]) -> dict[str, torch.Tensor]:
    """All tensors of .safetensors files or of pickles that torch.save wrote, memory-mapped where possible.

    Raises CheckpointError if a file is truncated or corrupt, or a pickle holds anything but tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        with open(path, "rb") as stream:
            if stream.read(23) == b"version https://git-lfs":
                raise CheckpointError(f"{path} is a Git LFS pointer and not the file itself: run `git lfs pull`")
        tensors |= _read_safetensors(path) if path.endswith(".safetensors") else _read_pickle(path)
    return tensors


def _read_safetensors(path: str) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file ({error}). Copy or download it again."
        ) from error


def _read_pickle(path: str) -> dict[str, torch.Tensor]:
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        needs = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it calls for {needs[1]}" if needs else "it holds something else, or torch.save did not write it"
        raise CheckpointError(
            f"{path} is refused: only tensors are unpickled, since anything else could run code, and {what}. "
            f"{SAFETENSORS_ADVICE}"
        ) from error
    except Exception as error:  # on a damaged file the unpickler fails with whatever it stumbles over
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{path} is truncated or no file of torch.save ({reason}). Copy or download it again."
        ) from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} holds a {type(contents).__name__}, expected a state dict. {SAFETENSORS_ADVICE}")
    others = [f"{name} ({type(value).__name__})" for name, value in contents.items() if not torch.is_tensor(value)]
    if others:
        raise CheckpointError(
            f"{path} holds {len(others)} entries that are no tensors: {first_few(others)}. Expected a state "
            f"dict of tensors alone. {SAFETENSORS_ADVICE}"
        )
    return dict(contents)


def _config(source: Source, trust_remote_code: bool, gguf_file: str | None) -> tuple[PreTrainedConfig, bool]:
    """The config, and whether the checkpoint is in the original format."""
    options = {"revision": source.revision, "subfolder": source.subfolder, **source.hub}
    contents: dict[str, Any] = {}
    if gguf_file is None:
        contents = source.config()
        if is_original(contents):
            config = convert_config(contents, source.where())
            config._name_or_path = source.path
            return config, True
        _refuse_unknown_model_type(contents, source.where(), trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(
            source.path, trust_remote_code=trust_remote_code, gguf_file=gguf_file, **options
        )
    except (StrictDataclassError, KeyError, OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source.where()}: {' '.join(str(error).split())}") from error
    _refuse_no_causal_lm(config, contents, source.where(), trust_remote_code)
    config._name_or_path = source.path
    return config, False


def _refuse_unknown_model_type(contents: Mapping[str, Any], source: str, trust_remote_code: bool) -> None:
    model_type = contents.get("model_type")
    if model_type in CONFIG_MAPPING or (contents.get("auto_map") and trust_remote_code):
        return
    if contents.get("auto_map"):
        raise CheckpointError(
            f"{source}: model_type {model_type!r} needs code from that repository; pass "
            "trust_remote_code=True if you have read it and trust it"
        )
    if model_type is None:
        raise CheckpointError(
            f"{source}: config.json has neither model_type (transformers format) nor d_model and n_layer "
            "(original state-spaces format): that is no config of a language model"
        )
    raise CheckpointError(
        f"{source}: transformers {transformers.__version__} does not know model_type {model_type!r}. Upgrade "
        "transformers if it is newer than that."
    )


def _refuse_no_causal_lm(
    config: PreTrainedConfig, contents: Mapping[str, Any], source: str, trust_remote_code: bool
) -> None:
    if trust_remote_code and "AutoModelForCausalLM" in (contents.get("auto_map") or {}):
        return
    architectures = config.architectures or []
    if (
        type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        or getattr(config, "is_encoder_decoder", False)
        or any(name.endswith("ForMaskedLM") for name in architectures)
    ):
        name = f"{config.model_type}" + (f" ({', '.join(architectures)})" if architectures else "")
        raise CheckpointError(
            f"{source} is a model of type {name}, which is no causal language model: it cannot be scored "
            "from left to right. Expected Mamba, Mamba-2 or another decoder, such as GPT-NeoX (Pythia) or "
            "OLMo."
        )


def _from_original(
    source: Source, config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor], options: dict[str, Any]
) -> Any:
    state = convert_state_dict(tensors, tied=config.tie_word_embeddings, source=source.where())
    _compare(state, config, source.where(), names=True)
    options = {key: value for key, value in options.items() if key not in HUB_OPTIONS}
    return MAMBA_CLASSES[config.model_type].from_pretrained(None, config=config, state_dict=state, **options)


def _from_transformers(
    source: Source, config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor], options: dict[str, Any]
) -> Any:
    quantized = options.get("quantization_config") or getattr(config, "quantization_config", None)
    if tensors and config.model_type in MAMBA_CLASSES and not quantized:
        # shapes alone: transformers renames some older tensors, which its report on names allows for
        _compare(tensors, config, source.where(), names=False)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source.path,
        revision=source.revision,
        subfolder=source.subfolder,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported like the others, and refused below
        **options,
    )
    model, report = loaded
    _refuse(source.where(), report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"])
    return model


def _compare(tensors: Mapping[str, torch.Tensor], config: PreTrainedConfig, source: str, *, names: bool) -> None:
    """Compares shapes, and names if asked to, with those of the config's model, which is not allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    if config.tie_word_embeddings:
        missing -= {"lm_head.weight"}
    wrong = [(name, found[name], expected[name]) for name in found.keys() & expected.keys()]
    wrong = [(name, ours, theirs) for name, ours, theirs in wrong if ours != theirs]
    _refuse(source, missing if names else (), unexpected if names else (), wrong)


def _refuse(
    source: str, missing: Iterable[str], unexpected: Iterable[str], wrong: Iterable[tuple[str, Any, Any]]
) -> None:
    """Raises CheckpointError if a weight is missing, unexpected (and no harmless buffer) or misshapen."""
    missing, unexpected = sorted(missing), sorted(name for name in unexpected if not HARMLESS.search(name))
    shapes = [f"{name} is {tuple(found)}, expected {tuple(expected)}" for name, found, expected in sorted(wrong)]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({first_few(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} that the model has no place for ({first_few(unexpected)})")
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({first_few(shapes)})")
    if problems:
        raise CheckpointError(
            f"the weights of {source} do not fit its config.json: {'; '.join(problems)}. Nothing is filled "
            "in with random numbers: use the config and the weights that were saved together."
        )
