"""``attention-ulysses``: tokens to heads before attention, heads to tokens after it.

DeepSpeed-Ulysses' all-to-all: four exchanges of 1/N of the tensor per attention, of which
(N-1)/N leaves the rank. Where the heads do not divide over the ranks, a rank's share is a
rectangle of heads x query rows: the mesh axes are partly spent on heads, partly on rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fastpar.core.layout import Atom, Dim, Layout, Seg, shared_parts
from fastpar.core.mesh import Mesh
from fastpar.core.transfer import elements_sent
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program
from fastpar.ops.quantize import row_bytes
from fastpar.passes.attention_gather import split_keys
from fastpar.rules.attention import kv_head_dim, mask_layout
from fastpar.sharding.rewrite import redistributed

UNBALANCED = 1.05  # largest share of the work over the mean that fewer bytes may cost


@dataclass(frozen=True)
class AttentionUlysses(Pass):
    """Heads split over ``axes`` as far as they go (default: all axes that split the keys).

    An axis that ``mesh_for`` cut into factors is named by its plan's name. Keys stay split over
    the axes that are not named: those are for the pass that comes next (USP: a ring).
    """

    name: ClassVar[str] = "attention-ulysses"
    stage_in: ClassVar[str] = "sharded"

    axes: tuple[str, ...] = ()

    def apply(self, program: Program, ctx: PassContext) -> Program:
        mesh: Mesh = ctx.mesh
        for node in split_keys(program.graph):
            split = mesh.ordered(node.args[1].meta["layout"].dims[-2].axes)  # type: ignore[union-attr]
            axes = tuple(a for a in split if not self.axes or a.rstrip("0123456789") in self.axes)
            heads, spent = self._rewrite(node, axes, mesh, travelling(node, ctx))
            if spent != axes:
                ranks = mesh.size(axes) // mesh.size(spent)
                why = "heads do not divide over the ranks, and work should"
                if heads % mesh.size(axes) == 0:  # of two ranks, say
                    why = "that sends no more, in fewer exchanges"
                note = (
                    f"attention with {heads} heads: {mesh.size(spent)} shares of heads x {ranks} of query rows, whose "
                    f"keys and values are gathered ({why})"
                )
                if note not in ctx.notes:
                    ctx.notes.append(note)
        program.gm.recompile()
        return program

    def _rewrite(
        self, node: fx.Node, axes: tuple[str, ...], mesh: Mesh, weights: Sequence[float]
    ) -> tuple[int, tuple[str, ...]]:
        """Returns the number of heads and the axes that were spent on them."""
        layouts: list[Layout] = [x.meta["layout"] for x in node.args[:3]]  # type: ignore[union-attr]
        result: Layout = node.meta["layout"]
        best = min(rectangles(layouts, result, axes, mesh, weights), key=lambda o: (o.sent, o.work))
        wants, out, spent = best.wants, best.out, best.spent
        args = list(node.args)
        for i, want in enumerate(wants):
            args[i] = redistributed(node, args[i], want, "attention")  # type: ignore[arg-type]
        if len(args) > 3 and isinstance(args[3], fx.Node):
            mask = mask_layout(tuple(args[3].meta["val"].shape), list(out.dims[:-2]), out.dims[-2])
            args[3] = redistributed(node, args[3], mask, "mask")
        node.args = tuple(args)
        node.meta["split_keys"] = True
        if out != result:
            node.meta = {**node.meta, "layout": out}
            users = list(node.users)
            with node.graph.inserting_after(node):
                back = redistributed(None, node, result, "attention")
            for user in users:
                user.replace_input_with(node, back)
        return (out.dims[-3].size if len(out.dims) > 2 else 1), spent


@dataclass(frozen=True)
class Rectangle:
    """One way to share out an attention: heads over the axes ``spent``, query rows over the others.

    ``work`` of the busiest rank, elements that it sends (a ring that follows included, those of quantized tensors
    as the share that they are), layouts that q, k and v have then, and the result.
    """

    work: float
    sent: float
    wants: list[Layout]
    out: Layout
    spent: tuple[str, ...]


ALL = (1.0, 1.0, 1.0, 1.0)


def travelling(node: fx.Node, ctx: PassContext) -> tuple[float, ...]:
    """The bytes that travel of an attention's q, k, v and output, over those that they have: less than 1 where the
    plan has them quantized."""
    fp8 = getattr(ctx.plan, "fp8", "")
    size = node.meta["val"].element_size()
    widths = [int(x.meta["val"].shape[-1]) for x in (*node.args[:3], node)]  # type: ignore[union-attr]
    return tuple(
        row_bytes(width, size, letter in fp8) / (width * size) if width else 1.0
        for letter, width in zip("qkvo", widths, strict=True)
    )


def rectangles(
    layouts: list[Layout], result: Layout, axes: tuple[str, ...], mesh: Mesh, weights: Sequence[float] = ALL
) -> list[Rectangle]:
    """Ways to share out an attention over ``axes``, those in which the busiest rank has about the least work.

    ``layouts`` are those of q, k and v, ``weights`` what an element of q, k, v and the output counts when it is sent.
    """
    found = []
    for count in range(len(axes) + 1):
        for spent in itertools.combinations(axes, count):
            option = _rectangle(layouts, result, axes, spent, mesh, weights)
            if option is not None:
                found.append(option)
    least = min(option.work for option in found)
    return [option for option in found if option.work <= UNBALANCED * least]


def _rectangle(
    layouts: list[Layout],
    result: Layout,
    axes: tuple[str, ...],
    spent: tuple[str, ...],
    mesh: Mesh,
    weights: Sequence[float],
) -> Rectangle | None:
    """None with too few heads."""
    lead = len(result.dims) - 2
    heads = list(result.dims[:lead])
    if spent:
        if lead == 0:
            return None
        groups = layouts[1].dims[lead - 1].size if len(layouts[1].dims) == len(result.dims) else 1
        dim = heads[-1]
        if layouts[1].dims[lead - 1].size == 1 < dim.size:  # one key head for all: it is not split
            groups = dim.size
        if groups < mesh.size(spent) or dim.size % groups:
            return None
        finer = _divided(dim, spent, mesh, dim.size // groups)
        if finer is None:
            return None
        heads[-1] = finer
    rows = without_axes(result.dims[-2], spent, mesh)
    out = Layout((*heads, rows, result.dims[-1]))
    wants = [Layout((*heads, rows, layouts[0].dims[-1]))]
    for x in layouts[1:3]:
        shape = x.shape[:-2]
        kv = tuple(kv_head_dim(d, s) for d, s in zip(heads[len(heads) - len(shape) :], shape, strict=True))
        wants.append(Layout((*kv, without_axes(x.dims[-2], axes, mesh), x.dims[-1])))
    work = max(math.prod(out.local_shape(mesh, r)[:-1]) / mesh.speed(r) for r in range(mesh.ranks))
    sent = [0.0] * mesh.ranks
    moves = [*zip(layouts[:3], wants, strict=True), (out, result)]
    for (src, dst), weight in zip(moves, weights, strict=True):
        sent = [a + weight * b for a, b in zip(sent, elements_sent(src, dst, mesh), strict=True)]
    # what is left to a ring makes all but one of its steps with this share of the heads
    for want, weight in zip(wants[1:], weights[1:3], strict=True):
        steps = mesh.size(mesh.ordered(want.dims[-2].axes)) - 1
        sent = [a + weight * steps * math.prod(want.local_shape(mesh, r)) for r, a in enumerate(sent)]
    return Rectangle(float(work), max(sent), wants, out, spent)


def _divided(dim: Dim, spent: tuple[str, ...], mesh: Mesh, unit: int) -> Dim | None:
    """Heads split over ``spent`` too, in multiples of ``unit``, within the parts that they have (of ``tp``)."""
    atom = dim.single
    if dim.is_whole:
        return Dim.shared(dim.size, spent, mesh, unit)
    if atom is None or len(atom.segs) != 1 or atom.segs[0].offsets or any(p % unit for p in atom.segs[0].parts):
        return None
    seg = atom.segs[0]
    parts = [n for part in seg.parts for n in shared_parts(part, mesh.shares(spent), unit)]
    return Dim.split(seg.size, (*seg.axes, *spent), parts)


def without_axes(dim: Dim, gone: tuple[str, ...], mesh: Mesh) -> Dim:
    """``dim`` no longer split over ``gone``: the parts along them are joined where they adjoin."""
    atoms = []
    for atom in dim.atoms:
        segs = []
        for seg in atom.segs:
            kept = tuple(a for a in seg.axes if a not in gone)
            if not kept:
                segs.append(Seg(seg.size))
            elif seg.axes[: len(kept)] == kept:  # the axes that go vary fastest: neighbours join
                step = mesh.size(seg.axes) // mesh.size(kept)
                parts = tuple(sum(seg.parts[i : i + step]) for i in range(0, len(seg.parts), step))
                segs.append(Seg(seg.size, kept, parts))
            else:
                segs.append(Seg(seg.size, kept, shared_parts(seg.size, mesh.shares(kept))))
        atoms.append(Atom(tuple(segs)))
    return Dim.of(atoms)
