"""Messages to and from attentions: tokens first (``arrange``), beside each other (``pack``), as they came (arrival)."""

from __future__ import annotations

import math
from operator import getitem
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.testing import FileCheck

import fastpar
from fastpar.backends.simulate.lockstep import run_local
from fastpar.core.transfer import Box
from fastpar.graph.arrival import in_arrival_order
from fastpar.ops.attention import attention
from fastpar.ops.collectives import COLLECTIVES, decode, encode, pack, pack_boxes, unpack
from fastpar.ops.folded import pieces
from fastpar.plan.expand import pipeline_text
from fastpar.run.build import build

aten = torch.ops.aten
HEADS, WIDTH = 6, 4


class Joint(torch.nn.Module):
    """Text and picture in one attention; ``masked``: only half of the text is looked at."""

    def __init__(self, masked: bool = False, causal: bool = False, share: int = 1) -> None:
        super().__init__()
        size = HEADS * WIDTH
        self.masked, self.causal, self.share = masked, causal, share
        self.text, self.q, self.k, self.v, self.o = (torch.nn.Linear(size, size) for _ in range(5))

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.text(text), x], 1)
        q, k, v = (f(both).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mask = (torch.arange(both.shape[1]) > text.shape[1] // 2)[None, None, None] if self.masked else None
        out = F.scaled_dot_product_attention(q.sin(), k.cos(), v, mask, is_causal=self.causal)
        return both + self.o(out.transpose(1, 2).flatten(2))


def captured(batch: int = 1, tokens: int = 22, text: int = 8, **options: Any) -> fastpar.Captured:
    torch.manual_seed(0)
    x, t = torch.randn(batch, tokens, HEADS * WIDTH), torch.randn(batch, text, HEADS * WIDTH)
    return fastpar.capture(Joint(**options).double().eval(), (x.double(), t.double()))


def localised(model: fastpar.Captured, plan: str, rank: int = 0, **options: Any) -> fx.Graph:
    return build(model.programs[0].program, plan, **options).localise(rank).graph


def unpacked(graph: fx.Graph) -> list[list[Any]]:
    return [decode(n.args[2]) for n in graph.nodes if n.target is unpack]  # type: ignore[arg-type]


def packed(graph: fx.Graph) -> list[list[Any]]:
    return [decode(n.args[1]) for n in graph.nodes if n.target is pack]  # type: ignore[arg-type]


APART = pipeline_text(fastpar.Plan.parse("ulysses=3")).replace("overlap", "overlap{pack=false}")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [22, 23])
def test_what_an_attention_takes_and_gives_is_the_message(batch: int, tokens: int) -> None:
    """In one piece, uneven or not: q, k and v as they came, and with one batch item o as it goes."""
    model = captured(batch, tokens)
    for rank in range(3):
        graph = localised(model, "ulysses=3", rank, passes=APART)
        came = unpacked(graph)[:3]
        assert [len(boxes) for boxes in came] == [1, 1, 1]
        assert {boxes[0][2] for boxes in came} == {(tokens + 8, batch, HEADS // 3, WIDTH)}, "all rows"
        [out] = [n.args for n in graph.nodes if n.target is pack and _attended(n.args[0][0])]
        assert len(decode(out[1])) == 1
    assert fastpar.verify(model, plan="ulysses=3", passes=APART).ok


def _attended(node: fx.Node) -> bool:
    return node.target is attention or (node.target is aten.permute.default and _attended(node.all_input_nodes[0]))


def test_q_k_and_v_in_one_message_are_views_of_it() -> None:
    """Row by row beside each other."""
    packs = pipeline_text(fastpar.Plan.parse("ulysses=3"), schedule=False) + ",pack"
    built = build(captured().programs[0].program, "ulysses=3", passes=packs)
    FileCheck().check("unsqueeze").check("aten.cat").check_next("all_to_all").check_next("getitem").check_count(
        "select.int", 3
    ).check("fastpar.attention").run("\n".join(str(n.target) for n in built.lowered.graph.nodes))
    graph = built.localise(1).graph
    assert [(0, (0,) * 5, (30, 3, 1, 2, 4))] in unpacked(graph)
    assert sum(n.target in COLLECTIVES for n in built.lowered.graph.nodes) == 3  # q, k and v; o; the output
    assert fastpar.verify(captured(), plan="ulysses=3", passes=packs).ok


def test_values_of_other_shapes_lie_behind_one_another() -> None:
    """Keys and values of fewer heads, which are each other's neighbours, and not the queries'."""

    def model(x: torch.Tensor) -> torch.Tensor:
        q, k = (x.unflatten(-1, (n, -1)).transpose(1, 2) for n in (6, 3))
        return F.scaled_dot_product_attention(q.sin()[..., :2], k.cos()[..., :2], k, enable_gqa=True)

    x = torch.randn(1, 10, 24, dtype=torch.float64)
    packs = pipeline_text(fastpar.Plan.parse("ulysses=3"), schedule=False) + ",pack"
    report = fastpar.verify(model, (x,), plan="ulysses=3", passes=packs)
    assert report.ok and sum(c.count for c in report.collectives) == 2


@pytest.mark.parametrize(("options", "pieces"), [({"masked": True}, [1, 6, 6]), ({"causal": True}, [6, 6, 6])])
def test_under_a_mask_tokens_are_put_in_order(options: dict[str, bool], pieces: list[int]) -> None:
    """Keys and values; queries too, where the mask is not the same for all of them."""
    model = captured(**options)
    came = [boxes for boxes in unpacked(localised(model, "ulysses=3", passes=APART)) if len(boxes[0][1]) == 4][:3]
    assert [len(boxes) for boxes in came] == pieces  # text and picture, of three ranks
    assert fastpar.verify(model, plan="ulysses=3", passes=APART).ok


def program(boxes: list[int], use: str) -> fx.Graph:
    """One rank of two with 4 tokens of text and 6 of a picture, what came used in some way; ``boxes`` go out."""
    graph = fx.Graph()
    buffer, other = graph.placeholder("buffer"), graph.placeholder("other")
    came = encode([(0, Box((0, 0), (at, 0), (n, 3))) for at, n in ((0, 2), (4, 3), (2, 2), (7, 3))], "dst")
    done = graph.call_function(unpack, (buffer, [2, 10, 3], came))
    value = graph.call_function(getitem, (done, 0))
    for node, shape in ((buffer, 30), (other, (10, 3)), (value, (10, 3))):
        node.meta["val"] = torch.empty(shape)
    rows, keys = value, value
    if use == "other keys":
        keys = other
    if use == "added":
        rows = graph.call_function(aten.add.Tensor, (value, other))
        rows.meta["val"] = torch.empty(10, 3)
    out = graph.call_function(attention, (rows, keys, other if use == "other values" else keys))
    out.meta["val"] = torch.empty(10, 3)
    if use == "turned":
        out = graph.call_function(aten.permute.default, (out, [1, 0]))
        out.meta["val"] = torch.empty(3, 10)
    sent = graph.call_function(pack, ([out], boxes))
    graph.output((sent, value) if use == "returned" else (sent,))
    return graph


WHOLE = encode([(0, Box((at, 0), (at, 0), (n, 3))) for at, n in ((0, 2), (4, 3), (2, 2), (7, 3))], "src")
TURNED = encode([(0, Box((0, 0), (0, 0), (3, 10)))], "src")
NARROW = encode([(0, Box((0, d), (0, d), (10, 1))) for d in range(3)], "src")


@pytest.mark.parametrize(
    ("use", "boxes", "stays"),
    [("all", WHOLE, 1), ("other keys", WHOLE, 1), ("other values", WHOLE, 4), ("added", WHOLE, 4),
     ("returned", WHOLE, 4), ("all", NARROW, 1), ("turned", TURNED, 4)],
)  # fmt: skip
def test_rows_stay_where_nothing_depends_on_their_order(use: str, boxes: list[int], stays: int) -> None:
    """``stays``: in how many pieces what came is. Narrow boxes have all rows: what goes out is put in order by it."""
    torch.manual_seed(0)
    given, before, after = (torch.randn(30), torch.randn(10, 3)), program(boxes, use), program(boxes, use)
    in_arrival_order(after)
    assert len(unpacked(after)[0]) == stays
    assert len(packed(after)[0]) == {(1, 8): 1}.get((stays, len(boxes)), len(packed(after)[0]))
    for got, want in zip(fx.GraphModule({}, after)(*given), fx.GraphModule({}, before)(*given), strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_rows_of_queries_that_are_broadcast() -> None:
    """Keys have a batch and queries have none: in the output their rows are another dimension."""

    def one(move: bool) -> fx.GraphModule:
        graph = program(WHOLE, "other keys")
        [node] = [n for n in graph.nodes if n.target is attention]
        node.meta["val"] = node.args[1].meta["val"] = torch.empty(1, 10, 3)
        boxes = [(i, Box((0, *starts), (0, *starts), (1, *sizes))) for i, starts, sizes in decode(WHOLE)]
        next(iter(node.users)).update_arg(1, encode(boxes, "src"))
        if move:
            in_arrival_order(graph)
        return fx.GraphModule({}, graph)

    torch.manual_seed(0)
    given = torch.randn(30), torch.randn(1, 10, 3)
    moved = one(True)
    assert [len(boxes) for boxes in unpacked(moved.graph)] == [1]
    assert torch.allclose(moved(*given)[0], one(False)(*given)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("queries", "stays"), [("came", 1), ("here", 4)])
def test_a_row_of_the_mask_for_each_query(queries: str, stays: int) -> None:
    """A mask that travelled stays as it came only where the queries did, in the same order; queries only with it."""

    def one(move: bool) -> fx.Graph:
        graph = program(WHOLE, "other keys")
        [node] = [n for n in graph.nodes if n.target is attention]
        q, other = node.args[:2]
        with graph.inserting_before(node):
            buffer = graph.placeholder("mask")
            came = [(0, Box(s, (*s[:1], 0), (*n[:1], 10))) for _, s, n in decode(q.args[0].args[2])]
            done = graph.call_function(unpack, (buffer, [2, 10, 10], encode(came, "dst")))
            mask = graph.call_function(getitem, (done, 0))
        buffer.meta["val"], mask.meta["val"] = torch.empty(100), torch.empty(10, 10)
        node.args = (q if queries == "came" else other, other, other, mask)
        if move:
            in_arrival_order(graph)
        return graph

    torch.manual_seed(0)
    given = torch.randn(30), torch.randn(10, 3), torch.randn(100)
    assert [len(boxes) for boxes in unpacked(one(True))][-1] == stays
    got, want = (fx.GraphModule({}, one(move))(*given)[0] for move in (True, False))
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", ["keys", "all"])
@pytest.mark.parametrize("plan", ["ulysses=5", "torus=5", "gather=5", "ring=2,ulysses=3"])
def test_masks_of_a_batch_on_uneven_shares(plan: str, mask: str) -> None:
    """A prime number of tokens, of a text and a picture, and a mask of its own for each of three batch items."""
    joint = Joint().double().eval()

    def model(x: torch.Tensor, text: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        both = torch.cat([joint.text(text), x], 1)
        q, k, v = (f(both).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for f in (joint.q, joint.k, joint.v))
        shown = m[:, None, None] > -1 if mask == "keys" else m[:, None, :, None] * 0.1 + m[:, None, None]
        return joint.o(F.scaled_dot_product_attention(q, k, v, shown).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    x, text, m = torch.randn(3, 31, HEADS * WIDTH), torch.randn(3, 6, HEADS * WIDTH), torch.randn(3, 37)
    assert fastpar.verify(model, (x.double(), text.double(), m.double()), plan=plan).ok


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_boxes_that_adjoin_are_one(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    x = torch.arange(math.prod(shape)).view(shape)
    boxes = []
    for _ in range(data.draw(st.integers(1, 6))):
        starts = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        sizes = tuple(data.draw(st.integers(1, n - at)) for n, at in zip(shape, starts, strict=True))
        boxes.append((0, Box(starts, starts, sizes)))
    apart = torch.cat([pack_boxes([x], encode([box], "src")) for box in boxes])
    flat = encode(boxes, "src")
    assert torch.equal(pack_boxes([x], flat), apart) and len(decode(flat)) <= len(boxes)


def test_rows_one_after_the_other_are_one_box() -> None:
    rows = [(0, Box((i, 0), (i, 0), (1, 5))) for i in range(7)]
    assert decode(encode(rows, "src")) == [(0, (0, 0), (7, 5))]
    columns = [(0, Box((0, i), (0, i), (7, 1))) for i in range(5)]
    assert len(decode(encode(columns, "src"))) == 5, "in a message they are not"


PLANS = ("ulysses=3", "ulysses=4", "gather=3", "ring=3", "ulysses=2,ring=2", "torus=2,ulysses=2", "torus=3",
         "cfg=2,ulysses=2", "ulysses=3,fp8(qvo)", "ring=3,fp8(kv)", "tp=2,ulysses=3")  # fmt: skip


@pytest.mark.parametrize(("plan", "batch"), [(p, b) for p in PLANS for b in (1, 2) if b > 1 or "cfg" not in p])
def test_every_plan_is_exact_after_every_pass(plan: str, batch: int) -> None:
    model = captured(batch, 19, 5)
    report = fastpar.verify(model, plan=plan)
    assert report.ok
    built = build(model.programs[0].program, plan)
    programs = [built.localise(rank) for rank in range(built.mesh.ranks)]
    outputs = run_local(programs, list(model.programs[0].args))
    assert all(torch.equal(mine[0], outputs[0][0]) for mine in outputs), "the same bits"


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_heads_first_in_memory_stay_so(ranks: int) -> None:
    """Queries that lie head by head: heads are the outermost that change, and tokens of a head are rows."""

    def model(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x.sin(), x.cos(), x)

    x = torch.randn(1, HEADS, 12, WIDTH, dtype=torch.float64)
    graph = localised(fastpar.capture(model, (x,)), f"ulysses={ranks}", passes=f"{APART}")
    assert all(pieces(n.args[1]) <= ranks for n in graph.nodes if n.target is pack)
    assert fastpar.verify(model, (x,), plan=f"ulysses={ranks}").ok
