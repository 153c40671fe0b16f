"""How long a Mamba's recurrence remembers a small error: Lyapunov exponents, and what a perturbation does in fact.

The state of a mixer follows x_t = Ā_t x_{t-1} + B̄_t u_t with Ā_t = exp(Δ̄_t A), diagonal, A = -exp(A_log) < 0 and
Δ̄_t = softplus(Δ_t + bias) ≥ 0. The Jacobian of x_T by x_0 is the product of the Ā_t, so the exponent of coordinate i is
A[i,i] · mean_t Δ̄_t[i,i], and the maximal Lyapunov exponent of the layer

    λ_max = max_i A[i,i] · mean_t Δ̄_t[i,i]

in nats per token, as in "Mamba State-Space Models Are Lyapunov-Stable Learners" (2406.00209). It is never positive:
over a text of L tokens a deviation ε of the state becomes at most ε·exp(L·λ_max), for the same inputs. That the inputs
of later layers, and with them Δ̄ and B̄, change with a perturbed text is not in it; `growth` measures what comes of that.

    stability = analyse(model, input_ids)
    stability.layers[0].maximal, stability.growth[0].output
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from .kernels.reference import accumulator_dtype, step_size
from .mixers import MambaMixer, mixers_of, use_mixers
from .precision import Precision

Tensor = torch.Tensor

PRECISIONS = ("fp32", "fp16", "bf16")
QUANTILES = (0.05, 0.5, 0.95)


class StabilityError(ValueError):
    """A model, a text or a perturbation of which there is nothing to measure; the message says what is expected."""


@dataclass(frozen=True)
class LayerExponents:
    """The Lyapunov exponents of one mixer, in nats per token; never positive.

    A unit is a channel (Mamba-1), with the largest exponent of its N states, or a head (Mamba-2), all of whose states
    share one.

    Attributes:
        name: of the mixer in the model.
        units: how many channels or heads.
        maximal: λ_max, the largest over units. minimal: the smallest over units.
        quantiles: 5%, 50% and 95% over units, in that order.
        near_zero: share of units with λ > -1/L for a text of L tokens: of a deviation of their state more than 1/e is
            left at its end.
    """

    name: str
    units: int
    maximal: float
    quantiles: tuple[float, float, float]
    minimal: float
    near_zero: float


@dataclass(frozen=True)
class Growth:
    """What became of a perturbation in one precision: |perturbed - plain| / |plain| (Euclidean norms).

    Not a number where the plain value is zero or not finite.

    Attributes:
        precision: name of the precision that both runs computed in.
        times: tokens read when the deviation was taken, the perturbed one included.
        states: mixer's name to the deviation of its SSM state at each time.
        output: of the logits for the next token, at each time.
    """

    precision: str
    times: tuple[int, ...]
    states: dict[str, tuple[float, ...]]
    output: tuple[float, ...]


@dataclass(frozen=True)
class Stability:
    """What `analyse` found: exponents of every layer, computed in fp32, and the growth in each precision."""

    tokens: int
    epsilon: float
    seed: int
    layers: tuple[LayerExponents, ...]
    growth: tuple[Growth, ...]


def analyse(
    model: nn.Module,
    input_ids: Tensor,
    *,
    epsilon: float = 1e-3,
    precisions: Sequence[Precision | str] = PRECISIONS,
    times: Sequence[int] | None = None,
    seed: int = 0,
) -> Stability:
    """The Lyapunov exponents of all mixers on a text, and the growth of a perturbation of its first token.

    Adapters on the model take part. Its mixers become ours, as by `use_mixers`.

    Args:
        model: a MambaForCausalLM or Mamba2ForCausalLM with fp32 weights, in eval mode, with or without PEFT adapters.
        input_ids: (L,) int, the text.
        epsilon, seed: the perturbation, see `growth`.
        precisions: in which its growth is measured.
        times: when, ascending, in 1 … L; default powers of two and L.

    Raises:
        StabilityError: the model has no Mamba mixer, has prompt tokens of its own or is in training mode; input_ids is
            not one row of tokens; epsilon is not positive or times are not ascending in 1 … L.
        PrecisionError: a precision has no meaning, or the model's device cannot compute in it.
        KernelError: kernels were forced that cannot run on the model's device.
    """
    if not mixers_of(model):
        raise StabilityError(f"{type(model).__name__} has no Mamba or Mamba-2 mixer; give a model of these families.")
    if model.training:
        raise StabilityError("The model is in training mode, where dropout changes every run: call model.eval() first.")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise StabilityError("The adapter puts prompt tokens before every segment of a text; give a LoRA or none.")
    if input_ids.ndim != 1 or not len(input_ids):
        raise StabilityError(f"input_ids has shape {tuple(input_ids.shape)}; expected (tokens,) with at least one.")
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise StabilityError(f"epsilon={epsilon} perturbs nothing that can be measured; give a number above 0: 1e-3.")
    times = tuple(default_times(len(input_ids)) if times is None else times)
    if not times or times[0] < 1 or times[-1] > len(input_ids) or tuple(sorted(set(times))) != times:
        raise StabilityError(f"times={times} must ascend within 1 … {len(input_ids)}, the tokens of the text.")
    device = next(model.parameters()).device
    parsed = [each if isinstance(each, Precision) else Precision.parse(each) for each in precisions]
    for precision in parsed:
        precision.check_device(device)
    use_mixers(model)
    input_ids = input_ids.to(device)
    with torch.inference_mode():
        with Precision.parse("fp32").scope(device), record_exponents(model) as found:
            model(input_ids[None], use_cache=False, logits_to_keep=1)
        layers = tuple(summarise(name, found[name], len(input_ids)) for name, _ in mixers_of(model))
        measured = tuple(growth(model, input_ids, each, epsilon=epsilon, times=times, seed=seed) for each in parsed)
    return Stability(len(input_ids), epsilon, seed, layers, measured)


def exponents(A: Tensor, dt: Tensor) -> Tensor:
    """λ = A · mean_t Δ̄_t of every coordinate of the state (2406.00209), in nats per token.

    Args:
        A: (D, N) or (H,), negative.
        dt: (..., L, D) or (..., L, H), the step sizes Δ̄ themselves: bias, softplus and limits are already in them.
            Leading dimensions are averaged over, too.

    Returns:
        Like A, in float64 on the CPU, so that the mean over a long text is exact.
    """
    mean = dt.detach().cpu().double().flatten(0, -2).mean(0)
    A = A.detach().cpu().double()
    return A * mean.reshape(-1, *[1] * (A.ndim - 1))


def summarise(name: str, exponents: Tensor, tokens: int) -> LayerExponents:
    """The distribution of a layer's exponents, (D, N) or (H,), over its channels or heads; `tokens` is L."""
    units = exponents.flatten(1).amax(1) if exponents.ndim > 1 else exponents
    low, median, high = torch.quantile(units, units.new_tensor(QUANTILES)).tolist()
    return LayerExponents(
        name,
        len(units),
        units.max().item(),
        (low, median, high),
        units.min().item(),
        (units > -1 / tokens).double().mean().item(),
    )


