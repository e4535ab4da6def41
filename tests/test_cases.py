"""Programs by name: what once was wrong, and what the mutants (``tests/mutants``) are held against.

Each goes the whole way like the random ones (``tests/test_properties.py``), but is always the same.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from tests.programs import Recipe, build, traced
from tests.prove import Way, prove
from tests.scatter import PASSES, Lay

torch.set_num_threads(1)

SP = Mesh((("sp", 2),))
RING_SP = Mesh((("ring", 2), ("sp", 2)))
ABC = Mesh((("a", 2), ("b", 2), ("c", 2)))


def joint(**options: object) -> tuple[tuple[str, dict[str, object]], ...]:
    return (("joint_attention", options),)


PLANS = {
    "joint attention, uneven, one text token": (
        Recipe(batch=2, tokens=11, heads=3, steps=joint(rope="half")),
        "ulysses=3",
    ),
    "text in front and behind, cut across": (
        Recipe(
            tokens=7, text=5, heads=2, steps=joint(cut="across", pick=2) + joint(text_first=False, mask="add", bits=15)
        ),
        "gather=3",
    ),
    "fewer tokens than ranks": (Recipe(tokens=3, text=2, heads=5, steps=joint(separate=True)), "ulysses=8"),
    "a mask of rows and heads": (
        Recipe(batch=2, tokens=7, heads=4, steps=(("self_attention", {"mask": "bool", "bits": 14}),)),
        "ulysses=4",
    ),
    "a mask of rows and keys on a ring": (
        Recipe(batch=2, tokens=7, heads=2, text=4, steps=joint(mask="add", bits=13)),
        "ring=3",
    ),
    "an empty block of keys on a ring": (Recipe(tokens=3, heads=2, steps=(("self_attention", {}),)), "ring=5"),
    "rows that see no key on a ring": (
        Recipe(tokens=7, heads=2, steps=(("self_attention", {"mask": "blind", "bits": 12}),)),
        "ring=3",
    ),
    "heads in stages between machines": (
        Recipe(batch=2, tokens=8, heads=3, text=4, steps=joint(mask="add", bits=13)),
        "torus=3",
    ),
    "joint attention in stages, one text token": (Recipe(batch=2, tokens=8, heads=2, steps=joint()), "torus=2"),
    "a ring inside the machines of a torus": (
        Recipe(tokens=7, heads=2, text=4, steps=joint(mask="blind", bits=12)),
        "torus=2,ring=2",
    ),
    "causal with a scale of its own": (
        Recipe(tokens=7, heads=2, steps=(("odd_heads", {"causal": True, "scale": 0.3, "kv": "same"}),)),
        "ulysses=2",
    ),
    "grouped heads that do not divide": (
        Recipe(tokens=7, heads=6, width=2, steps=(("odd_heads", {"kv": "grouped", "pick": 1}),)),
        "ulysses=2",
    ),
    "grouped heads in a ring": (
        Recipe(tokens=9, heads=4, width=2, steps=(("odd_heads", {"kv": "grouped", "pick": 1}),)),
        "ulysses=2,ring=2",
    ),
    "one key head for all": (Recipe(tokens=7, heads=4, steps=(("odd_heads", {"kv": "one"}),)), "ulysses=4"),
    "heads merged with the batch": (
        Recipe(batch=2, tokens=5, heads=3, steps=(("flat_attention", {"merged": True}),)),
        "ulysses=3",
    ),
    "cross attention to pooled tokens": (
        Recipe(tokens=7, text=3, heads=2, steps=(("cross_attention", {"pooled": True, "mask": "bool", "bits": 12}),)),
        "gather=4",
    ),
    "space, then time": (
        Recipe(tokens=12, heads=2, steps=(("factorised", {}), ("factorised", {"how": "five"}))),
        "gather=3",
    ),
    "linear attention": (
        Recipe(batch=2, tokens=11, heads=2, steps=(("self_attention", {}), ("linear_attention", {"normalised": True}))),
        "ulysses=3",
    ),
    "means over uneven rows": (
        Recipe(
            tokens=7,
            steps=(("self_attention", {}), ("reduce_tokens", {"how": "mean"}), ("reduce_tokens", {"how": "all"})),
        ),
        "gather=3",
    ),
    "pooling with fewer channels than ranks": (
        Recipe(tokens=1, width=4, steps=(("normalise", {"kind": "layer"}), ("spatial", {"pick": 0, "how": "pool"}))),
        "tp=5",
    ),
    "group norm over uneven rows": (
        Recipe(tokens=7, heads=2, steps=(("self_attention", {}), ("normalise", {"kind": "group"}))),
        "gather=3",
    ),
    "group norm of one batch item per rank": (
        Recipe(batch=2, tokens=2, heads=5, width=4, start=("patches", {"kernel": 2}),
               steps=(("feed_forward", {"bias": False, "merged": False}), ("normalise", {"kind": "group"})),
               end=("tokens_out", {})),
        "gather=2",
    ),  # fmt: skip
    "the largest of all rows": (
        Recipe(tokens=7, steps=(("self_attention", {}), ("reduce_tokens", {"how": "amax"}))),
        "gather=3",
    ),
    "every second row of two segments": (
        Recipe(tokens=7, text=5, heads=2, steps=joint(cut="stride", pick=1) + (("self_attention", {}),)),
        "gather=3",
    ),
    "tiles and interleaved copies": (
        Recipe(
            tokens=5,
            heads=2,
            steps=(
                ("repeated", {"how": "tile_cut", "pick": 3, "attention": True}),
                ("repeated", {"how": "interleave", "attention": True}),
            ),
        ),
        "ulysses=2",
    ),
    "a ring over several copies of the tokens": (
        Recipe(
            tokens=5,
            heads=2,
            steps=(
                ("self_attention", {}),
                ("repeated", {"how": "expand", "attention": True}),
                ("repeated", {"how": "tile", "attention": True}),
            ),
        ),
        "ulysses=2,ring=2",
    ),
    "a convolution over uneven rows": (
        Recipe(
            tokens=9,
            heads=2,
            steps=(("self_attention", {}), ("spatial", {"how": "full"}), ("spatial", {"how": "line"})),
        ),
        "gather=4",
    ),
    "tokens and the batch": (
        Recipe(batch=2, tokens=7, heads=2, text=3, steps=joint() + (("guidance", {}),)),
        "cfg=2,ulysses=2",
    ),
}

BY_HAND = {
    "axes in another order than the mesh": (
        Recipe(batch=2, tokens=7, text=3, heads=2, steps=joint()),
        Way(RING_SP, "shard{axes=sp:ring},attention-ulysses{axes=(sp)},attention-ring,cancel,lower"),
    ),
    "one axis holds replicas": (
        Recipe(tokens=7, heads=2, steps=(("self_attention", {"mask": "bool", "bits": 12}), ("reduce_tokens", {}))),
        Way(RING_SP, "shard{axes=(sp)},attention-ulysses,cancel,lower"),
    ),
    "an exchange that gives some ranks nothing": (
        Recipe(tokens=2, text=1, heads=4, width=4, start=("token_ids", {}), steps=(("text_attention", {}),),
               end=("tokens_out", {"both": False})),
        Way(Mesh((("torus", 2), ("ulysses", 3))),
            "shard,attention-ulysses{axes=ulysses},attention-torus,cancel,lower,hoist,overlap"),
    ),
    "heads on one of three axes, keys gathered over the others": (
        Recipe(tokens=11, heads=2, steps=(("self_attention", {}),)),
        Way(ABC, "shard{axes=b:c:a},attention-ulysses{axes=(b)},attention-gather,lower"),
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_plan(name: str) -> None:
    recipe, plan = PLANS[name]
    case = build(recipe)
    seen = prove(case, Way.of(plan, case.program))
    assert seen.communicates and seen.split


@pytest.mark.parametrize("name", BY_HAND)
def test_pipeline(name: str) -> None:
    recipe, way = BY_HAND[name]
    assert prove(build(recipe), way).communicates


OPERATORS = {
    "pools where a rank has no channels": (
        lambda x: (torch.nn.functional.avg_pool2d(x, 2), torch.nn.functional.max_pool2d(x, 2)),
        ["[2, 3@sp(0,3), 4, 4]"],
    ),
    "a sum over rows that some ranks hold and rows that all hold": (
        lambda x: (x.sum(1), x.mean((0, 1))),
        ["[2, 3+4@sp(1,3), 5]"],
    ),
    "products over a split dimension": (
        lambda a, b: (a @ b, (a @ b).relu() @ b.t()),
        ["[3, 7@sp(2,5)]", "[7@sp(2,5), 4@ring(1,3)]"],
    ),
    "copies in front of every dimension": (lambda x: (x.repeat(3, 1, 2) * 2,), ["[2, 5@sp(3,2), 4@ring(1,3)]"]),
    "a slice of a product": (lambda x: (x[3:9] + 1, x[::2] * 2), ["[3@ring(1,2)*4@sp(1,3), 2]"]),
    "slices with a step of several segments": (
        lambda x: (x[1::2] + 1, x[::3] * 2),
        ["[3@sp(1,2)+5@sp(4,1)+2@sp(1*2), 2]"],
    ),
    "rows turned round and rolled": (
        lambda x: (x.flip(1) + x, x.flip(0, 2) * 2, x.roll(3, 1) + 1, x.roll((1, -2), (2, 1)) * 2, x.sum(0).flip(0)),
        ["[2, 3@sp(1,2)+5@sp(4,1), 4@ring(1,3)]"],
    ),
    "one row of many": (
        lambda x: (x[:, -1] * 2, x.select(2, 0) + x.sum(2), x.sum(2)[:, 3]),
        ["[2, 9@sp(4,5), 8@ring(3,5)]"],
    ),
    "softmax and its logarithm along split rows": (
        lambda x: (x.softmax(1), (x * 9).log_softmax(2), x.logsumexp(1), x.logsumexp((1, 2), True)),
        ["[2, 7@sp(2,5), 4@ring(1,3)]"],
    ),
    "deviations and norms along split rows": (
        lambda x: (
            *torch.var_mean(x, 1), x.std((1, 2), keepdim=True), x.var(2, correction=0),
            *(torch.linalg.vector_norm(x, o, 1) for o in (1, 2, 3, float("inf"))), torch.linalg.vector_norm(x),
            F.layer_norm(x, x.shape[1:], x[0], x[1]),
        ),  # fmt: skip
        ["[2, 7@sp(2,5), 4@ring(1,3)]"],
    ),
    "running sums over split rows": (
        lambda x: (x.cumsum(1) * 2, (x > 0).cumsum(1) * 1.0, x.cumsum(2), x.sum(0).cumsum(0)),
        ["[2, 3@sp(1,2)+5@sp(5,0), 4@ring(1,3)]"],
    ),
    "whether any and all": (
        lambda x: ((x > 1).any(1) * 1.0, (x > -2).all(2, keepdim=True) * 1.0, (x > 9).any() * 1.0),
        ["[2, 7@sp(2,5), 4@ring(1,3)]"],
    ),
    "rows written by index": (
        lambda x, v: (torch.ops.aten.index_put(x, [None, torch.tensor([2, 0])], v),),
        ["[2, 5@sp(3,2), 4@ring(0,4)]", "[2, 2, 4@ring(0,4)]"],
    ),
    "rows copied and added by index": (
        lambda x, v: (x.index_copy(1, torch.tensor([2, 0]), v), x.index_add(1, torch.tensor([4, 1]), v, alpha=0.5)),
        ["[2, 5@sp(3,2), 4@ring(0,4)]", "[2, 2@sp(1,1), 4@ring(0,4)]"],
    ),
}


def test_an_attention_on_the_result_of_another_keeps_its_heads() -> None:
    """To tokens and back to heads is nothing: ``cancel`` joins what it finds in a row."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = torch.ops.fastpar.attention(x, x, x)
        return (torch.ops.fastpar.attention(first, first, first, None, False, 0.5),)

    case = traced(function, [torch.randn(1, 4, 7, 3, dtype=torch.float64)])
    joined, apart = (prove(case, Way(SP, f"shard,attention-ulysses,{step}lower")) for step in ("cancel,", ""))
    assert joined.collectives.total() < apart.collectives.total()


