"""Training steps whose kernels the host launches all at once: forward and backward of the layers as two CUDA graphs.

A LoRA step of a model with 48 layers launches about 5,000 kernels, and on a fast GPU the host needs longer for that
than the kernels for their work. Batches of one shape, as from packing, launch the same ones every time:

    peft_mamba.use_cuda_graphs(model)  # a model with our mixers; then train as ever

The layers, from behind the embeddings to before the last norm, are captured once a shape has come a few times in a
row, and replayed while it keeps coming. Embeddings, head and loss run as they are. Whatever a graph cannot do runs as
without one: other shapes, evaluation, generation, caches, hooks on modules, transformers' gradient checkpointing.

torch.cuda.make_graphed_callables is the same idea; its gradients of weights share memory with the graph, so that
accumulating them over several batches overwrites them, and it knows of one shape and one state of the modules.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from ..kernels import ENVIRONMENT_VARIABLE
from .block import Block, run_blocks
from .projection import GLOBAL_HOOKS
from .recomputation import autocast_like_now, in_other_hands
from .sequences import PackedSequences
from .state import PackedRows

Tensor = torch.Tensor

logger = logging.getLogger(__name__)

BACKBONES = (modeling_mamba.MambaModel, modeling_mamba2.Mamba2Model)
# A shape is captured when it comes for this time in a row: by then its kernels are compiled and tuned.
TIMES_IN_A_ROW = 3
# A capture costs a few steps. Where a graph was replayed less often than this before another shape came, as with
# batches sorted by length, the next shape has to come twice as often.
PAYS = 20
# Times that a state and shape must come again once it is known that nothing can be captured for them.
NEVER = -(2**62)
# A graph holds the gradients of weights a second time; of more weights than this share it is not worth that.
MOST_TRAINED = 0.25
# Layers whose forward is a graph of its own: launching one takes the host more than a microsecond a kernel, for which
# the GPU would wait at the start of a step. What these take is time enough to launch the rest.
FIRST_LAYERS = 4
# Bounds of packed documents are padded to a multiple of this, so that a graph takes batches of more and of fewer.
BOUNDS = 64


def use_cuda_graphs(model: nn.Module, enabled: bool = True) -> int:
    """Let the layers of every Mamba and Mamba-2 backbone in `model` that runs our mixers train through CUDA graphs.

    Holds for adapters on a model on one device; a graph takes the memory of one step for itself as long as its shape
    keeps coming, and an output and a second copy of the adapters' gradients; of weights that are moved while it is
    there, the memory where they were. What keeps a training forward from being captured is logged, once a reason.

    Args:
        enabled: False goes back to launching kernels one by one.

    Returns:
        How many backbones there are; 0 for a model without our mixers.
    """
    found = 0
    for backbone in model.modules():
        if not isinstance(backbone, BACKBONES) or not all(isinstance(block, Block) for block in backbone.layers):
            continue
        found += 1
        if isinstance(backbone.layers, GraphedLayers):
            backbone.layers.graphs = _Graphs() if enabled else None
        elif enabled:
            layers: Any = backbone.layers
            layers.__class__ = GraphedLayers
            layers.graphs, layers.as_one = _Graphs(), False
            backbone.register_forward_pre_hook(_before, with_kwargs=True)
            backbone.register_forward_hook(_after, always_call=True)
    return found


class GraphedLayers(nn.ModuleList):
    """A backbone's blocks, which in its forward are one block that may be a graph."""

    graphs: _Graphs | None
    as_one: bool

    def __iter__(self) -> Iterator[nn.Module]:
        if self.as_one and self.graphs is not None:
            return iter((functools.partial(self.graphs.run, list(super().__iter__())),))  # type: ignore[arg-type]
        return super().__iter__()


def _before(backbone: Any, args: tuple, kwargs: dict) -> None:
    inner = kwargs.get("output_hidden_states")
    backbone.layers.as_one = not (backbone.config.output_hidden_states if inner is None else inner)


def _after(backbone: Any, args: tuple, output: Any) -> None:
    backbone.layers.as_one = False


