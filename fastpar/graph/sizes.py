"""Graphs in which tensors decide sizes: how many tokens of a prompt count, how long the longest one is.

Where a model compiles with ``unbroken``, Dynamo's graph has *reads*: operators whose result's shape, or whose number,
depends on the values of a tensor (``nonzero``, ``item``). Everything behind them has symbols for sizes. Here a read,
and the little that leads to it, runs before the program, on every rank, as Python would have run it between two
graphs; its result is an input of the program, its numbers are constants of it. So there is one program per set of
sizes, as there is one per resolution, and nothing after this module knows of symbols.

Only what follows from the arguments of the call is read like that. Where weights are behind a read (a router that
sends tokens to experts), the sizes would be other ones in every step, and the read would need half the model:
:class:`~fastpar.graph.unbroken.Broken`, and the frame is split there by Dynamo instead. Likewise for floats that follow
from arguments, for random numbers on the way to a read, and where the memory that a read depends on is written to. An
integer that turns out to decide no size (the row of a table) stays an input.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.source import ConstantSource
from torch._guards import CompileContext, TracingContext, compile_context, tracing
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.utils import _pytree as pytree

from fastpar.core.errors import CaptureError
from fastpar.graph.fakes import fake_of, mode_of, values_of
from fastpar.graph.program import Input, copy_module, source_line
from fastpar.graph.reads import is_symbolic, leading_to, name_of, symbols
from fastpar.graph.unbroken import Broken

Compile = Callable[[fx.GraphModule, list[Any], list[Input]], Callable[..., Any]]
"""(graph without symbols for sizes, fake inputs, what each of them is) to the function that runs it."""

_CHECKS = ("assert", "check", "constrain")
_KEPT = 8
"""Reads that are kept for one graph: a pipeline calls with the same few masks in every step."""
_PROGRAMS = 16
"""Programs that are kept for one graph, the last used: of prompts there are always more lengths, of memory is not."""
_numbered = itertools.count()


class Sized:
    """A graph with reads, as a function: reads first, then the program for these sizes, compiled when first met.

    ``args`` are those of the first call, and ``examples`` the same with all sizes that Dynamo knows fixed. What a later
    call compiles is compiled for ``examples``, as fake tensors: the weights of that call may be shells.

    Raises ``Broken`` where sizes do not follow from what is read, and :class:`CaptureError` where ``args`` are fake and
    stand for no values.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        args: Sequence[Any],
        examples: Sequence[Any],
        inputs: list[Input],
        reads: list[fx.Node],
        compile: Compile,
    ) -> None:
        self.gm, self.inputs, self.compile = gm, inputs, compile
        # integers among the arguments, unless Dynamo has fixed them, are like those that are read
        given = list(gm.graph.find_nodes(op="placeholder"))
        self.reads = [*reads, *(n for n in given if is_symbolic(n) and symbols(n.meta["example_value"], known=True))]
        mode = TracingContext.get().fake_mode
        assert mode is not None
        self.mode: FakeTensorMode = mode
        self.given = mode_of(args)  # of a model that is not run; Dynamo guards on it
        self.examples = pytree.tree_map_only(torch.Tensor, self._fake, list(examples))
        self.context = CompileContext.try_get()
        self.programs: dict[Any, Callable[..., Any]] = {}
        self.sizes: set[int] = set()  # integers, by their place in reads, that are constants of programs
        self.seen: set[int] = set()  # integers that programs differ by: sizes, and what something was decided by
        needed = set(leading_to(self.reads))
        self.before = [n for n in gm.graph.nodes if n in needed and n.op != "placeholder"]
        self.needed = [i for i, n in enumerate(given) if n in needed]  # arguments, by their place
        self.kept: list[tuple[list[tuple[weakref.ref[torch.Tensor], int]], list[Any]]] = []
        read = self.read(args)
        try:
            self.worked_out(read, {i for i, v in enumerate(read) if type(v) is int})  # Dynamo guards on new symbols
        except Exception as error:  # whatever it is: the graph can be split instead
            raise Broken(f"{type(error).__name__}: {str(error) or 'no reason'}".split("\n", 1)[0]) from error

    def __call__(self, *args: Any) -> Any:
        read = self.read_once(args)
        run = self.programs.pop(self._key(read), None) or self.compiled(read)
        self.programs[self._key(read)] = run  # the last used stands last
        if len(self.programs) > _PROGRAMS:  # on all ranks the same one, and none of them is still in it: all compiled
            del self.programs[next(iter(self.programs))]
        numbers = [type(v) is int and i not in self.sizes for i, v in enumerate(read)]
        further = [x for v, n in zip(read, numbers, strict=True) for x in _parts(v) if n or isinstance(x, torch.Tensor)]
        if self.given is not None:
            further = [fake_of(x, self.given) if isinstance(x, torch.Tensor) else x for x in further]
        return run(*args, *further)

    def _key(self, read: Sequence[Any]) -> Any:
        """What programs differ by: shapes that were read, and numbers but those that any program takes."""
        taken = [None if type(v) is int and i not in self.seen else v for i, v in enumerate(read)]
        return pytree.tree_map_only(torch.Tensor, lambda t: tuple(t.shape), tuple(taken))

    def read_once(self, args: Sequence[Any]) -> list[Any]:
        """What ``read`` gives, without reading again what came before: on a GPU every read waits for all that runs."""
        given: list[Any] = [args[i] for i in self.needed]
        self.kept = [k for k in self.kept if all(ref() is not None for ref, _ in k[0])]
        for tensors, read in self.kept:
            if all(t._version == version and ref() is t for (ref, version), t in zip(tensors, given, strict=True)):
                return read
        read = self.read(args)
        if all(isinstance(t, torch.Tensor) and not t.is_inference() for t in given):
            self.kept = [*self.kept[1 - _KEPT :], ([(weakref.ref(t), t._version) for t in given], read)]
        return read

    def read(self, args: Sequence[Any]) -> list[Any]:
        """What the reads give for these arguments of a call: tensors, tuples of tensors or numbers."""
        placeholders = list(self.gm.graph.find_nodes(op="placeholder"))
        given = values_of([args[i] for i in self.needed])
        env: dict[fx.Node, Any] = dict(zip((placeholders[i] for i in self.needed), given, strict=True))
        runner = fx.Interpreter(self.gm)
        with torch.no_grad(), contextlib.nullcontext() if mode_of(given) else unset_fake_temporarily():
            for node in self.before:
                positional, named = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
                try:
                    env[node] = getattr(runner, node.op)(node.target, positional, named)
                except (DataDependentOutputException, DynamicOutputShapeException) as error:
                    raise CaptureError(
                        f"a size depends on the values of tensors at {source_line(node)}, and fake tensors have none: "
                        "give masks and integers as real tensors"
                    ) from error
        return [env[n] for n in self.reads]

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        own = isinstance(tensor, FakeTensor) and tensor.fake_mode is self.mode  # another: of a model that is not run
        return tensor if own else self.mode.from_tensor(tensor, static_shapes=True)

    def compiled(self, read: Sequence[Any]) -> Callable[..., Any]:
        """The program for sizes that were read, for all arguments and the tensors among ``read``."""
        with tracing(TracingContext(self.mode)), compile_context(self.context), torch.no_grad():
            while True:
                gm, examples, inputs, numbers = self.worked_out(read, self.sizes)
                tensors = [n.meta.get("example_value") for n in gm.graph.nodes if not is_symbolic(n)]
                shapes = symbols(tensors, known=True)
                decide = {i for i, n in numbers.items() if n.node.expr in shapes or self._guarded(n)}
                if not decide:
                    break
                self.sizes |= decide
            try:
                run = self.compile(gm, examples, inputs)
            except TensorifyScalarRestartAnalysis as error:
                raise CaptureError("a float argument is used as a number; give the model a tensor for it") from error
            self.seen |= self.sizes | {i for i, n in numbers.items() if self._guarded(n)}
            return run

    def worked_out(
        self, read: Sequence[Any], sizes: Collection[int]
    ) -> tuple[fx.GraphModule, list[Any], list[Input], dict[int, torch.SymInt]]:
        """(graph for what was read, its fake inputs, what these are, those that are integers that were read).

        Integers at the places ``sizes`` are constants, others are inputs, as symbols."""
        gm = copy_module(self.gm)
        names = {n.name: n for n in gm.graph.nodes}
        further: list[fx.Node] = []
        numbers: dict[int, torch.SymInt] = {}
        for i, (node, value) in enumerate(zip(self.reads, read, strict=True)):
            value = pytree.tree_map_only(torch.Tensor, self._fake, value)
            if type(value) is int and i not in sizes:
                value = numbers[i] = self._number(node.name, value)
            further += _give(names[node.name], value)
        examples = [*self.examples, *(n.meta["example_value"] for n in further)]
        with torch.no_grad():
            _work_out(gm, examples, self.mode)
        return gm, examples, [*self.inputs, *(Input(n.name, "user") for n in further)], numbers

    def _number(self, name: str, value: int) -> torch.SymInt:
        """A number that was read, as an input whose value nothing knows."""
        env = self.mode.shape_env
        assert env is not None
        source = ConstantSource(f"{name}_{next(_numbered)}")
        symbol = env.create_unspecified_symbol(value, source, DimDynamic.DYNAMIC)
        return env.create_symintnode(symbol, hint=value, source=source)

    def _guarded(self, number: torch.SymInt) -> bool:
        """Whether something was decided by a number's value."""
        env = self.mode.shape_env
        assert env is not None
        symbol = number.node._expr  # as it was made: ``expr`` would be the constant that it was found to be
        return symbol in env.replacements or any(symbol in guard.expr.free_symbols for guard in env.guards)


