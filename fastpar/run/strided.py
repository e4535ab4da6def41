"""Which program a call runs where ranks have strides: the model's, a meeting in front of it, or none (pass ``stride``).

Behind the warm-up, steps are counted in cycles (``fastpar.run.meeting``). In a step that is not one of the rank's own
it returns the outputs of its last run. All of this follows from the number of the call, so ranks meet whatever a
sampler does; but what a rank has of others' rows is of their last run, and between the ends of cycles ranks have other
latents. ``Generation.gather`` puts them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastpar.core.errors import FastparError
from fastpar.core.mesh import Mesh
from fastpar.ops.collectives import Exchange, pack_boxes, put_together
from fastpar.ops.redistribute import take
from fastpar.passes.displace import AXIS
from fastpar.registry import LOWERINGS
from fastpar.run.artefact import Runner
from fastpar.run.build import Built
from fastpar.run.displaced import Displaced, Kept, as_promised
from fastpar.run.meeting import Members, axes_of_meeting, cycle, here_of, meeting, meetings, members, rows_like
from fastpar.run.stream import Generation

_C10D = torch.ops._c10d_functional


class Rows:
    """Which rows of the outputs are a rank's own, and how those of all ranks come together.

    ``rows``: of each output its layouts, as ``stride`` has noted them; ``group``: the name of the process group.
    """

    def __init__(self, rows: Sequence[tuple[str, str] | None], mesh: Mesh, rank: int, group: str | None) -> None:
        self.rows, self.mesh, self.rank, self.group = rows, mesh, rank, group

    def gather(self, latents: torch.Tensor) -> torch.Tensor:
        """Every rank's own rows of its latents, on all ranks. Raises PlanError for latents that have no such rows."""
        if self.group is None:
            return latents
        src, dst = rows_like(self.rows, latents.shape)
        side = Exchange([src], [dst], self.mesh, self.rank)
        own = take(latents, src, self.mesh, self.rank)
        sent = pack_boxes([own], side.send_boxes)
        came = _C10D.all_to_all_single(sent, side.receive_splits, side.send_splits, self.group)
        return put_together(side, [own], _C10D.wait_tensor(came))[0]


class Strided(Displaced):
    """Runs ``first`` through the warm-up, then ``steady`` in the rank's own steps, behind a meeting of those whose
    step it is as well.

    ``meetings``: what to run for which ranks; ``messages``: how many of the values that are carried are exchanged in
    them; the other arguments are those of ``Displaced``.
    """

    def __init__(
        self, *turns: Any, strides: Sequence[int], meetings: Mapping[Members, Runner], messages: int, rows: Rows
    ) -> None:
        super().__init__(*turns)
        self.strides, self.meetings, self.messages, self.rows = strides, meetings, messages, rows
        self.me = here_of(rows.rank, rows.mesh)

    def _turn(
        self, generation: Generation, kept: Kept, values: Sequence[torch.Tensor] | None, args: list[Any]
    ) -> Sequence[Any]:
        turn = kept.calls - self.warmup
        if turn < 0:
            outputs = self.first(args)
            return self._keep(kept, outputs)
        if values is None:
            raise FastparError("a call of this sampling run failed, and with it what ranks have of each other is gone; "
                               "begin another with fastpar.generation()")  # fmt: skip
        step, steps = turn % cycle(self.strides), cycle(self.strides)
        who = members(self.strides, step)
        if self.me in who:
            sent, terms = values[: self.messages], values[self.messages :]
            came = self.meetings[who]([*sent, *(kept.came or sent)])
            kept.came = [as_promised(v, spec) for v, spec in zip(came, self.specs[: self.messages], strict=True)]
            generation.alone = len(who) < len(self.strides)
            try:
                outputs = self._keep(kept, self.steady([*args, *kept.came, *terms]))
            finally:
                generation.alone = False
        else:
            kept.values, outputs = values, _copies(kept.outputs)
        generation.stepped(self.rows, step == steps - 1)
        return outputs

    def _keep(self, kept: Kept, outputs: Sequence[Any]) -> Sequence[Any]:
        new = outputs[self.results :]
        terms = zip(new[self.messages :], self.specs[self.messages :], strict=True)
        kept.values = [*new[: self.messages], *(as_promised(value, spec) for value, spec in terms)]
        results = outputs[: self.results]
        kept.outputs = _copies(results) if self.strides[self.me] > 1 else ()  # the caller may write into its own
        return results


def groups_of(built: Built) -> list[tuple[str, ...]]:
    """Axes of the process groups that meetings need, in one order on all ranks."""
    if not built.plan.steps or AXIS not in built.mesh.names:
        return []
    return [(AXIS,), *(axes_of_meeting(who, built.mesh) for who in meetings(built.plan.steps) if len(who) > 1)]


def strided(
    built: Built, turns: tuple[Any, ...], rank: int, groups: Mapping[tuple[str, ...], str], wait: bool
) -> Strided:
    """The runner of a plan with strides; ``turns`` are the arguments of ``Displaced``. ``wait``: messages must have
    come before the model's program is run."""
    compile = LOWERINGS["eager"]()  # there is nothing in them to fuse
    met = {who: meeting(built.lowered, built.mesh, rank, who, groups, wait) for who in meetings(built.plan.steps)}
    messages = max(len(program.outputs) for program in met.values())
    rows = Rows(built.lowered.gm.meta["rows"], built.mesh, rank, groups.get((AXIS,)))
    runners = {who: compile(program) for who, program in met.items()}
    return Strided(*turns, strides=built.plan.steps, meetings=runners, messages=messages, rows=rows)


def _copies(values: Sequence[Any]) -> list[Any]:
    return [v.clone() if isinstance(v, torch.Tensor) else v for v in values]
