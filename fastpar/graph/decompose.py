"""The decompositions that AOT applies while it traces: fewer operators, so fewer sharding rules.

They turn composite views, scatters into slices and creations into a handful of
primitives, and the convolutions of patch embeddings into linear layers, so that
tokens can be split at any boundary. Everything else (norms, softmax,
reductions, other convolutions) stays whole. All are exact, except that a linear
layer may sum in another order than the convolution it replaces.

Each entry is called with fake tensors under the tracer: what it calls is what
ends up in the graph, and ``NotImplemented`` keeps the operator as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Table = dict[torch._ops.OpOverload, Callable[..., Any]]

TABLE: Table = {}
"""Operator overload -> its replacement, to be passed to AOT as ``decompositions``."""


def _entry(*overloads: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        for overload in overloads:
            TABLE[overload] = fn
        return fn

    return add


def _optional(packet: Any, *names: str) -> list[Any]:
    """Those overloads of an operator that the running torch has."""
    return [getattr(packet, name) for name in names if hasattr(packet, name)]


def _dim(x: Tensor, dim: int) -> int:
    return dim % max(x.dim(), 1)


def _view(x: Tensor, shape: Sequence[int]) -> Tensor:
    """View ``x``, copying it first where its memory does not allow that."""
    if not x.is_contiguous():
        x = aten.clone.default(x, memory_format=torch.contiguous_format)
    return aten.view.default(x, list(shape))


def _slice(x: Tensor, dim: int, start: int, end: int) -> Tensor:
    if start == 0 and end == x.shape[dim]:
        return x
    return aten.slice.Tensor(x, dim, start, end)


def _cat(parts: Sequence[Tensor], dim: int) -> Tensor:
    parts = [p for p in parts if p.shape[dim] != 0] or list(parts[:1])
    return aten.cat.default(parts, dim) if len(parts) > 1 else parts[0]


def _as(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``x`` cast and expanded to what a copy into ``shape`` would hold."""
    if x.dtype != dtype:
        x = aten._to_copy.default(x, dtype=dtype)
    if list(x.shape) != list(shape):
        x = aten.expand.default(x, list(shape))
    return x


# Operators with several results become several slices: a tuple has no layout.


@_entry(aten.split.Tensor)
def _split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    dim = _dim(x, dim)
    total = x.shape[dim]
    if size == 0 or total == 0:
        return [aten.slice.Tensor(x, dim, 0, total)]
    return [_piece(x, dim, at, min(at + size, total)) for at in range(0, total, size)]


