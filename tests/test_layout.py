"""Layouts: text round trip, total redistribute, the view algebra; all by hypothesis."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpar.core.errors import TextError
from fastpar.core.layout import Atom, Dim, Layout, Partial, Seg, even_parts
from fastpar.core.mesh import Mesh
from fastpar.core.regroup import Misfit, cat_dims, regroup, slice_dim
from fastpar.core.transfer import elements_sent, is_local, transfer
from fastpar.ops.collectives import exchange_across
from fastpar.ops.redistribute import across, take

MESHES = [
    Mesh((("sp", 1),)), Mesh((("sp", 2),)), Mesh((("sp", 3),)), Mesh((("sp", 5),)), Mesh((("sp", 8),)),
    Mesh((("ring", 2), ("sp", 2))), Mesh((("cfg", 2), ("sp", 3))), Mesh((("cfg", 2), ("ring", 2), ("sp", 2))),
]  # fmt: skip


@st.composite
def parts_of(draw: st.DrawFn, size: int, n: int) -> tuple[int, ...]:
    """Any partition of ``size`` into ``n`` parts, empty ones included; even ones often."""
    if draw(st.booleans()):
        return even_parts(size, n)
    cuts = sorted(draw(st.lists(st.integers(0, size), min_size=n - 1, max_size=n - 1)))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True))


@st.composite
def dims(draw: st.DrawFn, size: int, mesh: Mesh, axes: list[str]) -> Dim:
    """Any dimension of ``size`` rows split over some of ``axes`` (which it takes out of the list)."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    outer = draw(st.sampled_from(divisors))
    atoms = []
    for count in (outer, size // outer):
        taken = tuple(draw(st.permutations([a for a in axes if draw(st.booleans())])))
        if not taken or mesh.size(taken) == 1:
            atoms.append(Atom((Seg(count),)))
            continue
        for a in taken:
            axes.remove(a)
        first = draw(st.integers(0, count))
        segs = tuple(
            Seg(n, taken, draw(parts_of(n, mesh.size(taken)))) for n in (first, count - first) if n
        )
        atoms.append(Atom(segs or (Seg(count),)))
    return Dim.of(atoms)


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], mesh: Mesh, partial: bool = False) -> Layout:
    axes = list(mesh.names)
    out = tuple(draw(dims(size, mesh, axes)) for size in shape)
    if partial and axes and draw(st.booleans()):
        return Layout(out, (Partial("sum", (axes[0],)),))
    return Layout(out)


shapes = st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple)


