"""Process groups for mesh axes, and the questions asked of ``torch.distributed``.

Groups are kept by name. One that a compiled model held would outlive ``destroy_process_group``, and its threads the
interpreter: gloo's then end the process with SIGABRT if they still hold a tensor. And a name means the group of today,
where somebody destroys a world and makes another.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from fastpar.core.errors import CaptureError, PlanError
from fastpar.core.mesh import Mesh, is_some
from fastpar.ops.collectives import COLLECTIVES, axes_of
from fastpar.run.agree import named, party_of

_made: weakref.WeakValueDictionary[tuple[Any, ...], Any] = weakref.WeakValueDictionary()


def group_of(mesh_option: Any) -> str | None:
    """Name of the ``mesh`` option's process group: a group's own, that of a flattened DeviceMesh, for None the world's.

    Raises AgreementError where this rank is not in the mesh. Anything else is for ``Options`` to refuse.
    """
    group = mesh_option
    if mesh_option is None:
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    elif hasattr(mesh_option, "get_group"):
        party_of(mesh_option)
        group = (mesh_option if mesh_option.ndim == 1 else mesh_option._flatten()).get_group()
    return getattr(group, "group_name", None)


def world(group: str | None) -> tuple[int, int]:
    """(this rank within the group, ranks of the group); (0, 1) without one."""
    if group is None:
        return 0, 1
    there = named(group)
    return dist.get_rank(there), dist.get_world_size(there)


def need_group(group: str | None, ranks: int) -> None:
    """Raise PlanError where a plan for several ranks has no process group to run on."""
    if ranks > 1 and group is None:
        raise PlanError(
            f"the plan is for {ranks} ranks but torch.distributed is not initialised: start the script with "
            f"`torchrun --nproc-per-node={ranks}` and call torch.distributed.init_process_group() before the "
            "first call of the model"
        )


def check_device(group: str | None, device: torch.device) -> None:
    """Raise CaptureError where the group has no backend for the model's device."""
    if group is None:
        return
    types = {d.type for d in named(group)._device_types}
    if types and device.type not in types:
        raise CaptureError(
            f"the model is on {device}, but the process group talks only for tensors on "
            f"{' and '.join(sorted(types))}; move the model, or initialise the group with a backend for {device.type}"
        )


def axes_used(graph: fx.Graph, mesh: Mesh) -> list[tuple[str, ...]]:
    """Sets of axes over which a lowered program communicates, in order of first use."""
    found: dict[tuple[str, ...], None] = {}
    for node in graph.nodes:
        if node.target in COLLECTIVES:
            found[axes_of(node, mesh)] = None
    return list(found)


def process_groups(
    graph: fx.Graph, mesh: Mesh, group: str | None, also: Sequence[tuple[str, ...]] = ()
) -> dict[tuple[str, ...], str]:
    """Name of the process group for every set of axes that a lowered program uses, and those in ``also``.

    Groups are made once and kept; all members make theirs in the order of the program, which
    ranks have agreed on. Making one synchronises its members only, so replicas do not meet.
    """
    if group is None or mesh.ranks == 1:
        return {}
    ranks = dist.get_process_group_ranks(named(group))
    me = dist.get_rank(named(group))
    names: dict[tuple[str, ...], str] = {}
    for axes in [*axes_used(graph, mesh), *also]:
        members = mesh.group(me, axes)
        if len(members) == len(ranks):
            names[axes] = group
            continue
        # of some of an axis's ranks: the others make one as well, each of itself alone, for torch names a group by how
        # many there are on a rank
        few = tuple(a for a in axes if is_some(a))
        key = (group, tuple(ranks[m] for m in members), few)
        made = _made.get(key)
        if made is None or made not in dist.distributed_c10d._world.pg_map:  # none, or a destroyed world's
            mine = members if me in members else (me,)
            made = _made[key] = dist.new_group([ranks[m] for m in mine], use_local_synchronization=True)
        names[axes] = made.group_name
    return names
