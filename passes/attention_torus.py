"""``attention-torus``: Ulysses' exchanges between machines in stages, each under the attention of another block.

Torus Attention (StreamFusion, arXiv 2601.20273, section on Torus Attention). Of N machines, n ends up with the
heads n of all rows. It begins with what it has of them, pulls the other machines' queries one after the other while
it attends those that came before to its own keys, then pulls keys and values, K and V in one message, while it
attends all queries to the last that came. With the last keys it pushes each output to the machine whose rows
they are as soon as it is complete, and attends its own rows last, under which they travel.

Elements that leave a machine: 4 (N-1)/N^2 B L H D, where a ring between machines sends 2 (N-1)/N B L H D. N-1
exchanges for each of Q, K/V and O, in each of which a rank sends to one other.

Every stage is a change of layout: after i stages machine n holds the rows of machine n - i (windows) of the heads
n. Where heads do not divide over the machines, they are shared out by some of the axes that the degree was cut
into, and query rows by the others: fewer queries are pulled, and all keys. Keys that stay split inside a
machine are left to ``attention-ring``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fastpar.core.layout import Dim, Layout
from fastpar.core.mesh import Mesh
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program
from fastpar.ops.join import join
from fastpar.passes.attention_gather import split_keys
from fastpar.passes.attention_ring import rotated, turns
from fastpar.passes.attention_ulysses import rectangles, travelling
from fastpar.rules.attention import kv_head_dim
from fastpar.sharding.blockwise import Blockwise, Pair

ABOUT = 1.05  # bytes over the fewest that count as equal: then rather more heads and fewer keys (two machines)


@dataclass(frozen=True)
class AttentionTorus(Pass):
    """Stages along ``axes`` (default: all axes that split the keys; factors of a plan's axis go by its name)."""

    name: ClassVar[str] = "attention-torus"
    stage_in: ClassVar[str] = "sharded"

    axes: tuple[str, ...] = ()

    def apply(self, program: Program, ctx: PassContext) -> Program:
        mesh: Mesh = ctx.mesh
        for node in split_keys(program.graph):
            split = mesh.ordered(node.args[1].meta["layout"].dims[-2].axes)  # type: ignore[union-attr]
            axes = tuple(a for a in split if not self.axes or a.rstrip("0123456789") in self.axes)
            if mesh.size(axes) == 1:
                continue
            with program.graph.inserting_before(node):
                torus = _Torus(node, axes, mesh, travelling(node, ctx))
                node.replace_all_uses_with(torus.write())
            program.graph.erase_node(node)
            self._tell(torus, ctx)
        program.gm.recompile()
        return program

    def _tell(self, torus: _Torus, ctx: PassContext) -> None:
        if torus.spent == torus.axes:
            return
        shares = ctx.mesh.size(torus.spent)
        heads = torus.layout.dims[-3].size if len(torus.layout.dims) > 2 else 1
        note = (
            f"attention with {heads} heads in {torus.stages} stages: {shares} shares of heads x "
            f"{torus.stages // shares} of query rows (heads do not divide over the machines, and work should)"
        )
        if note not in ctx.notes:
            ctx.notes.append(note)


class _Torus(Blockwise):
    def __init__(self, node: fx.Node, axes: tuple[str, ...], mesh: Mesh, weights: Sequence[float]) -> None:
        super().__init__(node)
        self.mesh, self.axes = mesh, axes
        self.stages = mesh.size(axes)
        keys: Dim = self.k.meta["layout"].dims[-2]
        rows: Dim = self.layout.dims[-2]
        self.keys = keys if turns(keys) else Dim.shared(keys.size, mesh.ordered(keys.axes), mesh)
        over = mesh.ordered({*axes, *rows.axes})
        self.rows = rows if turns(rows) and rows.axes == {*over} else Dim.shared(rows.size, over, mesh)
        layouts = [_with_rows(self.q.meta["layout"], self.rows)]
        layouts += [_with_rows(x.meta["layout"], self.keys) for x in (self.k, self.v)]
        self.q, self.k, self.v = (
            self.to(x, want) for x, want in zip((self.q, self.k, self.v), layouts, strict=True)
        )
        self.out = _with_rows(self.layout, self.rows)
        options = rectangles(layouts, self.out, axes, mesh, weights)
        few = [o for o in options if o.sent <= ABOUT * min(o.sent for o in options)]
        best = max(few, key=lambda o: mesh.size(o.spent))
        self.spent, self.heads = best.spent, best.out.dims[:-2]
        self.over = ".".join(a for a in mesh.ordered(self.keys.axes) if a not in axes)

    def write(self) -> fx.Node:
        """The output in the attention's own layout."""
        count = self.mesh.size(self.spent)
        queries = [self._queries(0)]
        block = following = (self.to(self.k, self._block(self.k, 0)), self.to(self.v, self._block(self.v, 0)))
        totals: list[Pair] = []
        for i in range(count):
            # what the next block needs is on its way while this one is attended
            if i + 1 < count:
                queries.append(self._queries(i + 1))
            else:
                following = self._pull(1)
            totals.append(self._attend(queries[i], block, 0, counted=i == 0))
        pushed: list[fx.Node] = []
        for stage in range(1, self.stages):
            block, last = following, stage + 1 == self.stages
            if not last:
                following = self._pull(stage + 1)
            for i in [*range(1, count), 0]:  # the rows that stay come last: the others travel under them
                totals[i] = self.merged(totals[i], self._attend(queries[i], block, stage))
                if last and i > 0:
                    pushed.append(self._push(self.finished(totals[i]), i))
        own = self.finished(totals[0])
        return self.to(self._joined([own, *pushed]), self.layout)

    def _queries(self, stage: int) -> fx.Node:
        """The rows of the machine ``stage`` behind, of this machine's heads."""
        rows = rotated(self.rows, stage, self.mesh, self.spent)
        return self.to(self.q, Layout((*self.heads, rows, self.q.meta["layout"].dims[-1])))

    def _block(self, x: fx.Node, stage: int) -> Layout:
        layout: Layout = x.meta["layout"]
        heads = self.heads[len(self.heads) - len(layout.dims) + 2 :]
        lead = (kv_head_dim(dim, size) for dim, size in zip(heads, layout.shape[:-2], strict=True))
        return Layout((*lead, rotated(self.keys, stage, self.mesh, self.axes), layout.dims[-1]))

    def _pull(self, stage: int) -> Pair:
        """Keys and values of the machine ``stage`` behind, of this machine's heads."""
        return self.keys_to((self.k, self.v), (self._block(self.k, stage), self._block(self.v, stage)))

    def _attend(self, q: fx.Node, block: Pair, stage: int, counted: bool = False) -> Pair:
        columns = Dim.whole(self.keys.size) if self.over else rotated(self.keys, stage, self.mesh, self.axes)
        return self.attend(q, block, columns, self.over, counted)

    def _push(self, out: fx.Node, stage: int) -> fx.Node:
        """A finished output to the machine whose rows they are, which then has the heads of the one ``stage`` ahead."""
        dim = rotated(self.heads[-1], -stage, self.mesh, self.spent)
        return self.to(out, Layout((*self.heads[:-1], dim, self.rows, self.out.dims[-1])))

    def _joined(self, pieces: list[fx.Node]) -> fx.Node:
        if len(pieces) == 1:
            return pieces[0]
        srcs = [str(x.meta["layout"]) for x in pieces]
        return self.emit(join, (pieces, srcs, str(self.out), len(self.heads) - 1), self.value, self.out)


def _with_rows(layout: Layout, rows: Dim) -> Layout:
    return layout.with_dim(len(layout.dims) - 2, rows)