def _parts(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _give(read: fx.Node, value: Any) -> list[fx.Node]:
    """Replace a read by inputs of the graph, or by the number that was read. Returns the inputs."""
    graph = read.graph
    if isinstance(value, (bool, int, float)):
        fill(read, value)
        _erase(read)
        return []
    last = list(graph.find_nodes(op="placeholder"))[-1]
    inputs = []
    for i, part in enumerate(_parts(value)):
        with graph.inserting_after(last):
            last = graph.placeholder(f"{read.name}_{i}")
        last.meta = {"example_value": part, "stack_trace": read.meta.get("stack_trace")}
        inputs.append(last)
    if not isinstance(value, (tuple, list)):
        read.replace_all_uses_with(inputs[0])
    for user in list(read.users):
        if user.target is not operator.getitem:
            raise CaptureError(f"what is read at {source_line(read)} is used as a whole by {user.target}")
        user.replace_all_uses_with(inputs[user.args[1]])
        graph.erase_node(user)
    _erase(read)
    return inputs


def _erase(node: fx.Node) -> None:
    if node.op != "placeholder":
        node.graph.erase_node(node)


def fill(node: fx.Node, value: Any) -> None:
    """Put a constant in the place of a node, wherever it is used."""
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: value if n is node else n)


def _is_known_float(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.SymFloat) and not symbols(value)


