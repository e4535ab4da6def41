"""Reading and writing rows by index where a rank holds some of them only.

Which rows an index names is not known until the step runs. So every rank looks up those that it holds and has zeros
for the others, a sum over ranks being the true value (as vocabulary-parallel embeddings do; Megatron-LM, Shoeybi et
al. 2019, section 3), and every rank writes those that it holds and drops the others.

``held`` says, for each index in turn, which rows of its dimension are here: ``-`` for all of them, or the dimension's
atoms with their runs of rows in local order, ``2[0:2]*9[3:6+8:9]`` for rows 3 to 5 and the last of nine, twice.

| operator | result |
|---|---|
| ``read_held(x, indices, held)`` | ``x[indices]``, zero where a row is not held |
| ``write_held(x, indices, values, accumulate, held)`` | ``index_put``, of the rows that are held |
| ``gather_held(x, dim, index, held)`` | ``gather``, zero where a row is not held |
| ``scatter_held(x, dim, index, source, how, held)`` | ``scatter``, of the rows that are held |

A scatter's ``how`` is ``set``, ``add``, or ``reduce amax`` and ``only amax`` (without what was there before).

An index that names no row of the whole dimension is the kernel's to refuse, as on one device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastpar.core.layout import Dim
from fastpar.core.mesh import Mesh

_LIB = torch.library.Library("fastpar", "FRAGMENT")
_PT2 = (torch.Tag.pt2_compliant_tag,)
_LIB.define("read_held(Tensor x, Tensor?[] indices, str held) -> Tensor", tags=_PT2)
_LIB.define("write_held(Tensor x, Tensor?[] indices, Tensor values, bool accumulate, str held) -> Tensor", tags=_PT2)
_LIB.define("gather_held(Tensor x, int dim, Tensor index, str held) -> Tensor", tags=_PT2)
_LIB.define("scatter_held(Tensor x, int dim, Tensor index, Tensor source, str how, str held) -> Tensor", tags=_PT2)
aten = torch.ops.aten

Atoms = tuple[tuple[int, tuple[tuple[int, int], ...]], ...]  # of a dimension: the atom's size, its runs as (first, end)
ALL = "-"


def held_text(dim: Dim, mesh: Mesh, rank: int) -> str:
    """Which rows of ``dim`` are on ``rank``, as the operators here take it.

    >>> from fastpar.core.layout import Layout
    >>> held_text(Layout.parse("[9@sp(3,3,3)+2@sp(1,1,0)]").dims[0], Mesh((("sp", 3),)), 1)
    '11[3:6+10:11]'
    """
    if dim.is_whole:
        return ALL
    texts = []
    for atom in dim.atoms:
        runs, offset = [], 0
        for seg in atom.segs:
            start, length = seg.local(mesh, rank)
            if length:
                runs.append(f"{offset + start}:{offset + start + length}")
            offset += seg.size
        texts.append(f"{atom.size}[{'+'.join(runs)}]")
    return "*".join(texts)


@lru_cache(maxsize=4096)
def _parsed(held: str) -> Atoms:
    atoms = []
    for text in held.split("*"):
        size, _, runs = text.rstrip("]").partition("[")
        pairs = (tuple(map(int, run.split(":"))) for run in runs.split("+") if run)
        atoms.append((int(size), tuple((a, b) for a, b in pairs)))
    return tuple(atoms)


def _places(index: Tensor, held: str) -> Tensor:
    """Where the rows that ``index`` names are among those held: one behind the last if they are not, and two behind
    it if there are no such rows at all."""
    atoms = _parsed(held)
    size = math.prod(n for n, _ in atoms)
    index = torch.where(index < 0, index + size, index).to(torch.int64)
    place, here, rest, count = torch.zeros_like(index), torch.ones_like(index, dtype=torch.bool), size, 1
    for n, runs in atoms:
        rest //= n
        digit = index.div(rest, rounding_mode="floor") % n
        among, found, before = torch.zeros_like(index), torch.zeros_like(here), 0
        for first, end in runs:
            inside = (digit >= first) & (digit < end)
            among = torch.where(inside, digit + (before - first), among)
            found, before = found | inside, before + end - first
        place, here, count = place * before + among, here & found, count * before
    place = torch.where(here, place, count)
    return torch.where((index >= 0) & (index < size), place, count + 1)


def _with_spare(x: Tensor, dim: int) -> Tensor:
    """``x`` with one more row, of zeros: what is not held is read from there, and written there."""
    pads = [0, 0] * (x.dim() - 1 - dim) + [0, 1]
    return aten.constant_pad_nd.default(x, pads, 0)


def _local(x: Tensor, indices: Sequence[Tensor | None], held: str) -> tuple[Tensor, list[Tensor | None]]:
    out: list[Tensor | None] = []
    texts = iter(held.split(" "))
    for d, index in enumerate(indices):
        text = ALL if index is None else next(texts)
        if index is not None and text != ALL:
            index, x = _places(index, text), _with_spare(x, d)
        out.append(index)
    return x, out


def _without_spare(x: Tensor, like: Tensor) -> Tensor:
    for d, size in enumerate(like.shape):
        x = x if x.shape[d] == size else x.narrow(d, 0, size)
    return x.contiguous()


def _read(x: Tensor, indices: Sequence[Tensor | None], held: str) -> Tensor:
    x, indices = _local(x, indices, held)
    return aten.index.Tensor(x, indices)


def _write(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool, held: str) -> Tensor:
    wide, indices = _local(x, indices, held)
    return _without_spare(aten.index_put.default(wide, indices, values, accumulate), x)


def _gather(x: Tensor, dim: int, index: Tensor, held: str) -> Tensor:
    dim %= x.dim()
    return aten.gather.default(_with_spare(x, dim), dim, _places(index, held))


def _scatter(x: Tensor, dim: int, index: Tensor, source: Tensor, how: str, held: str) -> Tensor:
    dim %= x.dim()
    wide, places = _with_spare(x, dim), _places(index, held)
    how, _, reduction = how.partition(" ")
    if how in ("reduce", "only"):
        wide = aten.scatter_reduce.two(wide, dim, places, source, reduction, include_self=how == "reduce")
    else:
        scatter: Any = aten.scatter_add.default if how == "add" else aten.scatter.src
        wide = scatter(wide, dim, places, source)
    return _without_spare(wide, x)


for _name, _function in (("read", _read), ("write", _write), ("gather", _gather), ("scatter", _scatter)):
    _LIB.impl(f"{_name}_held", _function, "CompositeImplicitAutograd")

read_held = torch.ops.fastpar.read_held.default
write_held = torch.ops.fastpar.write_held.default
gather_held = torch.ops.fastpar.gather_held.default
scatter_held = torch.ops.fastpar.scatter_held.default
