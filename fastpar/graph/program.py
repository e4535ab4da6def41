"""``Program``: a flat fx graph and what the graph alone does not say.

Every pass takes a Program and gives a Program. The graph is plain ``torch.fx``:
placeholders are the flat inputs, the output node's one argument is a tuple, and
each node carries its fake value in ``meta["val"]``.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

Stage = Literal["captured", "sharded", "lowered", "scheduled", "localised"]
Kind = Literal["parameter", "buffer", "user", "state", "carried"]
STAGES: tuple[str, ...] = get_args(Stage)


@dataclass(frozen=True)
class Input:
    """What a placeholder stands for.

    ``name`` is the attribute path for parameters and buffers
    (``blocks.0.attn.to_q.weight``) and the argument's name for what the user
    passes. A tensor that hangs on a module without being registered counts as a
    buffer. ``state`` is what a prologue gave, ``carried`` what the call before gave.
    ``source`` is Dynamo's own expression for it, for messages.
    """

    name: str
    kind: Kind
    source: str = ""


@dataclass
class Program:
    """One graph on its way through the passes.

    ``inputs`` has one entry per placeholder, in order. ``plan`` and ``mesh`` are
    set once they are known. ``notes`` collects what a report should say about
    this program: things that were specialised, gathered, skipped, and why.
    ``origin`` says what it was made from and by; compiled code is kept on disk under it.
    The last ``carries`` outputs are for the next call (``fastpar.passes.displace``), each rank's own.
    """

    gm: fx.GraphModule
    inputs: tuple[Input, ...]
    stage: Stage = "captured"
    name: str = "program"
    mesh: Any = None
    plan: Any = None
    notes: list[str] = field(default_factory=list)
    origin: str = ""
    carries: int = 0

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    @property
    def num_nodes(self) -> int:
        """Nodes of the graph, placeholders and output included."""
        return len(self.gm.graph.nodes)

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.gm.graph.nodes if node.op == "placeholder"]

    @property
    def fixed(self) -> list[fx.Node]:
        """Placeholders of what stays the same: parameters, buffers and state."""
        return [n for n, i in zip(self.placeholders, self.inputs, strict=True) if i.kind not in ("user", "carried")]

    @property
    def outputs(self) -> tuple[Any, ...]:
        """Arguments of the output node: nodes, numbers or None."""
        return tuple(self.gm.graph.output_node().args[0])

    @property
    def results(self) -> tuple[Any, ...]:
        """The outputs that the caller gets; others are for the next call."""
        return self.outputs[: len(self.outputs) - self.carries]

    @property
    def first(self) -> Program | None:
        """What a sampling run's first calls run instead, since nothing was carried to them (pass ``displace``)."""
        found: Program | None = self.gm.meta.get("first")
        return found

    def copy(self) -> Program:
        """A program that can be edited without touching this one; tensors and fake values are shared."""
        return replace(self, gm=copy_module(self.gm), notes=list(self.notes))

    def hash(self) -> str:
        """Hash of what is computed: targets, arguments, shapes, dtypes, constants.

        Names of nodes, source lines and notes do not count. Equal on all ranks
        and in all processes that captured the same model on the same torch.
        """
        digest = hashlib.sha256(f"{self.stage}\n".encode())
        numbers: dict[fx.Node, int] = {}
        for number, node in enumerate(self.gm.graph.nodes):
            numbers[node] = number
            if node.op == "placeholder":
                what = "input"
            elif node.op == "get_attr":
                what = _constant_text(_attribute(self.gm, node.target))
            else:
                what = target_name(node.target)
            args = _text(node.args, numbers) if node.op != "placeholder" else ""
            kwargs, value = _text(node.kwargs, numbers), _value_text(node.meta.get("val"))
            line = f"{node.op} {what} {args} {kwargs} {value} {node.meta.get('layout', '')}"
            digest.update(f"{line}\n".encode())
        digest.update(" ".join(i.kind for i in self.inputs).encode())
        return digest.hexdigest()


