"""From a PyTorch model to :class:`~fastpar.graph.program.Program`.

:func:`compile_fx` is the body of the ``torch.compile`` backend: Dynamo's graph
in, a runner out, with the Program handed to ``finish`` in between.
:func:`capture` runs a model once and keeps every Program with its arguments and
results, for ``verify``, ``explain`` and tests.

**Shapes and numbers.** With ``dynamic=None`` Dynamo gives a second resolution as
symbols. A symbol that occurs in the shape of any tensor, of an input or in
between, is specialised here (Dynamo then guards on it): one program per shape,
with plain integers. Integers and floats that are only values, such as a
timestep, stay inputs. Sizes that tensors' values decide: :mod:`fastpar.graph.sizes`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed, exceptions_allowed_to_be_fallback
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from fastpar.core.errors import CaptureError
from fastpar.graph.decompose import TABLE
from fastpar.graph.devices import accelerator, on_one_device
from fastpar.graph.fakes import fake_of, mode_of
from fastpar.graph.modules import name_modules
from fastpar.graph.normalise import keep_whole
from fastpar.graph.program import Input, Kind, Program, copy_module
from fastpar.graph.reads import reads_of, symbols
from fastpar.graph.scalars import floats_as_tensors, numbers_as_indices, scalar_tensors_stay
from fastpar.graph.scores import replace_written
from fastpar.graph.sizes import Sized, fill
from fastpar.graph.tidy import tidy
from fastpar.graph.unbroken import unbroken

Runner = Callable[[list[Any]], Sequence[Any]]
Finish = Callable[[Program], Runner]

RECOMPILE_LIMIT = 1024
_limits_lock = threading.Lock()


def raise_recompile_limits() -> None:
    """Let Dynamo compile as many shapes as the user brings.

    Every resolution is a program of its own. Past its limit of 8 Dynamo would
    run the model eagerly with only a warning: on one device, slowly, and where
    ranks reach the limit at different calls, against ranks that communicate.
    The limits are global; they are only ever raised.
    """
    config = torch._dynamo.config
    with _limits_lock:
        config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * RECOMPILE_LIMIT)


def compile_fx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    finish: Finish,
    later: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Callable[..., Any]:
    """Compile one Dynamo graph: build its :class:`Program` and run what ``finish`` makes of it.

    ``finish(program)`` is called once and returns the runner: a function from
    the list of flat inputs (which it may empty, to free them early) to the
    sequence of outputs. Returns what a ``torch.compile`` backend must return.
    Where tensors decide sizes (:mod:`~fastpar.graph.sizes`), programs are built,
    and finished, in the calls that first meet their sizes, inside ``later()``.

    Raises :class:`CaptureError` when the graph would need gradients or has
    inputs on several accelerators, ``Broken`` where reads of tensors' values
    should split it.
    """
    raise_recompile_limits()
    _check_gradients(gm)
    described = [describe(node) for node in gm.graph.find_nodes(op="placeholder")]
    accelerator(zip((i.name for i in described), example_inputs, strict=True))
    gm = copy_module(gm)
    numbers_as_indices(gm)
    reads = reads_of(gm, described)
    read = symbols([node.meta["example_value"] for node in reads], known=True)
    examples = _specialise(gm, example_inputs, read)
    if not reads:
        return _compile(gm, examples, described, finish)

    def compile(gm: fx.GraphModule, examples: list[Any], inputs: list[Input]) -> Callable[..., Any]:
        with later():
            return _compile(gm, examples, inputs, finish)

    return Sized(gm, example_inputs, examples, described, reads, compile)


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], described: Sequence[Input], finish: Finish
) -> Callable[..., Any]:
    """One graph whose sizes are all known."""
    floats_as_tensors(gm)
    notes = keep_whole(gm)

    def inference(flat: fx.GraphModule, flat_inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
        runner = finish(_program(flat, described, notes))

        run: Any = functools.partial(runner)
        run._boxed_call = True  # AOT then passes a list, which the runner may empty
        return run

    def training(flat: fx.GraphModule, flat_inputs: Sequence[Any]) -> Any:
        raise CaptureError(_GRADIENTS)

    compiler = aot_autograd(
        fw_compiler=training,
        bw_compiler=training,
        inference_compiler=inference,
        decompositions=TABLE,
        keep_inference_input_mutations=False,
    )
    try:
        with scalar_tensors_stay(gm):
            return compiler(gm, example_inputs)
    except exceptions_allowed_to_be_fallback as error:
        # Dynamo would take these as a wish to run this graph eagerly, and say so only in its log.
        raise CaptureError(f"this graph cannot be traced without values of its tensors: {error}") from error


_GRADIENTS = (
    "fastpar compiles inference only, but this graph would need gradients: gradient mode is on and an "
    "input or parameter requires them. Call the model under torch.no_grad() or torch.inference_mode()"
)


def _check_gradients(gm: fx.GraphModule) -> None:
    if not torch.is_grad_enabled():
        return
    results: list[Any] = []
    fx.node.map_arg(gm.graph.output_node().args, results.append)
    for node in results:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise CaptureError(_GRADIENTS)


def describe(node: fx.Node) -> Input:
    """What a placeholder of a Dynamo graph stands for, from Dynamo's source of it."""
    source = getattr(node, "_dynamo_source", None)
    text = getattr(source, "name", "") if source is not None else ""
    text = text() if callable(text) else text
    value = node.meta.get("example_value")
    kind: Kind = "user"
    if isinstance(value, torch.nn.Parameter):
        kind = "parameter"
    elif source is not None and _on_module(source):
        kind = "buffer"
    return Input(_plain_name(text, kind != "user") or str(node.target), kind, text)


