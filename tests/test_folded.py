"""Messages as views: bit for bit those of boxes, and few pieces however many ranks there are."""

from __future__ import annotations

from dataclasses import replace
from operator import getitem

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

import fastpar
from fastpar.backends.simulate.lockstep import run_local
from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.graph.forward import forwarded
from fastpar.ops.collectives import Exchange, assemble, decode, encode, pack, pack_boxes, unpack, unpack_boxes
from fastpar.ops.folded import Run, pack_folded, pieces, runs, unpack_folded
from fastpar.ops.redistribute import take
from fastpar.run.build import build
from tests.test_layout import MESHES, layouts, shapes

DTYPES = [torch.float32, torch.bfloat16, torch.uint8]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_message_is_that_of_its_boxes(data: st.DataObject) -> None:
    """Several values of any layouts, also of several dtypes, to any other layouts."""
    mesh = data.draw(st.sampled_from(MESHES))
    rank = data.draw(st.integers(0, mesh.ranks - 1))
    srcs, dsts, values = [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        shape = data.draw(shapes)
        srcs.append(data.draw(layouts(shape, mesh)))
        dsts.append(data.draw(layouts(shape, mesh)))
        values.append((torch.randn(shape) * 50).to(data.draw(st.sampled_from(DTYPES))))
    side = Exchange(srcs, dsts, mesh, rank, [v.dtype for v in values])
    xs = [take(v, src, mesh, rank) for v, src in zip(values, srcs, strict=True)]
    sent = pack_folded(xs, side.send_boxes)
    assert sent.dtype == pack_boxes(xs, side.send_boxes).dtype
    assert torch.equal(sent, pack_boxes(xs, side.send_boxes))
    there = [take(v, dst, mesh, rank) for v, dst in zip(values, dsts, strict=True)]
    received = pack_boxes(there, side.receive_boxes)
    again = unpack_folded(received, side.shapes, side.receive_boxes, side.dtypes)
    plain = unpack_boxes(received, side.shapes, side.receive_boxes, side.dtypes)
    for got, want, value in zip(again, plain, there, strict=True):
        assert torch.equal(got, want) and torch.equal(got, value)
        assert got.is_contiguous() and got.dtype == want.dtype


def exchange(shape: tuple[int, ...], src: str, dst: str, ranks: int, rank: int = 0) -> Exchange:
    mesh = Mesh((("u", ranks),))
    return Exchange([Layout.parse(src)], [Layout.parse(dst)], mesh, rank)


@pytest.mark.parametrize("ranks", [2, 4, 8, 24])
def test_an_attention_on_any_number_of_ranks_is_a_few_views(ranks: int) -> None:
    """Text and picture, split over the ranks, to heads: as many views as segments."""
    text, picture = 48 // ranks, 480 // ranks
    tokens, heads = f"48@u({text}*{ranks})+480@u({picture}*{ranks})", f"24@u({24 // ranks}*{ranks})"
    side = exchange((1, 528, 24, 4), f"[1, {tokens}, 24, 4]", f"[1, 528, {heads}, 4]", ranks)
    assert len(decode(side.send_boxes)) >= ranks
    assert pieces(side.send_boxes) <= 2 and pieces(side.receive_boxes) == 2


def test_shares_that_differ_by_a_row_are_two_runs() -> None:
    side = exchange((1, 1025, 8, 4), "[1, 1025@u(257,256*3), 8, 4]", "[1, 1025, 8@u(2*4), 4]", 4)
    assert [run.count for run in runs(decode(side.receive_boxes))] == [1, 3]
    assert [run.count for run in runs(decode(side.send_boxes))] == [4]


def test_what_goes_to_all_is_one_view() -> None:
    boxes = [(0, (0, 0), (2, 3))] * 5
    assert runs(boxes) == [Run(5, (boxes[0],), (-1,))]
    x = torch.randn(2, 3)
    assert torch.equal(pack_folded([x], [n for b in boxes for n in (0, 2, *b[1], *b[2])]), x.reshape(-1).repeat(5))


def test_what_comes_in_one_piece_is_not_copied() -> None:
    """A ring's keys: what arrived is used, and sent on, as it lies there."""
    boxes, buffer = [0, 2, 0, 0, 4, 3, 1, 2, 0, 0, 2, 3], torch.randn(18)
    first, second = unpack_folded(buffer, [2, 4, 3, 2, 2, 3], boxes)
    assert first.data_ptr() == buffer.data_ptr() and second.data_ptr() == buffer[12:].data_ptr()


def test_tiles_need_not_be_a_grid() -> None:
    x = torch.arange(24).view(4, 6)
    tiles = [((0, 0), x[:, :2]), ((0, 2), x[:1, 2:]), ((1, 2), x[1:, 2:3]), ((1, 3), x[1:, 3:])]
    assert torch.equal(assemble([(at, tuple(t.shape), t) for at, t in tiles], torch.cat), x)
    wheel = [((0, 0), x[:1, :4]), ((0, 4), x[:3, 4:]), ((1, 0), x[1:, :2]), ((3, 2), x[3:, 2:]), ((1, 2), x[1:3, 2:4])]
    with pytest.raises(ValueError, match="cannot be put together"):
        assemble([(at, tuple(t.shape), t) for at, t in wheel], torch.cat)


def test_encode_and_pieces_agree_on_nothing() -> None:
    assert pieces(encode([], "src")) == 0
    assert pack_folded([torch.randn(2)], []).numel() == 0
    assert [tuple(x.shape) for x in unpack_folded(torch.randn(0), [2, 0, 3], [])] == [(0, 3)]


def test_a_ring_sends_on_what_came() -> None:
    """Keys and values that arrive are used, and leave again as they lie there; one-sided programs keep their packs."""
    q = torch.randn(1, 2, 12, 8, dtype=torch.float64)
    captured = fastpar.capture(lambda q: F.scaled_dot_product_attention(q, q.sin(), q.cos()), (q,)).programs[0]
    for plan, before, after in (("ring=4", 4, 2), ("ulysses=4", 2, 2)):
        built = build(captured.program, plan)
        written = [built.localise(rank) for rank in range(4)]
        sent = [replace(program, gm=forwarded(program.gm)) for program in written]
        assert all(sum(n.target is pack for n in p.graph.nodes) == before for p in written)
        assert all(sum(n.target is pack for n in p.graph.nodes) == after for p in sent)
        assert all((a.gm is b.gm) == (before == after) for a, b in zip(sent, written, strict=True))
        for got, want in zip(run_local(sent, [q]), run_local(written, [q]), strict=True):
            assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_rows_that_stay_are_in_no_message(ranks: int) -> None:
    """Halos of a convolution: the rank's own rows go straight to it, and the message holds what others need."""
    torch.manual_seed(0)
    x, w = torch.randn(1, 3, 41, 6, dtype=torch.float64), torch.randn(3, 3, 3, 3, dtype=torch.float64)

    def model(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(x, w, padding=1).sin(), w, padding=1).cos()

    recorded = fastpar.capture(model, (x,)).programs[0]
    built = build(recorded.program, f"gather={ranks}")
    written = [built.localise(rank) for rank in range(ranks)]
    for rank, program in enumerate(written):
        splits = [n.args[1:3] for n in program.graph.nodes if "all_to_all" in str(n.target)]
        halos = [(received, sent) for received, sent in splits if sent[rank] == 0]
        assert halos and all(received[rank] == 0 for received, _ in halos)
        assert all(max(sent) <= 3 * 6 for _, sent in halos), "a row of three channels"
    for got in run_local(written, list(recorded.args)):
        assert torch.allclose(got[0], recorded.outputs[0], rtol=1e-12, atol=1e-12)
    assert fastpar.verify(model, (x,), plan=f"gather={ranks}").ok


def test_of_even_shares_all_travels() -> None:
    mesh, whole, tokens = Mesh((("u", 2),)), "[1, 8@u(4*2), 4, 2]", "[1, 8, 4@u(2*2), 2]"
    side = Exchange([Layout.parse(whole)], [Layout.parse(tokens)], mesh, 0, keep=True)
    assert not side.kept and side.send_splits == [16, 16]


def test_what_is_packed_in_another_order_is_packed() -> None:
    boxes = [0, 1, 0, 6, 1, 1, 0, 6]

    def program(*order: int) -> fx.GraphModule:
        graph = fx.Graph()
        done = graph.call_function(unpack, (graph.placeholder("buffer"), [1, 6, 1, 6], boxes))
        parts = [graph.call_function(getitem, (done, i)) for i in order]
        graph.output((graph.call_function(pack, (parts, boxes)),))
        return fx.GraphModule({}, graph)

    buffer = torch.arange(12.0)
    for order, packed in (((0, 1), 0), ((1, 0), 1)):
        sent = forwarded(program(*order))
        assert sum(n.target is pack for n in sent.graph.nodes) == packed
        assert torch.equal(sent(buffer)[0], program(*order)(buffer)[0])