def _work_out(gm: fx.GraphModule, examples: Sequence[Any], mode: FakeTensorMode) -> None:
    """Give every node its value with the sizes that are known now, and fold what is a number by now."""
    env: dict[fx.Node, Any] = {}
    runner = fx.Interpreter(gm)
    given = iter(examples)
    assert mode.shape_env is not None
    with mode, mode.shape_env.ignore_fresh_unbacked_symbols():
        for node in list(gm.graph.nodes):
            if node.op == "output":
                break
            if node.op == "placeholder":
                value = next(given)
            elif _is_known_float(node):
                value = node.meta["example_value"]
                if node.target == "item":  # of an argument, or it would be a symbol of which nothing is known
                    env[node.args[0]].item_memo = value
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
                value = getattr(runner, node.op)(node.target, args, kwargs)
                if node.op == "get_attr" and isinstance(value, torch.Tensor):
                    value = mode.from_tensor(value, static_shapes=True)
            if symbols(value):
                raise CaptureError(f"what is read at {source_line(node)} is in no operator of the graph")
            env[node] = value
            if node.op == "call_function" and not node.all_input_nodes:
                if isinstance(value, (int, float)) or (value is None and any(w in name_of(node) for w in _CHECKS)):
                    fill(node, value)
                    gm.graph.erase_node(node)
                    continue
            node.meta["example_value"] = value
            node.meta.pop("unbacked_bindings", None)
    gm.recompile()