@contextmanager
def record_exponents(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within it, a forward of `model` leaves the `exponents` of each mixer, by its name, in the dict.

    The step sizes are taken from what the mixers' own projections give, adapters included. Needs our mixers
    (`use_mixers`): transformers' own pass the weights of dt_proj to kernels, past the module.
    """
    found: dict[str, Tensor] = {}
    handles = [_watch(name, mixer, found) for name, mixer in mixers_of(model)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _watch(name: str, mixer: Any, found: dict[str, Tensor]) -> Any:
    A = -torch.exp(mixer.A_log.detach().to(accumulator_dtype(mixer.A_log)))
    # Read here and not in the hook: while MambaMixer calls dt_proj, zeros stand in for its bias.
    bias = mixer.dt_proj.bias if isinstance(mixer, MambaMixer) else mixer.dt_bias

    def mamba(module: nn.Module, args: Any, output: Tensor) -> None:
        found[name] = exponents(A, step_size(output, bias, None))

    def mamba2(module: nn.Module, args: Any, output: Tensor) -> None:
        dt = output[..., -mixer.num_heads :]
        found[name] = exponents(A, F.softplus(dt.to(accumulator_dtype(dt)) + bias).clamp(*mixer.time_step_limit))

    if isinstance(mixer, MambaMixer):
        return mixer.dt_proj.register_forward_hook(mamba)
    return mixer.in_proj.register_forward_hook(mamba2)


def default_times(tokens: int) -> list[int]:
    """Powers of two below `tokens`, and `tokens`."""
    return [*(2**k for k in range((tokens - 1).bit_length())), tokens]


def growth(
    model: nn.Module, input_ids: Tensor, precision: Precision, *, epsilon: float, times: Sequence[int], seed: int = 0
) -> Growth:
    """Deviations of states and output over time, when the embedding of the first token is off by ε of its length.

    One token is perturbed, as in the theorem (2406.00209), so that what is seen later is the past alone: the embedding
    e becomes e + ε·|e|·v, v the unit vector in a direction drawn with `seed`. Both runs go forward from one time to
    the next with the model's cache, which holds the mixers' states: they are those of the actual kernels, and of a
    whole forward.

    Args:
        model, input_ids, epsilon, times, seed: as for `analyse`; the model has our mixers, input_ids are on its device.
        precision: of both runs.

    Raises:
        StabilityError: the first token's embedding is zero, so that it has no length to take ε of.
    """
    mixers: list[tuple[str, Any]] = [(name, mixer.layer_idx) for name, mixer in mixers_of(model)]
    causal: Any = model
    rows: list[tuple[float, ...]] = []
    with torch.inference_mode(), precision.scope(input_ids.device):
        plain = causal.get_input_embeddings()(input_ids[None])
        if not plain[0, 0].any():
            raise StabilityError(f"The embedding of the first token ({input_ids[0]}) is zero; take other text.")
        direction = torch.randn(plain.shape[-1], generator=torch.Generator().manual_seed(seed)).to(plain)
        perturbed = plain.clone()
        perturbed[:, 0] += epsilon * plain[0, 0].norm() * direction / direction.norm()
        runs = [(embeddings, DynamicCache(config=causal.config)) for embeddings in (plain, perturbed)]
        for start, stop in zip((0, *times[:-1]), times, strict=True):
            logits = [
                causal(
                    inputs_embeds=embeddings[:, start:stop], cache_params=cache, use_cache=True, logits_to_keep=1
                ).logits
                for embeddings, cache in runs
            ]
            states = [[cache.get_recurrent_state(layer) for _, layer in mixers] for _, cache in runs]
            pairs = [*zip(*states, strict=True), logits]
            rows.append(tuple(relative_deviation(theirs, ours) for ours, theirs in pairs))
    *of_states, output = zip(*rows, strict=True)
    names = [name for name, _ in mixers]
    return Growth(precision.name, tuple(times), dict(zip(names, of_states, strict=True)), output)


def relative_deviation(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, in fp32 or better; not a number where expected is zero or not finite."""
    expected = expected.to(accumulator_dtype(expected))
    return ((actual.to(expected.dtype) - expected).norm() / expected.norm()).item()