@pytest.mark.parametrize("text", ["2", "2@ring(1,1)"])
@pytest.mark.parametrize("schedule", ["attention-ring", "attention-torus", "attention-gather", "attention-ulysses"])
def test_text_that_several_ranks_have_is_attended_once(schedule: str, text: str) -> None:
    """Keys of which all ranks have the text, or some: whatever goes past all ranks would meet it many times."""

    def function(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.ops.fastpar.attention(q, k, k.cos()), k.sum(-2)

    case = traced(function, [torch.randn(1, 3, n, 2, dtype=torch.float64) for n in (7, 9)])
    image = "7@ring.sp(2*3,1)"
    laid = Lay((f"[1, 3, {image}, 2]", f"[1, 3, {text}+{image}, 2]")).spec()
    assert prove(case, Way(RING_SP, f"{laid},{schedule},cancel,lower"), PASSES).communicates


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str) -> None:
    """Operators as they are, nothing decomposed, on inputs that are laid out as no plan would."""
    function, layouts = OPERATORS[name]
    shapes = [Layout.parse(text).shape for text in layouts]
    args = [
        torch.randn(s, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)
    ]
    way = Way(RING_SP, f"{Lay(tuple(layouts)).spec()},lower")
    assert prove(traced(function, args, table={}), way, PASSES).split