def _on_module(source: Any) -> bool:
    """Whether a source is an attribute of a module, and not an argument of the call."""
    kind = getattr(source, "guard_source", None)
    kind = kind() if callable(kind) else kind
    return "NN_MODULE" in getattr(kind, "name", "")


_CONTAINERS = {"_modules", "_parameters", "_buffers", "__dict__", "__closure__", "cell_contents"}


def _plain_name(text: str, on_module: bool) -> str:
    """``L['self']._modules['proj']._parameters['weight']`` -> ``proj.weight``; ``L['x']`` -> ``x``."""
    parts = [part.strip("'\"") for part in text.replace("[", ".").replace("]", ".").split(".")]
    parts = [part for part in parts if part and part not in _CONTAINERS]
    if parts and parts[0] in ("L", "G"):
        parts = parts[1:]
    if len(parts) > 1 and (on_module or parts[0] == "kwargs"):  # the variable that holds the model
        parts = parts[1:]
    return ".".join(parts)


def _shape_symbols(value: Any) -> Iterable[torch.SymInt]:
    if isinstance(value, torch.Tensor):
        numbers: list[Any] = [*value.shape]
        if value.layout is torch.strided:
            numbers += [*value.stride(), value.storage_offset()]
        for number in numbers:
            if isinstance(number, torch.SymInt):
                yield number
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _shape_symbols(item)


def _specialise(gm: fx.GraphModule, example_inputs: Sequence[Any], read: Set[Any]) -> list[Any]:
    """Fix every symbol that occurs in a shape; give the inputs with integer shapes.

    ``int(symbol)`` makes Dynamo guard on the number: another shape is another compile. All values
    of the graph count, not only inputs: a range over a number that is an input has its shape.
    What tensors' values decide, ``read`` among it, is known later.
    """
    for node in gm.graph.nodes:
        for number in _shape_symbols(node.meta.get("example_value")):
            env = number.node.shape_env
            for symbol in number.node.expr.free_symbols - symbols(number) - read:
                int(env.create_symintnode(symbol, hint=None))
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt) and value.node.expr.is_number:
            fill(node, int(value))
    mode = TracingContext.get().fake_mode
    assert mode is not None
    result = []
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        # AOT would give these symbolic shapes again, from what Dynamo noted about their source.
        symbolic = next(iter(_shape_symbols(node.meta.get("example_value"))), None) is not None
        if symbolic and isinstance(value, torch.Tensor):
            value = mode.from_tensor(value, static_shapes=True)
        result.append(value)
    return result


def _program(flat: fx.GraphModule, described: Sequence[Input], notes: Sequence[str]) -> Program:
    """The Program of the graph that AOT made; ``described`` are the inputs of Dynamo's graph."""
    inputs = []
    for position, node in enumerate(flat.graph.find_nodes(op="placeholder")):
        index = _origin(node.meta.get("desc"), position)
        inputs.append(described[index] if index is not None else Input(node.name, "user"))
    on_one_device(flat)
    name_modules(flat.graph)
    tidy(flat)
    held = {n for n, i in zip(flat.graph.find_nodes(op="placeholder"), inputs, strict=True) if i.kind != "user"}
    notes = [*notes, *replace_written(flat, held)]
    output = flat.graph.output_node()
    output.args = (tuple(output.args[0]),)
    flat.recompile()
    return Program(flat, tuple(inputs), notes=notes)


def _origin(desc: Any, position: int) -> int | None:
    """Which input of Dynamo's graph an AOT input is, from AOT's description of it."""
    if desc is None:
        return position
    while not hasattr(desc, "idx"):  # a part of a tensor subclass, or the base of several views
        desc = getattr(desc, "base", None) or getattr(desc, "base_of", None)
        if desc is None:
            return None
    return int(desc.idx)


@dataclass
class Recorded:
    """One captured graph with the flat arguments of its first call and what it gave for them.

    Both are copies (parameters are not), so that what the model does to them in place later,
    buffers that count calls for one, does not change the record.
    """

    program: Program
    args: tuple[Any, ...]
    outputs: tuple[Any, ...]
    promoted: tuple[Program, list[Any], tuple[Any, ...]] | None = None  # verify's float64 reference