def shards(value: torch.Tensor, layout: Layout, mesh: Mesh) -> list[torch.Tensor]:
    """What ranks hold; terms of a partial value are unequal and sum to it."""
    out = [take(value, layout, mesh, r) for r in range(mesh.ranks)]
    if layout.partial:
        axes = tuple(layout.partial_axes)
        n = mesh.size(axes)
        out = [x * (2.0 * (mesh.coordinate(r, axes) + 1) / (n * (n + 1))) for r, x in enumerate(out)]
    return out


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_redistribute_there_and_back_is_the_identity(data: st.DataObject) -> None:
    mesh, shape = data.draw(st.sampled_from(MESHES)), data.draw(shapes)
    src, dst = data.draw(layouts(shape, mesh)), data.draw(layouts(shape, mesh))
    value = torch.randn(shape, dtype=torch.float64)
    held = shards(value, src, mesh)
    moved = across(held, src, dst, mesh)
    for rank in range(mesh.ranks):
        assert tuple(moved[rank].shape) == dst.local_shape(mesh, rank)
        assert torch.equal(moved[rank], take(value, dst, mesh, rank))
    back = across(moved, dst, src, mesh)
    assert all(torch.equal(a, b) for a, b in zip(back, held, strict=True))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_exchange_is_what_redistribute_means(data: st.DataObject) -> None:
    mesh, shape = data.draw(st.sampled_from(MESHES)), data.draw(shapes)
    src, dst = data.draw(layouts(shape, mesh)), data.draw(layouts(shape, mesh))
    held = shards(torch.randn(shape, dtype=torch.float64), src, mesh)
    assert all(
        torch.equal(a, b)
        for a, b in zip(exchange_across([held], [src], [dst], mesh)[0], across(held, src, dst, mesh), strict=True)
    )
    sides = [transfer(src, dst, mesh, r) for r in range(mesh.ranks)]
    for rank, side in enumerate(sides):
        for position, peer in enumerate(side.group):
            assert side.send_splits[position] == sides[peer].receive_splits[side.me]
        assert sum(side.receive_splits) == math.prod(side.shape), "every element arrives exactly once"
        assert elements_sent(src, dst, mesh)[rank] == side.sent
    if is_local(src, dst, mesh):
        assert all(side.sent == 0 for side in sides)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_partial_values_are_summed(data: st.DataObject) -> None:
    mesh, shape = data.draw(st.sampled_from(MESHES)), data.draw(shapes)
    src, dst = data.draw(layouts(shape, mesh, partial=True)), data.draw(layouts(shape, mesh))
    value = torch.randn(shape, dtype=torch.float64)
    for rank, got in enumerate(across(shards(value, src, mesh), src, dst, mesh)):
        torch.testing.assert_close(got, take(value, dst, mesh, rank))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_text_round_trips(data: st.DataObject) -> None:
    mesh, shape = data.draw(st.sampled_from(MESHES)), data.draw(shapes)
    layout = data.draw(layouts(shape, mesh, partial=True))
    assert Layout.parse(str(layout)) == layout
    assert Mesh.parse(str(mesh)) == mesh
    layout.check(mesh)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equal_layouts_are_equal_contents_and_only_those(data: st.DataObject) -> None:
    mesh = data.draw(st.sampled_from(MESHES))
    size = data.draw(st.integers(1, 12))
    a, b = data.draw(dims(size, mesh, list(mesh.names))), data.draw(dims(size, mesh, list(mesh.names)))
    if a == b:
        assert all((a.rows(mesh, r) == b.rows(mesh, r)).all() for r in range(mesh.ranks))
    rows = [a.rows(mesh, r) for r in range(mesh.ranks)]
    assert sorted({int(i) for r in rows for i in r}) == list(range(size)), "every row is somewhere"
    assert [len(r) for r in rows] == [a.local(mesh, r) for r in range(mesh.ranks)]


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_a_view_that_regroups_is_local(data: st.DataObject) -> None:
    mesh = data.draw(st.sampled_from(MESHES))
    factors = data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    def grouped() -> tuple[int, ...]:
        cuts = sorted(data.draw(st.sets(st.integers(1, len(factors) - 1)))) if len(factors) > 1 else []
        return tuple(math.prod(factors[a:b]) for a, b in zip([0, *cuts], [*cuts, len(factors)], strict=True))
    shape, view = grouped(), grouped()
    layout = data.draw(layouts(shape, mesh))
    out = regroup(layout.dims, view)
    if isinstance(out, Misfit):
        assert not layout.dims[out.dim].is_whole
        return
    value = torch.randn(shape)
    viewed = Layout(out)
    assert viewed.shape == view
    for rank in range(mesh.ranks):
        local = take(value, layout, mesh, rank).reshape(viewed.local_shape(mesh, rank))
        assert torch.equal(local, take(value.reshape(view), viewed, mesh, rank))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_slices_and_concatenations_keep_what_ranks_have(data: st.DataObject) -> None:
    mesh = data.draw(st.sampled_from(MESHES))
    size = data.draw(st.integers(1, 12))
    dim = data.draw(dims(size, mesh, list(mesh.names)))
    start = data.draw(st.integers(0, size - 1))
    stop, step = data.draw(st.integers(start, size)), data.draw(st.integers(1, 3))
    cut = slice_dim(dim, start, stop, step)
    value = torch.arange(size)
    if cut is None:
        assert len(dim.atoms) > 1
        return
    for rank in range(mesh.ranks):
        rows = dim.rows(mesh, rank)
        mine = [int(i) for i in rows if start <= i < stop and (i - start) % step == 0]
        assert value[start:stop:step][torch.from_numpy(cut.rows(mesh, rank).copy())].tolist() == mine
    joined = cat_dims([dim, dim]) if len(dim.atoms) <= 1 else None
    if joined is not None:
        for rank in range(mesh.ranks):
            rows = dim.rows(mesh, rank)
            assert joined.rows(mesh, rank).tolist() == [*rows.tolist(), *(rows + size).tolist()]


