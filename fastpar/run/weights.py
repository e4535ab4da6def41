"""``fastpar.shard_weights``: of every weight a rank holds the part that its compiled programs use, and no more.

Under plain ``torch.compile`` the model keeps its whole weights, and a plan that cuts them works on
slices. Here the model's parameters become shells: of full shape, for Dynamo traces the whole
model, but one element of memory, NaN. What they stand for is kept beside them, first whole (in
memory, or in safetensors files that nobody has read), then, from the first call of a compiled
program on, as the part of this rank. Programs are built to take parts (pass ``hold``).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch._guards import TracingContext

from fastpar.core.errors import FastparError
from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.core.transfer import runs
from fastpar.graph.program import Program
from fastpar.run.artefact import Runner

_MARK = "_fastpar_weight"  # attribute of a parameter that is a shell


class Weight:
    """What one parameter stands for: the whole tensor, a tensor of a file, or this rank's part."""

    def __init__(self, name: str, parameter: torch.Tensor, device: torch.device, file: Path | None) -> None:
        self.name, self.file, self.device = name, file, device
        self.shape, self.stride, self.dtype = tuple(parameter.shape), parameter.stride(), parameter.dtype
        self.whole: torch.Tensor | None = parameter.detach() if file is None else None
        self.held: torch.Tensor | None = None
        self.layout = Layout.whole(self.shape)
        self.where: tuple[Mesh, int, str | None] = (Mesh(), 0, None)

    @property
    def bytes(self) -> int:
        """Bytes of memory that this rank spends on it."""
        return sum(t.numel() * t.element_size() for t in (self.whole, self.held) if t is not None)

    def part(self, layout: Layout, mesh: Mesh, rank: int, group: str | None) -> torch.Tensor:
        """The rows of ``layout`` on ``rank``. From then on they are all that is held of a weight without a file.

        ``group`` is the process group over the layout's axes, from which ``restored`` gets the rest.
        """
        if self.held is not None and (layout, (mesh, rank)) == (self.layout, self.where[:2]):
            return self.held
        if self.file is None and self.whole is None:
            raise FastparError(
                f"of the weight {self.name!r} this rank holds {self.layout}, but a program that was compiled now needs "
                f"{layout}: restore() the weights before compiling for another plan, or give shard_weights their files"
            )
        boxes = [[(start, size) for start, _, size in runs(d.rows(mesh, rank))] for d in layout.dims]
        with torch.no_grad():
            self.held = self._read(boxes, layout.local_shape(mesh, rank))
        self.layout, self.where = layout, (mesh, rank, group)
        self.whole = None
        return self.held

    def restored(self) -> torch.Tensor:
        """The whole weight again: from its file, or, by all ranks that hold parts of it, from each other."""
        if self.whole is not None:
            return self.whole.to(self.device)
        if self.file is not None:
            return self._read([[(0, n)] for n in self.shape], self.shape)
        assert self.held is not None
        mesh, rank, group = self.where
        if self.layout.is_whole:
            return self.held
        assert group is not None, "parts are held by the ranks of a process group"
        out = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        members = mesh.group(rank, mesh.ordered(self.layout.split_axes))
        for index, member in enumerate(members):
            shape = self.layout.local_shape(mesh, member)
            part = self.held.contiguous() if member == rank else torch.empty(shape, dtype=self.dtype, device=out.device)
            if part.numel():
                dist.broadcast(part, group=dist.distributed_c10d._resolve_process_group(group), group_src=index)
            rows = [torch.from_numpy(d.rows(mesh, member).copy()).to(out.device) for d in self.layout.dims]
            out[torch.meshgrid(*rows, indexing="ij")] = part
        return out

    def _read(self, boxes: Sequence[Sequence[tuple[int, int]]], shape: Sequence[int]) -> torch.Tensor:
        """The blocks of rows ``boxes`` (per dimension: start, size) of the source, put together on the device."""
        out = torch.empty(tuple(shape), dtype=self.dtype, device=self.device)
        ends = [list(itertools.accumulate((n for _, n in row), initial=0)) for row in boxes]
        with _opened(self) as source:
            for index in itertools.product(*(range(len(row)) for row in boxes)):
                there = tuple(slice(boxes[d][i][0], sum(boxes[d][i])) for d, i in enumerate(index))
                here = tuple(slice(ends[d][i], ends[d][i + 1]) for d, i in enumerate(index))
                out[here] = source[there].to(self.device, self.dtype)
        return out


