"""From a plan to what runs it: the mesh of virtual ranks and the pipeline's text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from fastpar.core.errors import PlanError
from fastpar.core.mesh import Mesh
from fastpar.core.plan import FP8_LETTERS, FP8_MEANING, TOKEN_AXES, Plan
from fastpar.passes.displace import Displace
from fastpar.passes.quantize import Quantize
from fastpar.passes.stride import Stride
from fastpar.sharding.candidates import is_attention


def pipeline_text(plan: Plan, schedule: bool = True) -> str:
    """The one pipeline that a plan expands to (localise, which needs a rank, comes after it).

    Without ``schedule``, up to the program whose collectives stand where they are needed.
    """
    steps = ["shard"]
    if plan.naive:
        steps.append("naive")
    if plan.gather:
        steps.append("attention-gather")
    if plan.ulysses:  # inside a ring or a torus, heads take their own axis and leave the other to the keys
        steps.append("attention-ulysses{axes=ulysses}" if plan.ring or plan.torus else "attention-ulysses")
    if plan.torus:
        steps.append("attention-torus{axes=torus}" if plan.ring else "attention-torus")
    if plan.ring:
        steps.append("attention-ring")
    steps.append("cancel")
    if plan.fp8:
        _quantizes(plan)
        steps.append(Quantize(plan.fp8).spec())
    steps.append("lower")
    if not plan.naive:  # whose ranks never talk
        # columns of shared products depend on the step, and with strides ranks are at different ones
        steps += ["arrange"] if plan.steps else ["arrange", "split-weights"]
    steps.append("hoist")
    if plan.displaced and plan.steps:
        steps += ["pack", Stride(plan.displaced.gn).spec()]  # type: ignore[arg-type]  # the plan has looked at it
    elif plan.displaced:
        gn = None if plan.displaced.gn == "none" else plan.displaced.gn
        steps.append(Displace(gn).spec())  # type: ignore[arg-type]  # the plan has looked at it
    return ",".join([*steps, *(["overlap", "pin"] if schedule else [])])


def _quantizes(plan: Plan) -> None:
    """Raise PlanError where nothing of what ``fp8`` names can travel under the plan's other terms."""
    moved = {"g"} if plan.degree > 1 else set()
    moved |= {"h", "k", "v"} if plan.token_degree > 1 else set()
    moved |= {"q", "o"} if (plan.ulysses or 1) * (plan.torus or 1) > 1 else set()
    if not moved & set(plan.fp8):
        what = f"only {', '.join(x for x in FP8_LETTERS if x in moved)} can" if moved else "nothing does"
        names = ", ".join(plan.fp8)
        raise PlanError(f"plan {str(plan)!r}: nothing of {names} travels under it; {what} ({FP8_MEANING})")


def mesh_for(plan: Plan, graph: fx.Graph, order: Sequence[str] = ()) -> Mesh:
    """The plan's axes, each cut into factors where heads do not fill it; in ``order``, where a placement gives one.

    With 2 heads on 4 ranks a rank's share of the attention is one head x half the rows, so
    the axis is two of size 2: ``ulysses0`` for rows and ``ulysses1`` for heads. Later factors
    vary fastest, so that giving them to heads leaves neighbouring rows together. A torus has the heads
    that Ulysses inside its machines leaves it.
    """
    axes: list[tuple[str, int]] = []
    place = {name: i for i, name in enumerate(order)}
    for name, degree in sorted(plan.axes, key=lambda a: place.get(a[0], -1)):
        heads = _head_counts(graph, plan.tp or 1) if name in ("ulysses", "torus") else []
        if name == "torus":
            heads = [h // math.gcd(h, plan.ulysses or 1) for h in heads]
        factors = _factors(degree, heads) if heads else [degree]
        if len(factors) == 1:
            axes.append((name, degree))
        else:
            axes += [(f"{name}{i}", f) for i, f in enumerate(factors)]
    return with_speeds(plan, Mesh(tuple(a for a in axes if a[1] > 1)))


def with_speeds(plan: Plan, mesh: Mesh) -> Mesh:
    """The plan's mesh with the plan's speeds and strides, of which there is one per rank of the token split."""
    if not plan.speeds and not plan.steps:
        return mesh
    tokens = tuple(name for name in mesh.names if axis_of(name) in TOKEN_AXES)
    places = [mesh.coordinate(rank, tokens) for rank in range(mesh.ranks)]
    speeds = tuple(plan.speeds[place] for place in places) if plan.speeds else ()
    return replace(mesh, speeds=speeds, strides=tuple(plan.steps[place] for place in places) if plan.steps else ())


def axis_of(name: str) -> str:
    """The plan's axis that a mesh axis is (a factor of)."""
    return name.rstrip("0123456789")


def _head_counts(graph: fx.Graph, tp: int) -> list[int]:
    """Heads of attentions, the most frequent number first; where weights are cut, those that a rank has at most."""
    counts: dict[int, int] = {}
    for node in graph.nodes:
        if is_attention(node) and node.meta["val"].dim() >= 3:
            key = node.args[1].meta["val"]
            heads = int(key.shape[-3]) if int(key.shape[-3]) > 1 else int(node.meta["val"].shape[-3])
            heads = -(-heads // tp)
            counts[heads] = counts.get(heads, 0) + 1
    return sorted(counts, key=lambda h: -counts[h])


def _factors(degree: int, heads: list[int]) -> list[int]:
    """``degree`` as factors of which a suffix is each head count's share of the axis, if a chain exists."""
    if not heads:
        return [degree]
    cuts = sorted({math.gcd(degree, h) for h in heads} | {1, degree})
    chain = [1]
    for cut in cuts[1:]:
        if cut % chain[-1] == 0:
            chain.append(cut)
    if chain[-1] != degree:
        chain.append(degree)
    return [chain[i + 1] // chain[i] for i in reversed(range(len(chain) - 1))] or [1]
