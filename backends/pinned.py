"""The order of a traced program, as edges that Inductor obeys.

Inductor sorts operators by what they need, moves them close to their users and fuses neighbours. What must keep its
place, an *anchor*, therefore depends on the anchor before it (torch's ``control_deps``, which emits an operator as it
is, behind what it is told to come after). Collectives and waits are always anchors: all ranks must start the same
collectives in the same order, and their programs differ in sizes, which could tip Inductor's choices. Products and
attentions are while an exchange is under way. All else is free to move and to fuse.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._C import DispatchKey
from torch._inductor.fx_passes.control_dependencies import control_deps, preserve_node_ordering
from torch.utils._ordered_set import OrderedSet

from fastpar.ops.onesided import RECEIVES, put

_C10D = torch.ops._c10d_functional
STARTS = frozenset(
    [_C10D.all_to_all_single.default, _C10D.all_gather_into_tensor.default, _C10D.all_reduce.default, put]
)
WAITS = frozenset([_C10D.wait_tensor.default, *RECEIVES])
_HEAVY = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", "aten::_scaled_mm",
          "aten::_scaled_dot_product", "fastpar::attention", "fastpar::merge")  # fmt: skip


# What an operator is told to come after may be a parameter's, which has autograd's dispatch key. From torch 2.12 on
# there is a kernel for it.
if DispatchKey.Autograd not in control_deps.py_kernels:
    control_deps.py_impl(DispatchKey.Autograd)(lambda after, operator, *args, **kwargs: operator(*args, **kwargs))


def anchors(graph: fx.Graph, compute: bool = True) -> list[fx.Node]:
    """What keeps its order, in that order; ``compute``: products and attentions under exchanges, too."""
    found: list[fx.Node] = []
    under_way: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target in STARTS:
            under_way.add(node)
            found.append(node)
        elif node.target in WAITS:
            under_way.discard(node.args[0])  # type: ignore[arg-type]
            found.append(node)
        elif compute and under_way and _is_heavy(node):
            found.append(node)
    return found


def _is_heavy(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name.startswith(_HEAVY)


def pin(graph: fx.Graph, compute: bool = True) -> None:
    """Make every anchor depend on the one before it."""
    chain = anchors(graph, compute)
    preserve_node_ordering(
        graph, {after: OrderedSet([before]) for before, after in zip(chain, chain[1:], strict=False)}
    )
