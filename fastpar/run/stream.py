"""Streams: the calls of a model within one step of the sampler, dealt to halves of the ranks.

Where guidance runs as separate calls (with the prompt, without it), ``cfg=2`` deals them: call k is run by
half k mod 2 only, and its result travels to the other half while that one runs its own call; it is waited
for on first use (DistriFusion, section 4.3, and xDiT's CFG parallelism split guidance; both need a pipeline
that passes both branches at once, here it stays as it is).

Calls are counted per frame that Dynamo compiles, over all shapes: two prompts of different length are two
programs, and still two calls of one model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._guards import CompileContext
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from fastpar.graph.program import Program
from fastpar.run.artefact import Runner

_C10D = torch.ops._c10d_functional
_calls: dict[Any, int] = defaultdict(int)


def frame_counter() -> Callable[[], int]:
    """Number of the next call of the frame that is being compiled, equal on all ranks; every use counts one."""
    compiling = CompileContext.current_compile_id()
    frame = compiling.frame_id if compiling is not None else None

    def following() -> int:
        _calls[frame] += 1
        return _calls[frame] - 1

    return following


def ends_frame(gm: torch.fx.GraphModule) -> bool:
    """Whether the user gets this graph's results: false where Python of the model goes on after a graph break."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and not reason.graph_break


class Dealt:
    """Runs every ``degree``-th call, and receives the results of the others.

    ``me`` is this rank's coordinate along the axis, ``group`` the name of the process group along it, in the
    order of coordinates. ``lazy``: results that travel are waited for on first use, else at once.
    """

    def __init__(
        self, run: Runner, program: Program, me: int, degree: int, group: str, following: Callable[[], int], lazy: bool
    ) -> None:
        self.run, self.me, self.degree, self.group = run, me, degree, group
        self.following, self.lazy = following, lazy
        self.outputs = list(program.outputs)
        self.inputs = {node: i for i, node in enumerate(program.placeholders)}
        self.sent: list[Any] = []

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        owner = self.following() % self.degree
        for work in self.sent:  # what this rank sent of its last call has long gone; its copy may go now
            work.wait()
        self.sent = []
        if owner != self.me:
            return [self._received(out, args, owner) for out in self.outputs]
        results = self.run(args)
        for out, result in zip(self.outputs, results, strict=True):
            if self._travels(out):
                # a copy travels: the caller may write into its result while the others still read
                copy = result.detach().clone(memory_format=torch.contiguous_format)
                group = dist.distributed_c10d._resolve_process_group(self.group)
                self.sent.append(dist.broadcast(copy, group=group, group_src=owner, async_op=True))
        return results

    def _travels(self, out: Any) -> bool:
        return isinstance(out, torch.fx.Node) and out not in self.inputs

    def _received(self, out: Any, args: Sequence[Any], owner: int) -> Any:
        if not self._travels(out):
            return args[self.inputs[out]] if isinstance(out, torch.fx.Node) else out
        value = out.meta["val"]
        with torch.no_grad():
            here = torch.empty(value.shape, dtype=value.dtype, device=value.device)
            coming = _C10D.broadcast_(here, owner, self.group)
        return AsyncCollectiveTensor(coming) if self.lazy else _C10D.wait_tensor(coming)

