"""Process groups for mesh axes, and the questions asked of ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from fastpar.core.errors import CaptureError, PlanError
from fastpar.core.mesh import Mesh, is_some
from fastpar.ops.collectives import COLLECTIVES, axes_of

_made: dict[tuple[Any, ...], Any] = {}


def group_of(mesh_option: Any) -> Any:
    """Process group of the ``mesh`` option: a group as it is, a DeviceMesh flattened, None the world."""
    if mesh_option is None:
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if hasattr(mesh_option, "get_group"):
        return (mesh_option if mesh_option.ndim == 1 else mesh_option._flatten()).get_group()
    return mesh_option


def world(group: Any) -> tuple[int, int]:
    """(this rank within the group, ranks of the group); (0, 1) without one."""
    if group is None:
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def need_group(group: Any, ranks: int) -> None:
    """Raise PlanError where a plan for several ranks has no process group to run on."""
    if ranks > 1 and group is None:
        raise PlanError(
            f"the plan is for {ranks} ranks but torch.distributed is not initialised: start the script with "
            f"`torchrun --nproc-per-node={ranks}` and call torch.distributed.init_process_group() before the "
            "first call of the model"
        )


def check_device(group: Any, device: torch.device) -> None:
    """Raise CaptureError where the group has no backend for the model's device."""
    if group is None:
        return
    types = {d.type for d in group._device_types}
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
    graph: fx.Graph, mesh: Mesh, group: Any, also: Sequence[tuple[str, ...]] = ()
) -> dict[tuple[str, ...], str]:
    """Name of the process group for every set of axes that a lowered program uses, and those in ``also``.

    Groups are made once and kept; all members make theirs in the order of the program, which
    ranks have agreed on. Making one synchronises its members only, so replicas do not meet.
    """
    if group is None or mesh.ranks == 1:
        return {}
    ranks = dist.get_process_group_ranks(group)
    me = dist.get_rank(group)
    names: dict[tuple[str, ...], str] = {}
    for axes in [*axes_used(graph, mesh), *also]:
        members = mesh.group(me, axes)
        if len(members) == len(ranks):
            names[axes] = group.group_name
            continue
        # of some of an axis's ranks: the others make one as well, each of itself alone, for torch names a group by how
        # many there are on a rank
        few = tuple(a for a in axes if is_some(a))
        key = (group.group_name, tuple(ranks[m] for m in members), few)
        if key not in _made or _made[key] not in dist.distributed_c10d._world.pg_map:  # a new world, of the same name
            mine = members if me in members else (me,)
            _made[key] = dist.new_group([ranks[m] for m in mine], use_local_synchronization=True)
        names[axes] = _made[key].group_name
    return names
