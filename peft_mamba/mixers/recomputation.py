"""What a block keeps for its backward, and what it makes again there: a choice between memory and time.

    none    everything that backward reads
    mixer   what is dear to make again: the outputs of the large products and of the scan. Norm, convolution and step
            sizes (a product with a few dozen columns) are made again from them
    block   the block's input alone; all but its last product runs again in backward (gradient checkpointing)

    recompute(model, "block")   # sets it, on a model with our mixers; the default is "mixer"

It holds for training alone, where no cache is written. transformers' own gradient checkpointing, as trainers switch it
on, goes before it and is "block" but for that last product.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

from ..kernels.room import as_gradient_of, shares

Tensor = torch.Tensor

logger = logging.getLogger(__name__)

LEVELS = ("none", "mixer", "block")
DEFAULT = "mixer"

_again: ContextVar[bool] = ContextVar("again", default=False)
_count: ContextVar[Callable[[Tensor], Any] | None] = ContextVar("count", default=None)
_remakes: ContextVar[Remakes | None] = ContextVar("remakes", default=None)


class RecomputeError(ValueError):
    """A level that does not exist; the message names those there are."""


def check_level(level: str) -> None:
    """Raises RecomputeError unless `level` is one."""
    if level not in LEVELS:
        raise RecomputeError(f"There is no level {level!r} of recomputation; there are {', '.join(LEVELS)}.")


def runs_again() -> bool:
    """Whether this runs for the second time, in a backward, for what that reads."""
    return not torch.compiler.is_compiling() and _again.get()


@contextlib.contextmanager
def _running_again(again: bool = True) -> Iterator[None]:
    token = _again.set(again)
    try:
        yield
    finally:
        _again.reset(token)


def can_be_remade(tensor: Tensor, make: Callable[[], Tensor]) -> None:
    """Where a level of recomputation is on: keep `make`, which gives these values again, instead of `tensor`."""
    if torch.compiler.is_compiling():
        return
    if (remakes := _remakes.get()) is not None:
        remakes.offer(tensor, make)


def remakes_some() -> bool:
    """Whether some of what is saved here is to be made again, so that nothing else should hold its memory."""
    return _remakes.get() is not None


def in_other_hands() -> bool:
    """Whether someone else decides here what becomes of saved tensors: an outer checkpoint, offloading to the CPU."""
    if _count.get() is not None:
        return False
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def kept_for_backward(run: Callable[[], Any], apart_from: Iterable[Tensor] = ()) -> int:
    """Bytes of all storages that a backward of what `run` computes would read, less those of `apart_from`.

    At the level block that is the input of each block; what a block makes again in its backward is not in it.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    ignored = {tensor.untyped_storage().data_ptr() for tensor in apart_from}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            storages[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    token = _count.set(keep)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = run()  # held until all is counted
    finally:
        _count.reset(token)
    del result
    return sum(storage.nbytes() for storage in storages.values())


def checkpointed(
    run: Callable[[Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    parameters: Iterable[Tensor],
    *,
    draws: bool,
    add: Callable[[Tensor, Tensor], Tensor] = torch.add,
) -> Tensor:
    """The sum of both results of `run(x)`, keeping x alone for backward.

    torch.utils.checkpoint would do, at the price of a call of Python for every tensor that is saved, and of the last
    product and sum, which nothing reads when it runs again; on small models that is a quarter of a step.

    Args:
        run: asks `runs_again` whether its results are still wanted.
        parameters: all tensors that get a gradient through `run`, beside x.
        draws: whether it draws random numbers, which are then the same the second time.
        add: makes the sum.
    """
    return _Checkpointed.apply(run, draws, add, x, *parameters)


class Checkpoints:
    """Memory for what a stack of checkpoints keeps, in one piece.

    One by one they would take the places of what earlier layers have let go of; where sizes differ a little the pieces
    of an allocator fit the next layer's tensors no more, and each layer takes new ones.

    Args:
        count: of tensors like `x`.
        dtype: of these.
    """

    def __init__(self, count: int, x: Tensor, dtype: torch.dtype) -> None:
        self._left = iter(x.new_empty(count, *x.shape, dtype=dtype))
        self._shape, self._dtype = x.shape, dtype

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b, in this memory as long as there is some."""
        fits = torch.promote_types(a.dtype, b.dtype) == self._dtype and a.shape == self._shape
        piece = next(self._left, None) if fits else None
        return a + b if piece is None else torch.add(a, b, out=shares(piece, piece.shape, piece.stride(), 0))


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, draws, add, x, *parameters):
        ctx.save_for_backward(x, *parameters)
        ctx.run, ctx.autocast = run, autocast_like_now(x.device.type)
        ctx.random = _RandomState(x) if draws else None
        residual, mixed = run(x)
        return add(residual, mixed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[override]  # mypy sees the decorator, not the method
        x, *parameters = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[3])
        random = contextlib.nullcontext() if ctx.random is None else ctx.random.again()
        with torch.enable_grad(), ctx.autocast(), random, _running_again():
            results = [result for result in ctx.run(x) if result.requires_grad]
        inputs = [each for each in (x, *parameters) if each.requires_grad]
        of_results = [as_gradient_of(each, dy) for each in results]
        gradients = iter(torch.autograd.grad(results, inputs, of_results, allow_unused=True))
        return None, None, None, *(next(gradients) if each.requires_grad else None for each in (x, *parameters))


class _RandomState:
    """Of the CPU and of a tensor's device."""

    def __init__(self, x: Tensor) -> None:
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(x)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        with torch.random.fork_rng(self._devices, enabled=True):
            torch.set_rng_state(self._cpu)
            set_device_states(self._devices, self._states)
            yield


class Remakes:
    """Saved tensors that are replaced by the way to make them again, for a stretch of the forward.

    A tensor is known by its storage, so that what a kernel saves may be any view of it. Made again it is held until the
    last of its uses, since several functions read the same one in their backward.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Remade] = {}

    def offer(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        if tensor.numel():  # all empty storages have one address
            self._known[tensor.untyped_storage().data_ptr()] = _Remade(tensor, make)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        token = _remakes.set(self)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            _remakes.reset(token)
            for each in self._known.values():
                each.forward_ends()
            self._known.clear()  # from here on an address may belong to another tensor

    def _pack(self, tensor: Tensor) -> Any:
        remade = self._known.get(tensor.untyped_storage().data_ptr())
        if remade is None:
            if (count := _count.get()) is not None:
                count(tensor)
            return tensor
        remade.uses += 1
        return remade, tensor.size(), tensor.stride(), tensor.storage_offset()


class _Remade:
    def __init__(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        self.uses = 0
        self._make = make
        self._layout = (tensor.size(), tensor.stride(), tensor.storage_offset())
        self._autocast = autocast_like_now(tensor.device.type)
        self._alive: Tensor | None = tensor  # holds the storage, so that no other tensor gets its address
        self._value: Tensor | None = None

    def forward_ends(self) -> None:
        self._alive = None

    def take(self) -> Tensor:
        if self._value is None:
            with torch.no_grad(), self._autocast(), _running_again():
                self._value = self._make()
            made = (self._value.size(), self._value.stride(), self._value.storage_offset())
            assert made == self._layout, f"made again as {made}, was {self._layout}"
        value = self._value
        self.uses -= 1
        if self.uses <= 0:
            self._value = None
        return value


def autocast_like_now(device: str) -> Callable[[], torch.autocast]:
    """Makes contexts of the autocast that is in force, without its cache of weights."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return functools.partial(torch.autocast, device, dtype=dtype, enabled=enabled, cache_enabled=False)


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    remade, size, stride, offset = packed
    return remade.take().as_strided(size, stride, offset)


def recompute(model: nn.Module, level: str) -> int:
    """Set the level of every block of `model` that runs our mixer.

    Returns:
        How many blocks there are; 0 for a model without our mixers.

    Raises:
        RecomputeError: there is no such level.
    """
    from .block import Block

    check_level(level)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.recompute = level
    if blocks:
        logger.info("%d blocks, recompute %s", len(blocks), level)
    return len(blocks)
