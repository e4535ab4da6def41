"""``attention-ring``: keys and values travel round a ring while queries stay.

Ring Attention (Liu et al., section 3), double buffered as in FastUSP's pipelined ring: the
exchange that brings block t+1 starts before block t is attended, and is waited for when
block t+1 is needed. K and V of a step travel as one message. Blocks are the ranks' own parts,
uneven or empty, never padded; mask columns are cut from the rank's own rows of the mask.

After t steps rank c holds the rows of rank c - t: a layout like any other (windows), so the
ring's shift is a redistribute, and every step is checked like every other one.

A torus leaves blocks whose keys are split inside a machine: those get the same ring. Blocks of
other queries with the same keys take what has come round already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fastpar.core.layout import Atom, Dim, Layout, Seg
from fastpar.core.mesh import Mesh
from fastpar.graph.pipeline import Pass, PassContext
from fastpar.graph.program import Program
from fastpar.passes.attention_gather import split_keys
from fastpar.sharding.blockwise import Blockwise, Pair, split_over


@dataclass(frozen=True)
class AttentionRing(Pass):
    """A ring over whatever axes split the keys (after ``attention-ulysses`` and ``attention-torus``: those left)."""

    name: ClassVar[str] = "attention-ring"
    stage_in: ClassVar[str] = "sharded"

    def apply(self, program: Program, ctx: PassContext) -> Program:
        rounds: dict[Pair, dict[int, Pair]] = {}
        for node in [*split_keys(program.graph), *filter(split_over, program.graph.nodes)]:
            with program.graph.inserting_before(node):
                ring = _Ring(node, ctx.mesh, rounds)
                total = ring.write()
                if split_over(node):
                    for part in list(node.users):
                        part.replace_all_uses_with(total[part.args[1]])  # type: ignore[index]
                        program.graph.erase_node(part)
                else:
                    node.replace_all_uses_with(ring.finished(total))
            program.graph.erase_node(node)
        program.gm.recompile()
        return program


def rotated(dim: Dim, steps: int, mesh: Mesh, axes: tuple[str, ...] | None = None) -> Dim:
    """What every rank holds of ``dim`` after ``steps`` steps along ``axes`` (all that split it): the rows of the
    rank that many behind it."""

    def turned(seg: Seg) -> Seg:
        over = mesh.ordered({a for a in seg.axes if axes is None or a in axes})
        if not over:
            return seg
        order = []
        for member in mesh.group(0, seg.axes):
            c, n = mesh.coordinate(member, over), mesh.size(over)
            order.append(mesh.coordinate(mesh.group(member, over)[(c - steps) % n], seg.axes))
        starts = seg.starts()
        return Seg(seg.size, seg.axes, tuple(seg.parts[c] for c in order), tuple(starts[c] for c in order))

    return Dim.of(atom if atom.whole else Atom(tuple(map(turned, atom.segs))) for atom in dim.atoms)


def turns(dim: Dim) -> bool:
    """True where one ring takes every rank past all rows: one factor is split, all of it over the same axes."""
    split = [atom for atom in dim.atoms if not atom.whole]
    return len(split) == 1 and all(frozenset(s.axes) == dim.axes and not s.offsets for s in split[0].segs)


class _Ring(Blockwise):
    """Of an attention with split keys, or of a block with keys split over some axes."""

    def __init__(self, node: fx.Node, mesh: Mesh, rounds: dict[Pair, dict[int, Pair]]) -> None:
        super().__init__(node)
        self.mesh = mesh
        self.keys: Dim = self.k.meta["layout"].dims[-2]
        self.axes = split_over(node) or mesh.ordered(self.keys.axes)
        self.steps = mesh.size(self.axes)
        if not split_over(node) and not turns(self.keys):
            self.keys = Dim.shared(self.keys.size, self.axes, mesh)
            self.k, self.v = (self.to(x, _with_keys(x, self.keys)) for x in (self.k, self.v))
        self.come = rounds.setdefault((self.k, self.v), {0: (self.k, self.v)})
        self.counted = node.meta.get("split_keys", True) if split_over(node) else True

    def write(self) -> Pair:
        total: Pair | None = None
        for step in range(self.steps):
            # the next exchange is started before this block is attended: that is what hides it
            if step + 1 < self.steps and step + 1 not in self.come:
                wants = (_with_keys(x, self._keys(step + 1)) for x in (self.k, self.v))
                self.come[step + 1] = self.keys_to(self.come[step], tuple(wants))  # type: ignore[arg-type]
            block = self.attend(self.q, self.come[step], self._keys(step), counted=self.counted and step == 0)
            total = self.merged(total, block)
        assert total is not None
        return total

    def _keys(self, step: int) -> Dim:
        return rotated(self.keys, step, self.mesh, self.axes)


def _with_keys(x: fx.Node, keys: Dim) -> Layout:
    layout: Layout = x.meta["layout"]
    return layout.with_dim(len(layout.dims) - 2, keys)
