"""One meaning of fp32, fp16 and bf16 for scoring and training, with the reason for each choice.

`Precision.parse("bf16")` is mixed precision as in AMP: fp32 weights, matrix products and convolutions under bf16
autocast, softmax and log-probabilities in fp32. Casting the weights is another thing and has another name:
`Precision.parse(weights_dtype="bf16")`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch

_SPELLINGS = {
    "fp32": ("fp32", "float32", "float"),
    "fp16": ("fp16", "float16", "half"),
    "bf16": ("bf16", "bfloat16"),
}
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class PrecisionError(ValueError):
    """A precision that has no meaning here, or that the device cannot compute in."""


def _canonical(dtype: str | torch.dtype, option: str) -> str:
    spelling = str(dtype).removeprefix("torch.").lower()
    for name, spellings in _SPELLINGS.items():
        if spelling in spellings:
            return name
    known = "; ".join(f"{name} ({', '.join(spellings[1:])})" for name, spellings in _SPELLINGS.items())
    raise PrecisionError(f"{option}={dtype} is not a precision. Choose one of {known}.")


@dataclass(frozen=True)
class Precision:
    """What a run computes in.

    Attributes:
        name: `fp32`, `fp16` or `bf16`; with cast weights `fp16-weights` or `bf16-weights`.
        weights: dtype of the parameters.
        autocast: dtype of matrix products and convolutions under `torch.autocast`, or None without autocast.
        softmax: dtype of softmax, log-probabilities and loss.
        loss_scaling: whether training needs a gradient scaler (fp16's range is small).
        reasons: why each of the above is what it is; stored with every result.
    """

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None
    softmax: torch.dtype
    loss_scaling: bool
    reasons: dict[str, str]

    @classmethod
    def parse(cls, dtype: str | torch.dtype | None = None, weights_dtype: str | torch.dtype | None = None) -> Precision:
        """The precision that a user's words mean.

        Args:
            dtype: fp32 (the default), fp16 or bf16 in their usual spellings, or a `torch.dtype`: fp32 weights,
                autocast to that dtype.
            weights_dtype: cast the weights to this dtype and use no autocast; not together with another `dtype`.

        Raises:
            PrecisionError: unknown spelling, or both arguments with different meanings.
        """
        if weights_dtype is not None:
            name = _canonical(weights_dtype, "weights_dtype")
            if dtype is not None and _canonical(dtype, "dtype") != name:
                raise PrecisionError(
                    f"dtype={dtype} asks for fp32 weights under autocast and weights_dtype={weights_dtype} for cast "
                    "weights. Give one of the two."
                )
            if name != "fp32":
                return cls(
                    name=f"{name}-weights",
                    weights=_DTYPES[name],
                    autocast=None,
                    softmax=torch.float32,
                    loss_scaling=False,
                    reasons={
                        "weights": f"cast to {name}: weights_dtype={weights_dtype}",
                        "autocast": "off: the weights themselves are cast, this is not mixed precision",
                        "softmax": "log-probabilities are always fp32",
                        "loss_scaling": "off: no fp32 master weights to scale for",
                    },
                )
        name = _canonical(dtype, "dtype") if dtype is not None else "fp32"
        said = f"dtype={dtype}" if dtype is not None else "dtype not given"
        mixed = name != "fp32"
        return cls(
            name=name,
            weights=torch.float32,
            autocast=_DTYPES[name] if mixed else None,
            softmax=torch.float32,
            loss_scaling=name == "fp16",
            reasons={
                "weights": "fp32 in every precision: A_log, D and dt bias keep their values",
                "autocast": f"{name}: {said}" if mixed else f"off: {said}, full precision, TF32 off",
                "softmax": "log-probabilities are always fp32",
                "loss_scaling": "fp16 gradients underflow without it" if name == "fp16" else f"{name} has fp32's range",
            },
        )

    def check_device(self, device: torch.device) -> None:
        """Raise PrecisionError, before anything slow, if `device` cannot compute in this precision."""
        computes_in = self.autocast or self.weights
        if computes_in is torch.float32:
            return
        if self.autocast is not None and not torch.amp.is_autocast_available(device.type):
            raise PrecisionError(f"dtype={self.name}: torch has no autocast on {device}. Use dtype=fp32.")
        if (
            computes_in is torch.bfloat16
            and device.type == "cuda"
            and not torch.cuda.is_bf16_supported(including_emulation=False)
        ):
            raise PrecisionError(
                f"{torch.cuda.get_device_name(device)} has no bf16 arithmetic (needs Ampere or later). Use dtype=fp16."
            )

    @contextmanager
    def scope(self, device: torch.device) -> Iterator[None]:
        """Compute in this precision: autocast where it asks for it; on CUDA no TF32, which is not fp32."""
        with ExitStack() as stack:
            if device.type == "cuda":
                stack.enter_context(_no_tf32())
            if self.autocast is not None:
                stack.enter_context(torch.autocast(device.type, dtype=self.autocast))
            yield

    def as_dict(self) -> dict:
        """For a results file: dtypes as strings."""
        return {key: str(value) if isinstance(value, torch.dtype) else value for key, value in asdict(self).items()}

    def __str__(self) -> str:
        parts = {"weights": self.weights, "autocast": self.autocast or "off", "softmax": self.softmax}
        said = "; ".join(
            f"{key} {str(value).removeprefix('torch.')} ({self.reasons[key]})" for key, value in parts.items()
        )
        return f"{self.name}: {said}"


@contextmanager
def _no_tf32() -> Iterator[None]:
    """torch allows TF32 in cuDNN's convolutions by default: 10 bits of mantissa under the name of fp32."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
