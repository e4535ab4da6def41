"""Chains computed in a message's order: the same numbers, and nothing but views between them and the send."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastpar.backends.message_order import in_message_order

aten = torch.ops.aten
PEERS = 3
SIZES = [(10, 6, 4), (6, 6, 6), (3, 12, 2)]  # tokens, heads, width
Chain = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def norm(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * t[0, 0]


def layer_norm(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, t.shape[-1:], t[0, 0])


def neighbours(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    pairs = x.unflatten(-1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    return x * t + torch.stack([-b, a], -1).flatten(-2) * t.cos()


def halves(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return x * t.sin() + torch.cat([-b, a], -1) * t


def modulated(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return F.silu(x) * (1 + t[:, :1]) + t[0]


def as_batch(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return (x.unsqueeze(0).permute(0, 2, 1, 3) * t.permute(1, 0, 2)).permute(0, 2, 1, 3).squeeze(0)


def shifted(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[2:], x[:2]]) + t.exp()


def over_heads(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Heads are summed and turned round: here the cut must stop."""
    return x / (1 + x.abs().sum(1, keepdim=True)) + x.flip(1)


def bounded(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A tensor by name, which no chain here takes along."""
    return torch.clamp(x, max=t.exp() + x.square())


def used_twice(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    y = x.sin()
    return torch.where(y > 0, y * t, x)


STEPS: tuple[Chain, ...] = (
    norm, layer_norm, neighbours, halves, modulated, as_batch, shifted, over_heads, bounded, used_twice,
)  # fmt: skip


def message(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """``fastpar.ops.folded``: the dimension cut in front."""
    cut = x.unflatten(dim, (PEERS, -1)).movedim(dim, 0)
    return cut.reshape(PEERS, -1).reshape(-1)


class _Checked(fx.Interpreter):
    """Runs a graph whose nodes say what they give."""

    def run_node(self, n: fx.Node) -> Any:
        result, said = super().run_node(n), n.meta.get("val")
        if isinstance(result, torch.Tensor) and isinstance(said, torch.Tensor):
            assert (result.shape, result.dtype, result.stride()) == (said.shape, said.dtype, said.stride()), n.name
        return result


def traced(model: Callable[..., Any], args: Sequence[torch.Tensor]) -> tuple[fx.GraphModule, FakeTensorMode]:
    mode = FakeTensorMode()
    gm = make_fx(model, decomposition_table=dict(select_decomp_table()))(*map(mode.from_tensor, args))
    return gm, mode


def moved(model: Callable[..., Any], args: Sequence[torch.Tensor]) -> fx.GraphModule:
    """The traced model with its cuts moved up; asserts that it computes the same."""
    gm, mode = traced(model, args)
    want = gm(*args)
    in_message_order(gm.graph, mode)
    gm.graph.lint()
    gm.recompile()
    got = gm(*args)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    _Checked(gm).run(*args)
    return gm


def inputs(tokens: int, heads: int, width: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(
        torch.randn(size, dtype=torch.float64) for size in ((tokens, 8), (8, heads * width), (tokens, 1, width))
    )


def heads(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return (x @ w).unflatten(-1, (-1, t.shape[-1]))


def computed_behind_the_cut(gm: fx.GraphModule) -> list[str]:
    """What still stands between the product and the cut."""
    [cut] = [n for n in gm.graph.nodes if n.target is aten.clone.default and n.meta["val"].shape[0] == PEERS][-1:]
    found, queue, seen = [], [cut], set()
    while queue:
        node = queue.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if node.target not in (aten.mm.default,):
            queue += node.all_input_nodes
        value, tags = node.meta["val"], getattr(node.target, "tags", ())
        if torch.Tag.pointwise in tags and value.shape[:2] == SIZES[0][:2]:
            found.append(node.name)
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=4), st.sampled_from([1, 2]), st.sampled_from(SIZES))
def test_any_chain_gives_the_same_message(steps: list[Chain], parts: int, sizes: tuple[int, int, int]) -> None:
    """``parts``: a value alone, or two beside each other in one message."""

    def model(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> Any:
        values = []
        for i in range(parts):
            y = heads(x, w + i, t)
            for step in steps:
                y = step(y, t)
            values.append(y)
        if parts == 1:
            return message(values[0])
        return message(torch.cat([v.unsqueeze(1) for v in values], 1), 2)

    moved(model, inputs(*sizes))


@pytest.mark.parametrize("steps", [(norm, neighbours), (layer_norm, halves), (modulated,), (as_batch, shifted)])
def test_norm_modulation_and_rotation_are_computed_as_they_are_sent(steps: tuple[Chain, ...]) -> None:
    def model(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        y = heads(x, w, t)
        for step in steps:
            y = step(y, t)
        return message(y)

    gm, _ = traced(model, inputs(*SIZES[0]))
    assert computed_behind_the_cut(gm)
    assert not computed_behind_the_cut(moved(model, inputs(*SIZES[0])))


def test_what_is_needed_elsewhere_is_computed_once() -> None:
    def model(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> Any:
        y = norm(heads(x, w, t), t)
        return message(y * t), y

    gm = moved(model, inputs(*SIZES[0]))
    assert sum(n.target is aten.mean.dim for n in gm.graph.nodes) == 1
    assert len(computed_behind_the_cut(gm)) > 0, "the norm stays as it was"


def test_what_only_looks_at_memory_stays() -> None:
    """Values and outputs: a product's result is packed as it is."""

    def model(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return message(heads(x, w, t))

    gm, mode = traced(model, inputs(*SIZES[0]))
    before = gm.graph.python_code("self").src
    in_message_order(gm.graph, mode)
    assert gm.graph.python_code("self").src == before