class _Graphs:
    """The graphs of one stack of blocks: of the shape that keeps coming, if any."""

    def __init__(self) -> None:
        self._graph: _StackGraph | None = None
        self._last: Any = None
        self._times = 0
        self._wanted = TIMES_IN_A_ROW
        self._reasons: set[str] = set()

    def __reduce__(self) -> Any:
        return _Graphs, ()  # copies of a model, and files, begin without any

    def run(
        self, blocks: list[Any], hidden_states: Tensor, cache_params: Any = None, attention_mask: Any = None, **kwargs
    ) -> Tensor:
        """All blocks, one after the other."""
        trains = torch.is_grad_enabled() and all(block.training for block in blocks) and cache_params is None
        inputs = _tensors(attention_mask, kwargs)
        eager = torch.compiler.is_compiling() or not hidden_states.is_cuda or torch.cuda.is_current_stream_capturing()
        if trains and inputs is not None and not eager:
            # What a graph does touches nothing but its own memory, so the last one may begin before it is known
            # whether it is the right one: to find that out takes the host milliseconds, for which the GPU would wait.
            begun = self._graph
            if begun is not None and not begun.begin(hidden_states, inputs):
                begun = None
            graph = self._find(blocks, hidden_states, inputs)
            if begun is not None and graph is not begun:
                begun.take_back()
            if graph is not None:
                return graph(hidden_states, inputs)
        return run_blocks(blocks, hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs)

    def _find(self, blocks: list[Block], hidden_states: Tensor, inputs: Mapping[str, Tensor]) -> _StackGraph | None:
        """The graph to use for this forward; None: run it without."""
        state = _state_of(blocks)
        if isinstance(state, str):
            self._say(state)
            return None
        key = (state, _shape_of(hidden_states, inputs), _settings(hidden_states.device.type))
        if self._graph is not None:
            if self._graph.waits():
                return None  # a second forward before the first one's backward, which would read what this one writes
            if self._graph.takes(key, inputs):
                return self._graph
            if self._graph.replays < PAYS:
                self._wanted *= 2
            self._graph = None  # the batch that differs needs the memory
        self._times = self._times + 1 if key == self._last else 1
        self._last = key
        if self._times < self._wanted:
            return None
        if (reason := _why_not(blocks)) is not None:
            self._times = NEVER
            self._say(reason)
            return None
        try:
            self._graph = _StackGraph(key, blocks, hidden_states, inputs)
        except RuntimeError as error:
            self._times = NEVER
            _forget_capture(hidden_states.device)
            why = "there is no memory for them" if isinstance(error, torch.OutOfMemoryError) else "they fail"
            self._say(f"{why} ({error})", logging.WARNING)
            return None
        logger.info("CUDA graphs of the layers for batches of %s tokens", " x ".join(map(str, hidden_states.shape[:2])))
        return self._graph

    def _say(self, reason: str, level: int = logging.INFO) -> None:
        if reason not in self._reasons:
            self._reasons.add(reason)
            logger.log(level, "No CUDA graphs in training: %s", reason)


