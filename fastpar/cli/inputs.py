"""Inputs of a model from text: ``hidden_states=bf16[1,4096,64]``, ``timestep=500``, JSON, or a function.

Nothing here knows a model. A tensor is drawn at random, or filled where a value follows its shape; a plain
number becomes a tensor of one element where the forward's annotation asks for a tensor only.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fastpar.core.errors import OptionError
from fastpar.core.text import unknown

_SPEC = re.compile(r"\s*(?P<dtype>[A-Za-z]\w*)\[(?P<shape>[\d,\s]*)\](?::(?P<value>\S+))?\s*")
_EXAMPLE = "a tensor is written as float[1,16,64] or, filled, int[2]:3"

DTYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f32": torch.float32,
    "f64": torch.float64,
    "i32": torch.int32,
    "i64": torch.int64,
    "u8": torch.uint8,
    "int": torch.int64,
    "bool": torch.bool,
    **{str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32, torch.float64,
                                                  torch.int32, torch.int64, torch.uint8)},  # fmt: skip
}
"""Names of dtypes, short and as torch has them; ``float`` is the model's own and stands beside them."""


def dtype_named(text: str) -> torch.dtype:
    """A floating dtype by name. Raises OptionError."""
    found = DTYPES.get(text)
    if found is None or not found.is_floating_point:
        raise OptionError(unknown("dtype", text, [n for n, d in DTYPES.items() if d.is_floating_point]))
    return found


def parameters(model: Any) -> list[str]:
    """Names of what the model's forward takes."""
    return [p.name for p in _signature(model).parameters.values() if p.kind is not p.VAR_KEYWORD]


def _signature(model: Any) -> inspect.Signature:
    return inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model)


def given_inputs(
    model: Any, ready: Mapping[str, Any], texts: Mapping[str, Any], pairs: Sequence[str], dtype: torch.dtype
) -> dict[str, Any]:
    """Keyword arguments: ``ready`` as they are, ``texts`` of a JSON file, ``name=value`` pairs; the latter win.

    ``return_dict=False`` is added where the forward takes it. Raises OptionError for what it does not take,
    and naming all that it needs and did not get.
    """
    takes = _signature(model).parameters
    named = dict(ready)
    for name, value in {**texts, **_named(pairs)}.items():
        named[name] = _value(name, value, _wants_tensor(takes.get(name)), dtype)
    _check(model, takes, named)
    if "return_dict" in takes:
        named.setdefault("return_dict", False)
    return named


def _named(pairs: Sequence[str]) -> dict[str, Any]:
    named = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip().isidentifier():
            raise OptionError(f"--input {pair!r}: expected name=value; {_EXAMPLE}")
        named[name.strip()] = _from_text(text)
    return named


def _check(model: Any, takes: Mapping[str, inspect.Parameter], named: Mapping[str, Any]) -> None:
    """Raise OptionError unless ``named`` are arguments that the forward takes, and all that it needs."""
    variadic = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    for name in named:
        if name not in takes and not variadic:
            raise OptionError(unknown(f"input of {type(model).__name__}", name, parameters(model)))
    missing = [
        p.name
        for p in takes.values()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in named
    ]
    if missing:
        optional = [n for n in parameters(model) if n not in missing and n not in named and n != "return_dict"]
        raise OptionError(
            f"{type(model).__name__} needs {', '.join(missing)}: give each as --input {missing[0]}=float[1,16,64], or "
            f"all by --inputs with a .json file or package.module:function (it also takes: {', '.join(optional)})"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Values of a JSON file. Raises OptionError."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read {str(path)!r}: {error}") from error
    if not isinstance(found, dict):
        raise OptionError(f"{str(path)!r} must hold one object, name: value; it holds a {type(found).__name__}")
    return found


def _from_text(text: str) -> Any:
    """What follows ``--input name=``: a tensor's text stays text, all else is JSON, and text where it is none."""
    if _SPEC.fullmatch(text):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _wants_tensor(parameter: inspect.Parameter | None) -> bool:
    """Whether a number would not do: the annotation names tensors and no number."""
    said = str(parameter.annotation) if parameter is not None else ""
    return "Tensor" in said and not re.search(r"\b(int|float|list|List)\b", said)


def _value(name: str, value: Any, tensor: bool, dtype: torch.dtype) -> Any:
    if isinstance(value, str):
        if _SPEC.fullmatch(value):
            return _tensor(name, value, dtype)
        if "[" in value:
            raise OptionError(f"input {name!r}: cannot read {value!r}; {_EXAMPLE}")
        return value
    if isinstance(value, list):
        return [_value(name, item, False, dtype) for item in value]
    if isinstance(value, dict):
        return {key: _value(f"{name}.{key}", item, False, dtype) for key, item in value.items()}
    if tensor and isinstance(value, int | float) and not isinstance(value, bool):
        return torch.full((1,), value, dtype=dtype if isinstance(value, float) else torch.int64)
    return value


def _tensor(name: str, text: str, dtype: torch.dtype) -> torch.Tensor:
    match = _SPEC.fullmatch(text)
    assert match is not None
    if match["dtype"] != "float":
        if match["dtype"] not in DTYPES:
            raise OptionError(f"input {name!r}: {unknown('dtype', match['dtype'], ['float', *DTYPES])}")
        dtype = DTYPES[match["dtype"]]
    shape = [int(size) for size in match["shape"].split(",") if size.strip()]
    # numbers of a model on fake tensors are real: a mask says how many tokens count
    with contextlib.nullcontext() if dtype.is_floating_point else unset_fake_temporarily():
        return _filled(name, shape, dtype, match["value"])


def _filled(name: str, shape: list[int], dtype: torch.dtype, value: str | None) -> torch.Tensor:
    if value is not None:
        try:
            return torch.full(shape, float(value)).to(dtype)
        except ValueError:
            raise OptionError(f"input {name!r}: {value!r} is no number; {_EXAMPLE}") from None
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=torch.float64).to(dtype)  # the same numbers in every dtype
    if dtype is torch.bool:
        drawn = torch.rand(shape) > 0.5
        if shape and shape[-1]:
            drawn[..., 0] = True  # as a mask, no row may be empty: its softmax would have no value
        return drawn
    return torch.randint(0, 2, shape, dtype=dtype)  # an index that every table has