def test_the_designs_examples() -> None:
    assert even_parts(1025, 4) == (257, 256, 256, 256)
    assert even_parts(1, 4) == (1, 0, 0, 0)
    joint = cat_dims([Dim.split(512, ("sp",), [64] * 8), Dim.split(4096, ("sp",), [512] * 8)])
    assert joint is not None and str(joint) == "512@sp(64*8)+4096@sp(512*8)"
    image = slice_dim(joint, 512, 4608)
    assert image == Dim.split(4096, ("sp",), [512] * 8)
    batch = regroup((Dim.whole(2), Dim.split(6, ("sp",), [3, 3]), Dim.whole(5)), (12, 5))
    assert not isinstance(batch, Misfit) and str(batch[0]) == "2*6@sp(3*2)"
    rows = regroup((Dim.whole(1), Dim.whole(4), Dim.split(8, ("sp",), [4, 4]), Dim.whole(3)), (1, 4, 24))
    assert not isinstance(rows, Misfit) and str(rows[2]) == "24@sp(12*2)"


def test_axes_along_which_layouts_differ() -> None:
    joint = Layout.parse("[2@cfg(1*2), 20@sp(10,10)+4@sp(2,2), 8]")
    even = Layout.parse("[2@cfg(1*2), 24@sp(12*2), 8]")
    assert joint.differing(even) == {"sp"} and joint.differing(joint) == set()
    assert joint.without(("sp",)) == even.without(("sp",)) == Layout.parse("[2@cfg(1*2), 24, 8]")
    assert joint.without(("cfg", "sp")) == Layout.whole((2, 24, 8)) and joint.without(()) == joint
    flat, other = (Layout.parse(f"[2@cfg(1*2)*24@sp({parts})]") for parts in ("12*2", "14,10"))
    assert flat.differing(other) == {"sp"} and flat.without(("cfg",)) == Layout.parse("[2*24@sp(12*2)]")
    assert Layout.parse("[24@cfg.sp(6*4)]").without(("sp",)) is None, "these rows are split over both together"
    summed = Layout.parse("[8] partial(sum:sp)")
    assert summed.differing(summed.summed()) == {"sp"} and summed.without(("sp",)) is None


def test_ulysses_volume() -> None:
    """4 exchanges of 1/N of the tensor, (N-1)/N of which leaves (DeepSpeed-Ulysses, section 3)."""
    mesh = Mesh((("sp", 8),))
    tokens = Layout((Dim.whole(1), Dim.whole(24), Dim.split(4608, ("sp",), [576] * 8), Dim.whole(128)))
    heads = Layout((Dim.whole(1), Dim.split(24, ("sp",), [3] * 8), Dim.whole(4608), Dim.whole(128)))
    assert set(elements_sent(tokens, heads, mesh)) == {24 * 4608 * 128 * 7 // 64}


@pytest.mark.parametrize("text", ["4096", "[4096@sp]", "[4096@sp(x)]", "[a]", ""])
def test_bad_text_is_a_clear_error(text: str) -> None:
    with pytest.raises(TextError, match="valid"):
        Layout.parse(text)