@dataclass
class Captured:
    """All graphs of one call of a model, in order of execution, and what the model returned."""

    programs: list[Recorded] = field(default_factory=list)
    outputs: Any = None


Inputs = Mapping[str, Any] | Sequence[Any] | Callable[[], Any]


def call_arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from a dict, a tuple or list, or a callable that returns one."""
    if callable(inputs):
        inputs = inputs()
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def capture(model: Callable[..., Any], inputs: Inputs, dynamic: bool | None = False) -> Captured:
    """Run ``model`` once without gradients and record every graph of it.

    ``inputs`` is a dict of keyword arguments, a tuple of positional ones, or a
    callable that returns either. A model on fake tensors runs in their mode,
    and the recorded arguments and outputs are fake; inputs may be real, and masks
    and numbers that decide sizes must be. A graph break gives several
    programs; a program that runs twice is recorded twice.

    Each call compiles with a backend of its own, which nothing else that Dynamo
    has cached can match, and nothing is reset: what else is compiled in the
    process stays. Dynamo keeps its guards for a capture until
    ``torch._dynamo.reset()``, but not the programs and tensors.

    Raises :class:`CaptureError` when there is nothing to record (the model is
    not traced) or a graph cannot be captured.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    session = _Session(Captured())
    result = session.result
    assert result is not None
    mode = fake_mode_of(model, inputs)
    with contextlib.ExitStack() as stack:
        stack.callback(session.close)
        stack.enter_context(_uncompiled(model))
        if mode is not None:
            stack.enter_context(mode)
        stack.enter_context(torch.no_grad())
        args, kwargs = call_arguments(inputs)
        if mode is not None:
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: fake_of(t, mode), (args, kwargs))

        @unbroken
        def recording(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            return compile_fx(gm, example_inputs, session.runner)

        try:
            result.outputs = torch.compile(model, backend=recording, dynamic=dynamic)(*args, **kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, CaptureError):
                raise error.inner_exception from None
            raise
    if not result.programs:
        raise CaptureError("no graph was captured: Dynamo found no tensor operation that it could trace")
    return result


@contextlib.contextmanager
def _uncompiled(model: Any) -> Iterator[None]:
    """While a model is captured: without what ``module.compile()`` put in front of its forward."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    compiled = {m: m._compiled_call_impl for m in modules if getattr(m, "_compiled_call_impl", None) is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


class _Session:
    """What the compiled code of one capture holds on to, so that it can be let go afterwards."""

    def __init__(self, result: Captured) -> None:
        self.result: Captured | None = result
        self.graphs: list[Program] = []

    def close(self) -> None:
        self.result = None
        self.graphs.clear()

    def runner(self, program: Program) -> Runner:
        index = len(self.graphs)
        self.graphs.append(program)

        def run(args: list[Any]) -> Sequence[Any]:
            assert self.result is not None, "the code of a capture ran after the capture"
            program = self.graphs[index]
            kinds = [i.kind for i in program.inputs]
            kept = tuple(a if k == "parameter" else _copy(a) for a, k in zip(args, kinds, strict=True))
            outputs = execute(program, args)
            self.result.programs.append(Recorded(program, kept, tuple(_copy(o) for o in outputs)))
            return outputs

        return run


def _copy(value: Any) -> Any:
    """A copy of a tensor with the same strides, overlaps and gaps included."""
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
        return value
    value = value.detach()
    if value.layout is not torch.strided or value.numel() == 0:
        return value.clone()
    shape, stride = value.shape, value.stride()
    extent = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    return value.as_strided((extent,), (1,)).clone().as_strided(shape, stride)


def execute(program: Program, args: Sequence[Any]) -> tuple[Any, ...]:
    """Outputs of a captured program; on fake arguments from its metadata, without running it."""
    mode = mode_of(args)
    if mode is None:
        return tuple(program.gm(*args))
    inputs = dict(zip(program.placeholders, args, strict=True))
    return tuple(_fake_output(node, inputs, mode) for node in program.outputs)


def _fake_output(node: Any, inputs: Mapping[fx.Node, Any], mode: FakeTensorMode) -> Any:
    if not isinstance(node, fx.Node):
        return node
    if node in inputs:
        return inputs[node]
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return int(value) if isinstance(value, torch.SymInt) else value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def fake_mode_of(model: Any, inputs: Inputs = ()) -> FakeTensorMode | None:
    """The mode of a model on fake tensors, from its parameters, buffers or given inputs."""
    tensors: list[Any] = []
    if isinstance(model, torch.nn.Module):
        tensors += [*model.parameters(), *model.buffers()]
    if not callable(inputs):
        tensors += pytree.tree_leaves(inputs)
    return mode_of(tensors)