@_entry(aten.split_with_sizes.default, *_optional(aten.split, "sizes"))
def _split_with_sizes(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    dim, at, pieces = _dim(x, dim), 0, []
    for size in sizes:
        pieces.append(_piece(x, dim, at, at + size))
        at += size
    return pieces


def _piece(x: Tensor, dim: int, start: int, end: int) -> Tensor:
    # Also where the piece is all of x: the results of a split are new tensors.
    return aten.slice.Tensor(x, dim, start, end)


@_entry(aten.unbind.int)
def _unbind(x: Tensor, dim: int = 0) -> list[Tensor]:
    dim = _dim(x, dim)
    return [aten.select.int(x, dim, i) for i in range(x.shape[dim])]


@_entry(aten.stack.default)
def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    dim %= tensors[0].dim() + 1
    if len(tensors) == 1:
        return aten.clone.default(aten.unsqueeze.default(tensors[0], dim))
    return aten.cat.default([aten.unsqueeze.default(t, dim) for t in tensors], dim)


# Views.


@_entry(aten.t.default)
def _t(x: Tensor) -> Tensor:
    return aten.permute.default(x, [1, 0]) if x.dim() == 2 else aten.alias.default(x)


@_entry(aten.transpose.int)
def _transpose(x: Tensor, dim0: int, dim1: int) -> Tensor:
    dims = list(range(x.dim()))
    if not dims:
        return aten.alias.default(x)
    dim0, dim1 = _dim(x, dim0), _dim(x, dim1)
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return aten.permute.default(x, dims)


@_entry(aten._unsafe_view.default, *_optional(aten, "_reshape_alias"))
def _unsafe_view(x: Tensor, shape: Sequence[int], stride: Any = None) -> Tensor:
    return _view(x, shape)


@_entry(aten._reshape_copy.default, aten.view_copy.default)
def _view_copy(x: Tensor, shape: Sequence[int]) -> Tensor:
    return _view(x, shape)


@_entry(aten.repeat.default)
def _repeat(x: Tensor, repeats: Sequence[int]) -> Tensor:
    lead = len(repeats) - x.dim()
    inner = list(repeats[lead:])
    result = [r * n for r, n in zip(repeats, [1] * lead + list(x.shape), strict=True)]
    for axis in reversed(range(x.dim())):  # [n] -> [1, n] in front of each repeated dimension
        if inner[axis] != 1:
            x = aten.unsqueeze.default(x, axis)
    for _ in range(lead):
        x = aten.unsqueeze.default(x, 0)
    wide = list(repeats[:lead])
    sizes = [n for n in result[lead:]]
    for repeat, size in zip(inner, sizes, strict=True):
        wide += [repeat, size // repeat if repeat else 0] if repeat != 1 else [size]
    if 0 in result:
        return aten.full.default(result, 0, dtype=x.dtype, device=x.device)
    x = aten.clone.default(aten.expand.default(x, wide), memory_format=torch.contiguous_format)
    return aten.view.default(x, result) if wide != result else x


def _shuffle(x: Tensor, split: list[int], order: list[int], shape: list[int]) -> Tensor:
    lead = list(x.shape[: x.dim() - 3])
    n = len(lead)
    x = _view(x, lead + split)
    x = aten.permute.default(x, [*range(n), *[n + i for i in order]])
    return _view(x, lead + shape)


@_entry(aten.pixel_shuffle.default)
def _pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    c, h, w = x.shape[-3:]
    r = factor
    return _shuffle(x, [c // (r * r), r, r, h, w], [0, 3, 1, 4, 2], [c // (r * r), h * r, w * r])


@_entry(aten.pixel_unshuffle.default)
def _pixel_unshuffle(x: Tensor, factor: int) -> Tensor:
    c, h, w = x.shape[-3:]
    r = factor
    return _shuffle(x, [c, h // r, r, w // r, r], [0, 2, 4, 1, 3], [c * r * r, h // r, w // r])


@_entry(aten.channel_shuffle.default, *_optional(aten.native_channel_shuffle, "default"))
def _channel_shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, *rest = x.shape
    x = _view(x, [b, groups, c // groups, *rest])
    return _view(aten.permute.default(x, [0, 2, 1, *range(3, x.dim())]), [b, c, *rest])


# Writes, which functionalisation has turned into scatters.


@_entry(aten.copy.default)
def _copy(x: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    if src.device != x.device:
        return NotImplemented
    out = _as(src, x.shape, x.dtype)
    return aten.clone.default(out) if out is src else out


@_entry(aten.fill.Scalar)
def _fill_scalar(x: Tensor, value: Any) -> Tensor:
    return _full(x.shape, value, x.dtype, x.device)


@_entry(aten.fill.Tensor)
def _fill(x: Tensor, value: Tensor) -> Tensor:
    return _as(value, x.shape, x.dtype) if value.device == x.device else NotImplemented


@_entry(aten.slice_scatter.default)
def _slice_scatter(
    x: Tensor, src: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    dim = _dim(x, dim)
    n = x.shape[dim]
    first, last, step = slice(start, end, step).indices(n)
    last = max(first, last)
    src = _as(src, src.shape, x.dtype)
    if step == 1:
        return _cat([_slice(x, dim, 0, first), src, _slice(x, dim, last, n)], dim)
    if n % step == 0 and first < step and src.shape[dim] == n // step:  # x[..., first::step] = src
        shape = list(x.shape)
        grid = _view(x, [*shape[:dim], n // step, step, *shape[dim + 1 :]])
        src = aten.unsqueeze.default(src, dim + 1)
        parts = [_slice(grid, dim + 1, 0, first), src, _slice(grid, dim + 1, first + 1, step)]
        return aten.view.default(_cat(parts, dim + 1), shape)
    return NotImplemented


@_entry(aten.select_scatter.default)
def _select_scatter(x: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    dim = _dim(x, dim)
    n = x.shape[dim]
    index %= n
    src = aten.unsqueeze.default(_as(src, src.shape, x.dtype), dim)
    return _cat([_slice(x, dim, 0, index), src, _slice(x, dim, index + 1, n)], dim)


# Creations: one operator for constants, one for ranges.


def _full(shape: Sequence[int], value: Any, dtype: torch.dtype | None, device: Any) -> Tensor:
    return aten.full.default(list(shape), value, dtype=dtype, device=device, pin_memory=False)


def _creation(value: int) -> Callable[..., Tensor]:
    def create(
        size: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        layout: Any = None,
        device: Any = None,
        pin_memory: bool | None = None,
        memory_format: Any = None,
    ) -> Tensor:
        dtype = dtype if dtype is not None else torch.get_default_dtype()
        return _full(size, value, dtype, device)

    return create


def _creation_like(value: int) -> Callable[..., Tensor]:
    def create(
        x: Tensor,
        size: Sequence[int] | None = None,
        *,
        dtype: torch.dtype | None = None,
        layout: Any = None,
        device: Any = None,
        pin_memory: bool | None = None,
        memory_format: Any = None,
    ) -> Tensor:
        shape = x.shape if size is None else size
        return _full(shape, value, dtype or x.dtype, device if device is not None else x.device)

    return create


# Uninitialised memory becomes zeros: a graph should have one meaning.
for _value, _names in ((0, ("zeros", "empty")), (1, ("ones",))):
    for _name in _names:
        _overload = "memory_format" if _name == "empty" else "default"
        TABLE[getattr(getattr(aten, _name), _overload)] = _creation(_value)
        TABLE[getattr(aten, f"{_name}_like").default] = _creation_like(_value)
        TABLE[getattr(aten, f"new_{_name}").default] = _creation_like(_value)


@_entry(aten.full_like.default)
def _full_like(
    x: Tensor,
    value: Any,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: bool | None = None,
    memory_format: Any = None,
) -> Tensor:
    return _full(x.shape, value, dtype or x.dtype, device if device is not None else x.device)


@_entry(aten.new_full.default)
def _new_full(
    x: Tensor,
    size: Sequence[int],
    value: Any,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: bool | None = None,
) -> Tensor:
    return _full(size, value, dtype or x.dtype, device if device is not None else x.device)


@_entry(aten.arange.default)
def _arange(end: Any, **options: Any) -> Tensor:
    return aten.arange.start_step(0, end, 1, **options)


@_entry(aten.arange.start)
def _arange_start(start: Any, end: Any, **options: Any) -> Tensor:
    return aten.arange.start_step(start, end, 1, **options)


# Convolutions that are linear layers, weight norm, casts.


@_entry(aten.convolution.default)
def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """Patches ``[B, C, g0*k0, ...]`` -> ``[B*L, C*k]`` -> linear -> ``[B, O, g0, ...]``.

    Only where patches do not overlap: kernel equal to stride, nothing padded, dilated or grouped.
    """
    kernel, rank = list(weight.shape[2:]), weight.dim() - 2
    stride, padding, dilation = (list(v) if len(v) == rank else list(v) * rank for v in (stride, padding, dilation))
    if transposed or groups != 1 or kernel != stride or any(padding) or x.dim() != rank + 2:
        return NotImplemented
    if any(d != 1 and k != 1 for d, k in zip(dilation, kernel, strict=True)) or 0 in x.shape:
        return NotImplemented
    b, c, *space = x.shape
    grid = [n // k for n, k in zip(space, kernel, strict=True)]
    if 0 in grid:
        return NotImplemented
    for axis, (n, k) in enumerate(zip(grid, kernel, strict=True)):
        x = _slice(x, axis + 2, 0, n * k)  # what does not fill a patch is never read
    axes = range(2, rank + 2)
    if any(k != 1 for k in kernel):
        x = _view(x, [b, c, *[n for pair in zip(grid, kernel, strict=True) for n in pair]])
        order = [0, *[2 * a - 2 for a in axes], 1, *[2 * a - 1 for a in axes]]
    else:
        order = [0, *axes, 1]
    out_channels, width, length = weight.shape[0], c * math.prod(kernel), math.prod(grid)
    tokens = _view(aten.permute.default(x, order), [b, length, width])
    tokens = aten.view.default(tokens, [b * length, width])
    matrix = aten.permute.default(_view(weight, [out_channels, width]), [1, 0])
    if bias is None:
        out = aten.mm.default(tokens, matrix)
    else:
        out = aten.addmm.default(bias, tokens, matrix)
    out = aten.permute.default(aten.view.default(out, [b, length, out_channels]), [0, 2, 1])
    # The convolution's result is contiguous, and the model's own views and norms rely on it.
    out = aten.clone.default(out, memory_format=torch.contiguous_format)
    return aten.view.default(out, [b, out_channels, *grid])


@_entry(aten.native_group_norm.default)
def _group_norm(x: Tensor, *rest: Any) -> Any:
    """Memory order is the kernel's business in eager; here it was decided at trace time, from fake strides."""
    if x.is_contiguous():
        return NotImplemented
    return aten.native_group_norm.default(aten.clone.default(x, memory_format=torch.contiguous_format), *rest)


@_entry(aten._weight_norm_interface.default)
def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    dims = [d for d in range(v.dim()) if d != _dim(v, dim)]
    norm = aten.linalg_vector_norm.default(v, 2, dims, True, dtype=g.dtype)
    return aten.mul.Tensor(v, aten.div.Tensor(g, norm)), norm


@_entry(torch.ops.prims.convert_element_type.default)
def _convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    return aten._to_copy.default(x, dtype=dtype)