class _StackGraph:
    """Forward and backward of blocks, captured for inputs of one shape, with buffers that both start and end in."""

    def __init__(self, key: Any, blocks: list[Any], hidden_states: Tensor, inputs: Mapping[str, Tensor]) -> None:
        self._key = key
        gc.collect()
        torch.cuda.empty_cache()  # the graphs cannot use what the steps before have left to the allocator
        device = hidden_states.device
        self._generator = _generator(device)
        self._drawn: int | None = None  # random numbers drawn before a forward that has begun
        # Their memory is held: a replay that turns out to be of no use may be the first since weights have moved.
        self._read = [each.detach() for each in _weights(blocks)]
        self._x = hidden_states.detach().clone().requires_grad_(hidden_states.requires_grad)
        self._inputs = {name: _room_for(name, tensor) for name, tensor in inputs.items()}
        self._fill(hidden_states, inputs)
        self._parameters = _trained(blocks)
        self._forward: list[torch.cuda.CUDAGraph] = []
        self._backward = torch.cuda.CUDAGraph()
        self._step: weakref.ref[_Step] | None = None
        self.replays = 0
        pool = torch.cuda.graph_pool_handle()
        mode = "thread_local"  # other threads, such as NCCL's watchdog, may go on asking the device
        # Casts of weights belong to the graph, which makes them anew at every replay.
        precision = autocast_like_now("cuda")
        rows = _rows(self._inputs)
        with torch.cuda.device(device), _as_other_leaves(blocks) as leaves:
            y = self._x
            for part in filter(None, (blocks[:FIRST_LAYERS], blocks[FIRST_LAYERS:])):
                self._forward.append(torch.cuda.CUDAGraph())
                with torch.cuda.graph(self._forward[-1], pool=pool, capture_error_mode=mode), precision():
                    y = run_blocks(part, y, attention_mask=rows)
            # The output, of which a copy has been handed out by then, gives its gradient its memory. Were it saved for
            # backward, autograd would find it changed there, and there would be no graph.
            self._y = self._dy = y.detach().zero_()
            wanted = [self._x, *leaves] if self._x.requires_grad else leaves
            # In this thread, whose handle for matrix products has its 32 MiB of workspace in the pool already.
            one_thread = torch.autograd.set_multithreading_enabled(False)
            with one_thread, torch.cuda.graph(self._backward, pool=pool, capture_error_mode=mode):
                gradients = torch.autograd.grad(y, wanted, self._dy, allow_unused=True)
        self._dx = gradients[0] if hidden_states.requires_grad else None
        of_parameters = gradients[1:] if hidden_states.requires_grad else gradients
        self._used = [each is not None for each in of_parameters]
        self._gradients = [each.flatten() for each in of_parameters if each is not None]

    def takes(self, key: Any, inputs: Mapping[str, Tensor]) -> bool:
        return key == self._key and self._has_room(inputs)

    def _has_room(self, inputs: Mapping[str, Tensor]) -> bool:
        return all(len(tensor) <= len(self._inputs[name]) for name, tensor in inputs.items())

    def waits(self) -> bool:
        """Whether the backward of the last forward may still come."""
        step = None if self._step is None else self._step()
        return step is not None and not step.done

    def begin(self, hidden_states: Tensor, inputs: Mapping[str, Tensor]) -> bool:
        """Launch the forward if inputs fit it, and say whether."""
        self._drawn = None
        fits = (_shape_of(hidden_states, inputs), _settings(hidden_states.device.type)) == self._key[1:]
        if not fits or self.waits() or not self._has_room(inputs):
            return False
        self._drawn = self._generator.get_offset()
        self._replay_forward(hidden_states, inputs)
        return True

    def take_back(self) -> None:
        """A forward that has begun is not wanted, nor are the random numbers that it drew."""
        assert self._drawn is not None
        self._generator.set_offset(self._drawn)
        self._drawn = None

    def __call__(self, hidden_states: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        if self._drawn is None:
            self._replay_forward(hidden_states, inputs)
        self._drawn = None
        return _Replay.apply(self, hidden_states, *self._parameters)

    def _replay_forward(self, hidden_states: Tensor, inputs: Mapping[str, Tensor]) -> None:
        self._fill(hidden_states.detach(), inputs)
        for part in self._forward:
            part.replay()

    def _fill(self, hidden_states: Tensor, inputs: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self._x.copy_(hidden_states)
            for name, tensor in inputs.items():
                buffer = self._inputs[name]
                buffer[: len(tensor)] = tensor
                buffer[len(tensor) :] = tensor[-1:]  # documents without tokens

    def forward(self, step: _Step) -> Tensor:
        self._step = weakref.ref(step)
        self.replays += 1
        return self._y.clone()

    def backward(self, dy: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        self._dy.copy_(dy)
        self._backward.replay()
        # Copies, as the next replay writes into the same memory and these may become, or be added to, a `.grad`.
        copies = iter(torch.cat(self._gradients).split([len(each) for each in self._gradients]))
        of_parameters = [
            next(copies).view_as(parameter) if used else None
            for parameter, used in zip(self._parameters, self._used, strict=True)
        ]
        return None if self._dx is None else self._dx.clone(), of_parameters


def _forget_capture(device: torch.device) -> None:
    """Let random numbers be drawn again: where a capture fails, the generator is left believing that it goes on."""
    generator = _generator(device)
    generator.graphsafe_set_state(generator.clone_state())


def _generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


class _Step:
    """One forward that waits for its backward, as long as anything holds it."""

    done = False


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph, x, *parameters):
        ctx.graph, ctx.step = graph, _Step()
        return graph.forward(ctx.step)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # type: ignore[override]  # mypy sees the decorator, not the method
        if ctx.step.done:
            raise RuntimeError(
                "A second backward through the same forward: a CUDA graph keeps nothing for it. Train without "
                "peft_mamba.use_cuda_graphs where retain_graph=True is needed."
            )
        ctx.step.done = True
        dx, of_parameters = ctx.graph.backward(dy)
        return None, dx, *of_parameters


def _tensors(mask: Any, kwargs: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The tensors that blocks read beside their input; None where states are read and left on the way."""
    named = {"attention_mask": mask, "seq_idx": kwargs.get("seq_idx"), "cu_seqlens": kwargs.get("cu_seqlens")}
    if isinstance(mask, PackedRows):
        named = mask._asdict()
    if isinstance(mask, PackedSequences) or kwargs.get("sequences") is not None:
        return None
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _rows(inputs: Mapping[str, Tensor]) -> Tensor | PackedRows | None:
    """What blocks of both families take as attention_mask."""
    if "seq_idx" not in inputs:
        return inputs.get("attention_mask")
    return PackedRows(inputs.get("attention_mask"), inputs["seq_idx"], inputs.get("cu_seqlens"))


def _room_for(name: str, tensor: Tensor) -> Tensor:
    if name != "cu_seqlens":
        return torch.empty_like(tensor)
    # By half more documents than now: how many there are in so many tokens varies.
    return tensor.new_empty(-(-(len(tensor) + len(tensor) // 2) // BOUNDS) * BOUNDS)


def _walk(blocks: list[Any]) -> Iterator[nn.Module]:
    """Every module in them that computes; `modules()` takes ten times as long, which shows in every step."""
    stack: list[nn.Module] = list(reversed(blocks))
    while stack:
        module = stack.pop()
        yield module
        held: Any = module._modules
        if type(module) is LoraLinear and not module.lora_variant:
            # Half of all modules are the dictionaries that PEFT keeps in a layer for each kind of weight it may have.
            stack.append(held["base_layer"])
            for name in ("lora_A", "lora_B", "lora_dropout"):
                stack.extend(held[name]._modules.values())
        else:
            stack.extend(each for each in held.values() if each is not None)


def _weights(blocks: list[Block]) -> list[nn.Parameter]:
    """All of them, each once."""
    every = (each for module in _walk(blocks) for each in module._parameters.values())
    return list(dict.fromkeys(each for each in every if each is not None))


def _trained(blocks: list[Block]) -> list[nn.Parameter]:
    """Weights that get a gradient, each once."""
    return [each for each in _weights(blocks) if each.requires_grad]


@contextlib.contextmanager
def _as_other_leaves(blocks: list[Block]) -> Iterator[list[nn.Parameter]]:
    """In place of the trained weights, in the order of `_trained`, parameters that share their memory.

    Autograd knows the weights themselves from the stream of the steps before, and DDP holds on to that: a backward that
    is being captured would wait there.
    """
    others = {each: nn.Parameter(each.detach()) for each in _trained(blocks)}
    places = [
        (module._parameters, name, each)
        for module in _walk(blocks)
        for name, each in module._parameters.items()
        if each in others
    ]
    try:
        for parameters, name, each in places:
            parameters[name] = others[each]
        yield list(others.values())
    finally:
        for parameters, name, each in places:
            parameters[name] = each


class _Kind(NamedTuple):
    """What `_state_of` asks of a module beside what it asks of all."""

    tuner: bool
    dropout: bool
    block: bool


@functools.cache
def _kind(module: Any) -> _Kind | None:
    """Of a class: some of this is costly to ask."""
    kind = _Kind(*(issubclass(module, each) for each in (BaseTunerLayer, nn.Dropout, Block)))
    return kind if any(kind) else None


def _state_of(blocks: list[Block]) -> tuple | str:
    """All that decides which kernels blocks launch on which memory, beside their input; or why they cannot be captured.

    Asked of every module in every step, while the GPU waits: of the modules' dictionaries, and nothing twice.
    """
    if in_other_hands():
        return "saved tensors are handed elsewhere (an outer checkpoint, offloading)"
    if any(GLOBAL_HOOKS):
        return "there are hooks for all modules"
    state: list[Any] = []
    module: Any
    for module in _walk(blocks):
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return f"{type(module).__name__} has hooks"
        if "forward" in own:
            return f"{type(module).__name__} has a forward of its own"
        state.append(own["training"])
        for each in own["_parameters"].values():
            if each is not None:
                state += each.data_ptr(), each.dtype, each.requires_grad
        what: Any = type(module)
        kind = _kind(what)
        if kind is None:
            continue
        if kind.tuner:
            scaling: Any = getattr(module, "scaling", {})
            state.append((tuple(module.active_adapters), module.disable_adapters, tuple(module.merged_adapters)))
            state.append(tuple(scaling.items()))
        elif kind.dropout:
            state.append(module.p)
        elif kind.block:
            state.append(module.recompute)
            if module.gradient_checkpointing:
                return (
                    'transformers\' gradient checkpointing is on; peft_mamba.recompute(model, "block") can be instead'
                )
            if module.recompute == "block" and module.draws():
                return "dropout in layers that run again needs its random state, which a capture cannot ask for"
    return tuple(state)


def _why_not(blocks: list[Block]) -> str | None:
    """Why blocks that `_state_of` has nothing against cannot be captured for the weights that are trained."""
    trained = _trained(blocks)
    if not trained:
        return "no weight of the layers is trained"
    if sum(each.numel() for each in trained) > MOST_TRAINED * sum(each.numel() for each in _weights(blocks)):
        return f"more than {MOST_TRAINED:.0%} of the layers' weights are trained, whose gradients it would hold twice"
    if len({(each.dtype, each.device) for each in trained}) > 1:
        return "the trained weights have several dtypes or lie on several devices"
    return None


def _shape_of(hidden_states: Tensor, inputs: Mapping[str, Tensor]) -> tuple:
    shapes = [(n, t.dtype, () if n == "cu_seqlens" else tuple(t.shape)) for n, t in inputs.items()]
    return tuple(hidden_states.shape), hidden_states.dtype, hidden_states.requires_grad, tuple(shapes)


def _settings(device: str) -> tuple:
    return (
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        os.environ.get(ENVIRONMENT_VARIABLE),
        torch.are_deterministic_algorithms_enabled(),
    )
