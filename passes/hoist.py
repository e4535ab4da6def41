"""``hoist``: what does not change between the steps of a sampler comes first, and is marked.

Keys and values of a prompt, caption projections, position tables, and what is sent for them, depend on weights,
constants and inputs that stay the same over the steps. The pass moves these operators to the front and marks them
``meta["hoisted"]``. The result is still one program that computes the same; the runtime cuts it at the marks
(``fastpar.graph.prologue``) and runs the front, the *prologue*, once per generation and stream.

Which inputs stay the same is a guess that costs nothing but time where it is wrong: at run time the prologue is run
again whenever an input that it reads has changed (``fastpar.run.hoisted``). To see that, every call reads those inputs,
weights too, once. So hoisting has a price, and only what the clock says is worth it goes: of all sets of operators
that need nothing outside themselves, the one that saves most beyond the check of its inputs. What reads none is free.
And only if the scheduled call is shorter for it: what is computed again in every step can hide exchanges.

The values that are handed over are kept on the device, so some are made again on every call instead: views,
constants, copies that are larger than what they copy, and other forms of a weight (a cast, a dequantised one), which
would be a second copy of the model. Past ``limit`` go those with the fewest FLOPs behind a byte.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

from fastpar.core.errors import OptionError
from fastpar.graph.closure import best_closure
from fastpar.graph.count import node_flops
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program, draws, source_line
from fastpar.graph.prologue import bytes_on_ranks, parts_read
from fastpar.graph.roofline import local_shape, reads
from fastpar.graph.schedule import SLACK, calls, shortest
from fastpar.graph.tidy import escaping
from fastpar.ops.collectives import COLLECTIVES
from fastpar.ops.join import join
from fastpar.rules import is_view

aten = torch.ops.aten
_COPIES = {aten.clone.default, aten._to_copy.default, aten.repeat.default, aten.expand_copy.default}
_PACKED = 16  # most values that one element of a packed weight stands for (2 bits in 32)


@dataclass(frozen=True)
class Hoist(Pass):
    """Moves to the front what depends on weights, constants and inputs that are not ``varying``.

    ``varying`` names inputs (``latents``, ``added.0``; weights too); by default they are guessed (``guess``).
    ``limit`` is how many MiB a rank may keep for one stream. ``always``: also what does not pay.
    """

    name: ClassVar[str] = "hoist"
    stage_in: ClassVar[str] = "lowered"

    varying: tuple[str, ...] | None = None
    limit: int = 1024
    always: bool = False

    def apply(self, program: Program, ctx: PassContext) -> Program:
        if ctx.costs is None and not self.always:
            raise OptionError("pass 'hoist' needs a cost model, which a pipeline without a topology lacks")
        graph = program.graph
        varying = guess(program) if self.varying is None else self.varying
        missing = sorted(set(varying) - {i.name for i in program.inputs})
        if missing:  # no error: of a model with graph breaks, each graph has some of the inputs
            ctx.notes.append(f"hoist: {', '.join(missing)} not among the inputs of this graph: "
                             f"{', '.join(i.name for i in program.inputs if i.kind == 'user')}")  # fmt: skip
        for node in graph.nodes:
            node.meta.pop("hoisted", None)
        given = _given(program, varying)
        _divide_exchanges(graph, given)
        _merge_equal(graph, given)
        fixed = _fixed(graph, given)
        if not self.always:
            fixed = _paying(program, fixed, ctx)
        front, again = _front(program, fixed, self.limit << 20)
        if front:
            _move(graph, front, again)
        program.gm.meta["varying"] = tuple(varying)
        graph.lint()
        program.gm.recompile()
        return program


def guess(program: Program) -> tuple[str, ...]:
    """Names of the user's inputs that probably change from step to step.

    Those with at most one element per batch item (a time, a guidance scale), and those shaped like an output, but
    for the channels: the sample, with what is concatenated to it, and residuals of a ControlNet. Where none is, the
    largest stands for the sample.
    """
    outputs = [o.meta["val"] for o in program.results if isinstance(o, fx.Node)]
    shapes = [tuple(v.shape) for v in outputs if isinstance(v, torch.Tensor) and v.dim() > 1]
    batch = max((s[0] for s in shapes), default=1)
    users = [(i.name, n.meta.get("val")) for i, n in zip(program.inputs, program.placeholders, strict=True)
             if i.kind == "user"]  # fmt: skip
    small = [name for name, v in users if not isinstance(v, torch.Tensor) or v.numel() <= batch]
    large = {name: tuple(v.shape) for name, v in users if name not in small}
    samples = [name for name, shape in large.items() if any(like(shape, s) for s in shapes)]
    if large and not samples:
        samples = [max(large, key=lambda name: math.prod(large[name]))]
    return tuple(dict.fromkeys([*samples, *small]))


def like(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether an input of one shape is a sample beside an output of the other: equal shapes but for one dimension that
    can be channels, the last, or any after the batch of an image."""
    if len(shape) != len(other):
        return False
    apart = [d for d, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
    return not apart or (len(apart) == 1 and (apart[0] == len(shape) - 1 or (len(shape) > 3 and apart[0] > 0)))


def _given(program: Program, varying: Collection[str]) -> set[fx.Node]:
    """What stays the same and costs nothing to have: stable inputs and constants. A number always varies."""
    stable = {
        n for n, i in zip(program.placeholders, program.inputs, strict=True)
        if i.name not in varying and i.kind != "carried" and isinstance(n.meta.get("val"), torch.Tensor)
    }  # fmt: skip
    return stable | {n for n in program.graph.nodes if n.op == "get_attr"}


def _fixed(graph: fx.Graph, given: set[fx.Node]) -> dict[fx.Node, None]:
    """Operators, in order, that depend on nothing else."""
    fixed: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if _stays(node, given, fixed):
            fixed[node] = None
    return fixed


def _stays(node: fx.Node, given: Collection[fx.Node], fixed: Collection[fx.Node]) -> bool:
    """Whether an operator gives the same every time, all that it takes being ``given`` or ``fixed``."""
    if node.op != "call_function" or draws(node):
        return False
    return not node.is_impure() and all(n in given or n in fixed for n in node.all_input_nodes)


def _divide_exchanges(graph: fx.Graph, given: set[fx.Node]) -> None:
    """An exchange of several values becomes two where some of them are fixed and others are not."""
    fixed: set[fx.Node] = set()
    for node in list(graph.nodes):
        values: Any = node.args[0] if node.target in COLLECTIVES else ()
        chosen = [i for i, x in enumerate(values) if x in fixed or x in given]
        if 0 < len(chosen) < len(values):
            _divide(graph, node, (chosen, [i for i in range(len(values)) if i not in chosen]), fixed)
        elif _stays(node, given, fixed):
            fixed.add(node)


def _divide(graph: fx.Graph, node: fx.Node, parts: tuple[list[int], list[int]], fixed: set[fx.Node]) -> None:
    """An exchange per part of its values, the first of which is fixed."""
    users: list[fx.Node] = list(node.users)
    made = []
    for part in parts:
        args = tuple([a[i] for i in part] if isinstance(a, (list, tuple)) else a for a in node.args)
        with graph.inserting_before(node):
            new = graph.call_function(node.target, args)  # type: ignore[arg-type]
        new.meta = {**node.meta, "layout": tuple(node.meta["layout"][i] for i in part),
                    "val": [node.meta["val"][i] for i in part]}  # fmt: skip
        for user in users:
            if user.args[0] is node and user.args[1] in part:
                user.args = (new, part.index(user.args[1]))
        made.append(new)
    fixed.add(made[0])
    graph.erase_node(node)


def _merge_equal(graph: fx.Graph, given: set[fx.Node]) -> None:
    """Of fixed operators on the same arguments one is left (each layer takes its rows of one table, say)."""
    first: dict[str, fx.Node] = {}
    kept_apart = escaping(graph)
    for node in _fixed(graph, given):
        if node in kept_apart:
            continue
        key = f"{node.target} {node.args} {node.kwargs}"  # nodes are their names, layouts are text
        one = first.setdefault(key, node)
        if one is not node:
            node.replace_all_uses_with(one)
            graph.erase_node(node)


def _paying(program: Program, fixed: dict[fx.Node, None], ctx: PassContext) -> dict[fx.Node, None]:
    """Those of the fixed operators whose hoisting saves more than the check of what they read takes."""
    anew = _weight_forms(program, fixed) | escaping(program.graph)  # made on every call in any case
    saved = {n: 0.0 if n in anew or _cheap(n) else _saved(n, fixed, ctx) for n in fixed}
    needs = {n: [m for m in n.all_input_nodes if m in fixed or m.op == "placeholder"] for n in fixed}
    inputs = dict.fromkeys(m for several in needs.values() for m in several if m.op == "placeholder")
    sizes = {p: _bytes(program, p) for m in inputs for p in parts_read(m, fixed, lambda n: _bytes(program, n))}
    once = ctx.costs.checked([])
    cost = {p: ctx.costs.checked([size]) - once for p, size in sizes.items()}
    worth = {n: saved.get(n, 0.0) - cost.get(n, 0.0) for n in (*inputs, *fixed)}
    told: set[fx.Node] = set()
    free = _with_what_is_free(told, worth, needs)
    chosen = best_closure(worth, needs)
    if sum(map(worth.__getitem__, chosen)) <= once:
        chosen = set()
    chosen = _with_what_is_free(chosen, worth, needs)
    if chosen != free:
        check = ctx.costs.checked([sizes[m] for m in sizes if m in chosen])
        fused = sum(saved[n] for n in fixed if n in chosen and not reads(n))  # not in the tasks of a schedule
        steps = [[n for n in calls(program.graph) if n not in front] for front in (free, chosen)]
        before, after = (shortest(step, ctx.costs.tasks(program.graph)) for step in steps)
        if check + after > (1 + SLACK) * (before + fused):
            ctx.notes.append(
                f"hoist: what it could take from the steps stays in them, for exchanges travel meanwhile: a call would "
                f"take {1e6 * (check + after):.0f} us, {1e6 * check:.0f} of them to check what was used, and not "
                f"{1e6 * (before + fused):.0f}"
            )
            chosen, told = free, chosen
    left = [n for n in fixed if n not in chosen and n not in told and saved[n] > 0]
    if left:
        read = [m for m in _behind(left, needs) if m in sizes and m not in chosen]
        ctx.notes.append(
            f"hoist: {len(left)} operators with the same result in every step stay in it: they take "
            f"{1e6 * sum(saved[n] for n in left):.0f} us, and to see on every call that the {len(read)} inputs and "
            f"weights behind them are still the same would take {1e6 * ctx.costs.checked([sizes[m] for m in read]):.0f}"
            f" us ({sum(sizes[m] for m in read):,} bytes) ({source_line(left[0])})"
        )
    return {n: None for n in fixed if n in chosen}


def _with_what_is_free(
    chosen: Collection[fx.Node], worth: Mapping[fx.Node, float], needs: Mapping[fx.Node, Iterable[fx.Node]]
) -> set[fx.Node]:
    """And what takes nothing, or only what is checked anyway."""
    found = set(chosen)
    for node in worth:
        if worth[node] >= 0 and all(m in found for m in needs.get(node, ())):
            found.add(node)
    return found


def _behind(nodes: Iterable[fx.Node], needs: Mapping[fx.Node, Iterable[fx.Node]]) -> dict[fx.Node, None]:
    """The nodes and all that they need, and what that needs."""
    found, todo = dict.fromkeys(nodes), list(nodes)
    while todo:
        new = [m for m in needs.get(todo.pop(), ()) if m not in found]
        found |= dict.fromkeys(new)
        todo += new
    return found


def _saved(node: fx.Node, fixed: Collection[fx.Node], ctx: PassContext) -> float:
    """Seconds that a step is shorter for not making this value.

    Pointwise operators are fused with what takes them; several takers need a kernel that writes the value for them.
    """
    if reads(node) or node.target in COLLECTIVES:
        task = ctx.costs.task(node)
        return float(task.compute + task.travel + task.unpack)
    users = {user for user in node.users if user not in fixed}
    return float(ctx.costs.written(node)) if len(users) > 1 and not is_view(node) else 0.0


def _front(
    program: Program, fixed: dict[fx.Node, None], limit: int
) -> tuple[dict[fx.Node, None], set[fx.Node]]:
    """(the prologue's operators in order, fixed operators that are to be made on every call as well)."""
    forms = _weight_forms(program, fixed)
    # What the caller gets is made anew for him: he may write into it.
    forced = {n for n in escaping(program.graph) if n in fixed}
    while True:
        needed = {n for n in fixed if any(user not in fixed for user in n.users)}
        kept: list[fx.Node] = []
        again: set[fx.Node] = set()
        for node in reversed(fixed):
            if node not in needed:
                continue
            if node in forced or node in forms or _cheap(node):
                again.add(node)
                needed |= {n for n in node.all_input_nodes if n in fixed}
            else:
                kept.append(node)
        over = sum(_bytes(program, n) for n in kept) - limit
        if over <= 0:
            break
        for node in sorted(kept, key=lambda n: _worth(program, n, fixed, kept)):
            forced.add(node)
            over -= _bytes(program, node)
            if over <= 0:
                break
    front: set[fx.Node] = set(kept)
    for node in reversed(fixed):
        if node in front:
            front |= {n for n in node.all_input_nodes if n in fixed}
    return {n: None for n in fixed if n in front}, again


def _bytes(program: Program, node: fx.Node) -> int:
    """Bytes on the busiest rank."""
    return max(bytes_on_ranks(program, node))


def _worth(program: Program, node: fx.Node, fixed: Iterable[fx.Node], kept: list[fx.Node]) -> float:
    """FLOPs per byte that keeping a value saves; those behind other kept values are not its own."""
    todo, seen, flops, others = [node], {node}, 0, set(kept)
    while todo:
        at = todo.pop()
        flops += node_flops(at, lambda n: local_shape(n, program.mesh, 0))
        new = {n for n in at.all_input_nodes if n in fixed and n not in seen and n not in others}
        seen |= new
        todo += new
    return flops / max(1, _bytes(program, node))


def _weight_forms(program: Program, fixed: Iterable[fx.Node]) -> set[fx.Node]:
    """Values that are another form of a weight: made from it element by element, and of its size."""
    forms: dict[fx.Node, int] = {  # to elements of the weight
        n: n.meta["val"].numel() for n, i in zip(program.placeholders, program.inputs, strict=True)
        if i.kind in ("parameter", "buffer") and isinstance(n.meta.get("val"), torch.Tensor)
    }  # fmt: skip
    weights = set(forms)
    for node in fixed:
        value = node.meta.get("val")
        whole = [forms[n] for n in node.all_input_nodes if n in forms]
        if not whole or not isinstance(value, torch.Tensor) or reads(node) or node.target in (*COLLECTIVES, join):
            continue
        if value.numel() <= _PACKED * max(whole):
            forms[node] = max(whole)
    return set(forms) - weights


def _cheap(node: fx.Node) -> bool:
    """Whether a value is only a view, a constant, or a copy that is larger than what it copies."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return True  # several values: each of them is kept, or a number
    if node.target is getitem:
        return False
    if is_view(node) or not node.all_input_nodes:
        return True
    if node.target not in _COPIES:
        return False
    source = node.all_input_nodes[0]
    while is_view(source) and source.target is not getitem:
        source = source.all_input_nodes[0]
    before = source.meta.get("val")
    if not isinstance(before, torch.Tensor):
        return False
    return value.numel() * value.element_size() > before.numel() * before.element_size()


def _move(graph: fx.Graph, front: Iterable[fx.Node], again: Collection[fx.Node]) -> None:
    """``front`` to the front, marked; what is in ``again`` too gets a copy for the rest of the program."""
    copies: dict[fx.Node, fx.Node] = {}
    front = dict.fromkeys(front)
    for node in [n for n in graph.nodes if n in again and n in front]:
        with graph.inserting_after(node):
            copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
        copies[node].meta = dict(node.meta)
    made = set(copies.values())
    for old, new in copies.items():
        for user in [u for u in old.users if u not in front and u not in made]:
            user.replace_input_with(old, new)
    at = graph._root
    for node in [*(n for n in graph.nodes if n.op in ("placeholder", "get_attr")), *front]:
        at.append(node)
        at = node
        if node in front:
            node.meta["hoisted"] = True