class _opened:
    """Something to take slices of: a tensor in memory, or one in a file."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight
        self.file: Any = None

    def __enter__(self) -> Any:
        if self.weight.file is None:
            return self.weight.whole
        self.file = safe_open(self.weight.file, framework="pt")
        source = self.file.__enter__().get_slice(self.weight.name)
        if tuple(source.get_shape()) != self.weight.shape:
            raise FastparError(
                f"{self.weight.file.name} has {self.weight.name!r} as {source.get_shape()}, the model as "
                f"{list(self.weight.shape)}: give the files of this model"
            )
        return source

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            self.file.__exit__(*error)


class ShardedWeights:
    """The weights of a model whose parameters are shells. ``restore`` gives them back; as a context it does so at its
    end."""

    def __init__(self, model: nn.Module, files: Mapping[str, Path] | None, device: torch.device | None) -> None:
        self.weights: dict[str, Weight] = {}
        self.model = model
        shells: dict[int, nn.Parameter] = {}
        for name, parameter in list(model.named_parameters()):
            if hasattr(parameter, _MARK):
                raise FastparError(f"the weights of this model are sharded already (parameter {name!r})")
            at = device or parameter.device
            if at.type == "meta":
                raise FastparError(f"parameter {name!r} is on the meta device: say which device its part goes to")
            if files is not None and name not in files:
                raise FastparError(f"no file has the parameter {name!r}; the files have {len(files)} others")
            if files is None and parameter.device.type == "meta":
                raise FastparError(f"parameter {name!r} is on the meta device: give the files that have its values")
            self.weights[name] = Weight(name, parameter, at, files[name] if files is not None else None)
        for name, parameter in list(model.named_parameters()):
            shells[id(parameter)] = self._shell(parameter, self.weights[name])
        for module in model.modules():
            _put_anew(module, {n: shells[id(held)] for n, held in module._parameters.items() if held is not None})
        _move_buffers(model, files or {}, device)

    @property
    def bytes(self) -> int:
        """Bytes of memory that this rank spends on weights."""
        return sum(w.bytes for w in self.weights.values())

    @property
    def whole_bytes(self) -> int:
        """Bytes of the whole weights."""
        return sum(w.dtype.itemsize * torch.Size(w.shape).numel() for w in self.weights.values())

    def restore(self) -> None:
        """Put whole weights back into the model. Without files all ranks must call it, for they have each other's
        parts; the model then runs as before, and compiled code is compiled anew."""
        for name, parameter in self.model.named_parameters():
            if hasattr(parameter, _MARK):
                parameter.data = self.weights[name].restored()
                delattr(parameter, _MARK)
        for module in self.model.modules():
            _put_anew(module, {})

    def __enter__(self) -> ShardedWeights:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    @staticmethod
    def _shell(parameter: torch.Tensor, weight: Weight) -> nn.Parameter:
        nothing = float("nan") if weight.dtype.is_floating_point else 0
        data = torch.full((1,) * len(weight.shape), nothing, device=weight.device).to(weight.dtype).expand(weight.shape)
        if parameter.device.type == "meta":  # another kind of tensor: the parameter itself is replaced
            parameter = nn.Parameter(data, requires_grad=parameter.requires_grad)
        else:
            parameter.data = data
        setattr(parameter, _MARK, weight)
        return parameter  # type: ignore[return-value]


def shard_weights(
    model: nn.Module, files: str | Path | None = None, device: str | torch.device | None = None
) -> ShardedWeights:
    """Let ``model`` hold, of every weight, the part that this rank's compiled programs use.

    To be called before the first call of the compiled model (later is right too, and compiles anew)::

        model = torch.compile(pipe.transformer, backend="fastpar", options={"plan": "tp=4"})
        weights = fastpar.shard_weights(pipe.transformer)

    The plan says which weights are cut (``tp``); the others are kept whole. With ``files`` (a safetensors file, or
    a folder of them with or without an index, as diffusers saves models) values are read from there, part by part:
    the model may be on the meta device, and need not fit one device. ``device`` is where parts go, by default where
    the parameters are; weights that stay on the CPU until then are moved part by part.

    Until ``restore`` the parameters themselves are NaN, so code that reads them without being compiled shows.
    Raises FastparError for parameters without a value and files without a parameter.
    """
    model = getattr(model, "_orig_mod", model)
    return ShardedWeights(
        model, files_of(Path(files)) if files is not None else None, torch.device(device) if device else None
    )


def files_of(path: Path) -> dict[str, Path]:
    """File of every tensor under ``path``: a safetensors file, or a folder with an index or with such files."""
    if path.is_dir():
        indices = sorted(path.glob("*.safetensors.index.json"))
        if indices:
            return {k: path / v for k, v in json.loads(indices[0].read_text())["weight_map"].items()}
        found = sorted(path.glob("*.safetensors"))
    else:
        found = [path] if path.exists() else []
    if not found:
        raise FastparError(f"no safetensors at {path}: give a file, or a folder of them, with an index or without")
    out: dict[str, Path] = {}
    for file in found:
        with safe_open(file, framework="pt") as held:
            out.update(dict.fromkeys(held.keys(), file))
    return out


def _put_anew(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """``module``'s parameters, some of them replaced, taken out of their dictionary and put back in order: where a
    dictionary has not changed, Dynamo may take it that the tensors in it have not."""
    held = {**module._parameters, **parameters}
    module._parameters.clear()
    module._parameters.update(held)


def _move_buffers(model: nn.Module, files: Mapping[str, Path], device: torch.device | None) -> None:
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            full = f"{prefix}.{name}" if prefix else name
            if buffer is None or (device is None and buffer.device.type != "meta"):
                continue
            if buffer.device.type != "meta":
                module._buffers[name] = buffer.to(device)
            elif full in files and device is not None:
                read = Weight(full, buffer, device, files[full])
                module._buffers[name] = read.restored()
            else:
                raise FastparError(f"buffer {full!r} is on the meta device and in no file: make it before, on a device")


# -- what the backend asks ---------------------------------------------------------------------------


def is_shell(value: object) -> bool:
    return hasattr(value, _MARK)


def whole_examples(example_inputs: Iterable[Any]) -> list[Any]:
    """A compiler's example inputs with shells as the fake tensors that they stand for, strides included."""
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    out = []
    for value in example_inputs:
        weight: Weight | None = getattr(value, _MARK, None)
        if weight is not None and mode is not None:
            with mode:
                value = torch.empty_strided(weight.shape, weight.stride, dtype=weight.dtype, device=weight.device)
        out.append(value)
    return out


class Held:
    """Runs a program on this rank's parts in the place of shells."""

    def __init__(
        self, run: Runner, program: Program, mesh: Mesh, rank: int, groups: Mapping[tuple[str, ...], str]
    ) -> None:
        self.run, self.mesh, self.rank = run, mesh, rank
        self.takes: list[tuple[int, Layout, str | None]] = []
        for i, (node, given) in enumerate(zip(program.placeholders, program.inputs, strict=True)):
            if given.kind == "parameter":
                layout: Layout = node.meta["layout"]
                self.takes.append((i, layout, groups.get(mesh.ordered(layout.split_axes))))

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        args = list(args)
        for i, layout, group in self.takes:
            weight: Weight | None = getattr(args[i], _MARK, None)
            if weight is not None:
                args[i] = weight.part(layout, self.mesh, self.rank, group)
        return self.run(args)


def axes_held(program: Program) -> list[tuple[str, ...]]:
    """Mesh axes over which the inputs of a lowered program are split: whose ranks have each other's parts."""
    layouts = [n.meta.get("layout") for n in program.placeholders]
    mesh: Mesh = program.mesh
    return list({mesh.ordered(x.split_axes): None for x in layouts if isinstance(x, Layout) and not x.is_whole})