def copy_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule with a copied graph that shares ``gm``'s tensors and submodules."""
    graph = fx.Graph(tracer_cls=getattr(gm.graph, "_tracer_cls", None))
    values: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, values, return_output_node=True)
    result, old = output
    new = graph.output(result, type_expr=getattr(old, "type", None))
    new.meta = dict(old.meta)
    for before, after in values.items():
        # Dynamo and AOT look for the origin of an input on the node itself, not in its meta.
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source
    return module_of(gm, graph, "Program")


def module_of(gm: fx.GraphModule, graph: fx.Graph, name: str) -> fx.GraphModule:
    """``graph`` over the tensors and submodules of ``gm``, as a GraphModule of its own."""
    # Lazy: Python code for thousands of nodes is only generated if the module is called or printed.
    with _use_lazy_graph_module(True):
        made = _make_graph_module(gm, graph, class_name=name)
    made.meta = dict(gm.meta)
    return made


def target_name(target: Any) -> str:
    """A stable name for a call target: ``aten.view.default``, ``_operator.getitem``."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(target)
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', type(target).__name__)}"


def _attribute(gm: Any, target: Any) -> Any:
    for part in str(target).split("."):
        gm = getattr(gm, part)
    return gm


_PLAIN = (
    *(type(None), bool, int, float, complex, str),
    *(torch.dtype, torch.layout, torch.memory_format, torch.SymInt, torch.SymFloat, torch.SymBool),
)


def _text(value: Any, numbers: dict[fx.Node, int]) -> str:
    if isinstance(value, fx.Node):
        return f"%{numbers[value]}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_text(v, numbers) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_text(v, numbers)}" for k, v in sorted(value.items())) + "}"
    if isinstance(value, slice):
        return f"slice({_text((value.start, value.stop, value.step), numbers)})"
    if isinstance(value, torch.device):
        return value.type  # each rank has another index
    if isinstance(value, _PLAIN):
        return repr(value)
    return type(value).__name__  # an address in a repr would differ in each process


def _value_text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_value_text(v) for v in value) + ")"
    return type(value).__name__ if value is not None else ""


def _constant_text(value: Any) -> str:
    if isinstance(value, fx.GraphModule):
        return Program(value, ()).hash()
    if not isinstance(value, torch.Tensor):
        return repr(type(value))
    text = f"{value.dtype}{list(value.shape)}"
    if type(value) is not torch.Tensor or value.device.type == "meta":  # fake: no values to compare
        return text
    with unset_fake_temporarily():  # in which torch.compile calls its backends
        data = value.detach().cpu().contiguous()
        data = data.reshape(-1).view(torch.uint8) if data.numel() else data
        return f"{text} {hashlib.sha256(data.numpy().tobytes()).hexdigest()}"


_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<func>\S+)\s*$')


def draws(node: fx.Node) -> bool:
    """Whether an operator takes numbers from a random generator."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def source_line(node: fx.Node) -> str:
    """Where in the model a node comes from: ``models/transformer.py:123 in forward: x = ...``.

    The innermost frame that is not torch's own, with the file shortened to its
    last three parts. Empty when the node has no stack trace (inputs, for one).
    """
    trace = node.meta.get("stack_trace")
    if not trace:
        return ""
    best: tuple[str, str, str, str] | None = None
    lines = trace.splitlines()
    for index, text in enumerate(lines):
        match = _FRAME.match(text)
        if match is None:
            continue
        code = lines[index + 1].strip() if index + 1 < len(lines) else ""
        if _FRAME.match(lines[index + 1]) if index + 1 < len(lines) else False:
            code = ""
        frame = (match["file"], match["line"], match["func"], code)
        file = match["file"].replace("\\", "/")
        if best is None or "/torch/" not in file or "/torch/" in best[0].replace("\\", "/"):
            best = frame
    if best is None:
        return ""
    file, number, func, code = best
    short = "/".join(file.replace("\\", "/").split("/")[-3:]).lstrip("/")
    return f"{short}:{number} in {func}: {code}" if code else f"{short}:{number} in {func}"
