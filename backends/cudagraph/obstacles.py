"""What keeps a program from being captured, and the one thing that need not: numbers on the CPU.

A captured graph repeats launches with the arguments that they had. What the host decides or reads while it launches
would therefore stay as it was at capture, which is an error or, worse, silently yesterday's value. Each is named here
with its operator and the model's line.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from fastpar.backends.pinned import STARTS
from fastpar.graph.program import Program, source_line, target_name
from fastpar.ops.onesided import put

_READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def scalars_on(program: Program, device: torch.device) -> list[int]:
    """Let 0-d inputs on the CPU, and what is computed from them alone, live on ``device``, in place.

    A sampler's timestep comes as such a number. A kernel gets its value as an argument, which a captured graph would
    keep; as a tensor on the device it is read anew by every replay. Both forms promote dtypes alike. Returns the
    inputs' numbers: whoever calls the program moves them.
    """
    moved: list[int] = []
    there: set[fx.Node] = set()
    for i, node in enumerate(program.placeholders):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dim() == 0:
            moved.append(i)
            there.add(node)
    for node in program.graph.nodes:
        if node in there or (node.op == "call_function" and there & set(node.all_input_nodes)):
            if not _all_on(node.meta.get("val"), "cpu"):
                continue
            there.add(node)
            node.meta["val"] = _to(node.meta["val"], device)
            if isinstance(node.kwargs.get("device"), torch.device):
                node.kwargs = {**node.kwargs, "device": device}
    return moved


def obstacle(program: Program, backend_of: Callable[[str], str] | None = None) -> str | None:
    """Why this program cannot be captured; None where nothing is known to stand against it.

    ``backend_of(name)`` gives the backend of a process group on the GPU (default: torch.distributed's).
    """
    given = zip(program.inputs, program.placeholders, strict=True)
    read = [(i, n.meta.get("val")) for i, n in given if n.users]
    if not any(isinstance(v, torch.Tensor) and v.device.type == "cuda" for _, v in read):
        return "its inputs are not on a GPU"
    for one, value in read:
        if not isinstance(value, torch.Tensor):
            return f"input {one.name!r} is a Python number, which a captured graph would keep; pass it as a tensor"
        if value.device.type != "cuda":
            return f"input {one.name!r} is on {value.device}; move it to the GPU"
    for node in program.graph.nodes:
        why = _stands_against(node, backend_of or _backend_of)
        if why is not None:
            return f"{target_name(node.target)} {why}{_at(node)}"
    return None


def _stands_against(node: fx.Node, backend_of: Callable[[str], str]) -> str | None:
    if node.op != "call_function":
        return None
    if any(tag in getattr(node.target, "tags", ()) for tag in _READS):
        return "gives what depends on values, which the host must read"
    if node.target in STARTS and node.target is not put:  # a put is copies and flags on a stream
        backend = backend_of(str(node.args[-1]))
        if backend not in CAPTURABLE:
            return f"runs over a group of backend {backend!r}; only those of {', '.join(CAPTURABLE)} can be captured"
    given = [n for n in node.all_input_nodes if _all_on(n.meta.get("val"), "cpu")]
    if given and not _all_on(node.meta.get("val"), "cpu") and any(_dim(n) > 0 for n in given):
        return f"takes {given[0].name!r} from the CPU"
    if _all_on(node.meta.get("val"), "cpu") and any(_all_on(n.meta.get("val"), "cuda") for n in node.all_input_nodes):
        return "brings a tensor to the CPU"
    return None


CAPTURABLE = ("nccl", "emulate", "fake")
"""Backends of torch.distributed whose collectives are launches on a stream and nothing else."""


def _backend_of(name: str, device: str = "cuda") -> str:
    group = dist.distributed_c10d._resolve_process_group(name)
    config = str(dist.distributed_c10d._world.pg_backend_config[group])  # "cpu:gloo,cuda:nccl", or one name for all
    return dict(part.split(":") for part in config.split(",") if ":" in part).get(device, config)


def _all_on(value: Any, kind: str) -> bool:
    tensors = [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, torch.Tensor)]
    return bool(tensors) and all(t.device.type == kind for t in tensors)


def _dim(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.dim() if isinstance(value, torch.Tensor) else 1


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_to(v, device) for v in value)
    with getattr(value, "fake_mode", nullcontext()):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def _at(node: fx.Node) -> str:
    where = source_line(node)
    return f" ({where})" if where else ""
