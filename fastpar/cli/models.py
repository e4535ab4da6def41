"""MODEL and its inputs, from what stands on the command line.

| MODEL | weights |
|---|---|
| ``package.module:function`` | as the function, which returns ``(model, inputs)``, makes them |
| a diffusers config ``.json``, or the name of a diffusers class | random |
| a diffusers folder (of a model, or of a pipeline), or the hub id of one that is on disk | its own |

Nothing is downloaded. With ``fake`` everything is built on fake tensors: no weights are read or made.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpar.cli.inputs import dtype_named, given_inputs, read_json
from fastpar.cli.weights import randomise
from fastpar.core.errors import FastparError, OptionError
from fastpar.graph.capture import Inputs

_FUNCTION = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DENOISERS = ("transformer", "unet")  # what diffusers' pipelines call the model that is run in every step
_FORMS = (
    "a diffusers folder or config .json, a hub id that is on disk, the name of a diffusers class, "
    "or package.module:function"
)


@dataclass(frozen=True)
class Loaded:
    """A model, ready to be captured, and the inputs of one call."""

    model: Any
    inputs: Inputs


def load(
    text: str,
    inputs: str | None = None,
    pairs: Sequence[str] = (),
    dtype: str | None = None,
    seed: int = 0,
    fake: bool = False,
    component: str | None = None,
) -> Loaded:
    """The model that ``text`` names and its inputs (``inputs``: a file or function, ``pairs``: name=value).

    ``dtype`` None is bfloat16 where ``fake``, else float32 (a function: its own). Raises OptionError.
    """
    asked = dtype_named(dtype) if dtype else torch.bfloat16 if fake else None
    torch.manual_seed(seed)
    with _mode(fake):
        # Under the dtype as torch's default where it must be: `.to()` does not work on fake parameters, and a
        # function casts by itself. Elsewhere tables of sines are to be made in float32 and cast, as usual.
        with _default_dtype(asked if fake or _FUNCTION.fullmatch(text) else None):
            model, own = _model(text, asked or torch.float32, seed, fake, component)
        if isinstance(model, torch.nn.Module):
            model.eval().requires_grad_(False)
        with _default_dtype(asked):
            return Loaded(model, _inputs(model, own, inputs, pairs, asked))


def _inputs(model: Any, own: Any, inputs: str | None, pairs: Sequence[str], asked: torch.dtype | None) -> Inputs:
    own = own() if callable(own) else own  # now, while the default dtype and the fake mode are those of the model
    if own is not None and inputs is None and not pairs:
        return own  # a function's (model, inputs) is taken as it is
    texts: Mapping[str, Any] = {}
    if inputs is not None and _FUNCTION.fullmatch(inputs):
        function = imported(inputs, "--inputs")
        own = function(model) if _needs_argument(function) else function()
        own = own() if callable(own) else own
    elif inputs is not None:
        own, texts = None, read_json(Path(inputs))
    if own is not None and not isinstance(own, Mapping):
        if pairs:
            raise OptionError("--input names arguments, but the inputs that it should add to are positional")
        return own
    return given_inputs(model, own or {}, texts, pairs, asked or _dtype_of(model))


def _dtype_of(model: Any) -> torch.dtype:
    tensors = model.parameters() if isinstance(model, torch.nn.Module) else ()
    return next((p.dtype for p in tensors if p.is_floating_point()), torch.get_default_dtype())


def _needs_argument(function: Callable[..., Any]) -> bool:
    return any(p.default is p.empty and p.kind is not p.VAR_KEYWORD
               for p in inspect.signature(function).parameters.values())  # fmt: skip


def imported(text: str, what: str = "MODEL") -> Callable[..., Any]:
    """The function of ``package.module:function``; modules of the working directory are found. OptionError."""
    match = _FUNCTION.fullmatch(text)
    assert match is not None
    if os.getcwd() not in sys.path:  # a console script's path starts with its own folder
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(match["module"])
    except ImportError as error:
        raise OptionError(f"{what} {text!r}: {error}") from error
    found = getattr(module, match["name"], None)
    if not callable(found):
        raise OptionError(f"{what} {text!r}: module {match['module']!r} has no function {match['name']!r}")
    return found


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _mode(fake: bool) -> contextlib.AbstractContextManager[Any]:
    return FakeTensorMode() if fake else contextlib.nullcontext()


def _model(text: str, dtype: torch.dtype, seed: int, fake: bool, component: str | None) -> tuple[Any, Any]:
    """The model, and inputs where it brings them."""
    path = Path(text)
    if path.is_dir():
        return _from_folder(path, dtype, fake, component), None
    if path.is_file():
        return _from_config(read_json(path), str(path), dtype, seed, fake), None
    if _FUNCTION.fullmatch(text):
        found = imported(text)()
        if not isinstance(found, tuple) or len(found) != 2:
            raise OptionError(f"MODEL {text!r}: the function must return (model, inputs), not {type(found).__name__}")
        return found
    if path.suffix == ".json":
        raise OptionError(f"MODEL {text!r}: there is no such file")
    if text.isidentifier():
        return _random(_diffusers_class(text), {}, dtype, seed, fake), None
    if _HUB_ID.fullmatch(text):
        return _from_folder(_hub_folder(text), dtype, fake, component), None
    raise OptionError(f"MODEL {text!r} is nothing that is here; expected {_FORMS}")


def _diffusers_class(name: str) -> Any:
    import diffusers

    found = getattr(diffusers, name, None)
    if isinstance(found, type) and issubclass(found, diffusers.ModelMixin):
        return found
    near = difflib.get_close_matches(name, [n for n in dir(diffusers) if "Model" in n or "Autoencoder" in n], n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise OptionError(f"MODEL: {name!r} is no model class of diffusers {diffusers.__version__}{hint}; "
                      f"expected {_FORMS}")  # fmt: skip


def _from_config(config: Mapping[str, Any], where: str, dtype: torch.dtype, seed: int, fake: bool) -> Any:
    if not isinstance(config.get("_class_name"), str):
        raise OptionError(f"{where!r} is no diffusers config of a model: it has no _class_name")
    return _random(_diffusers_class(config["_class_name"]), config, dtype, seed, fake)


def _random(cls: Any, config: Mapping[str, Any], dtype: torch.dtype, seed: int, fake: bool) -> Any:
    """A model with random weights in ``dtype``, where 16 bit keep in float32 what the class asks for."""
    try:
        model = cls.from_config(dict(config))
    except (TypeError, ValueError, ImportError) as error:
        raise OptionError(f"{cls.__name__} cannot be made from this config: {error}") from error
    if fake:
        return model
    randomise(model, seed)
    torch.nn.Module.to(model, dtype)  # diffusers' own override warns about float32 modules
    if dtype in (torch.float16, torch.bfloat16):
        kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
        for name, parameter in model.named_parameters():
            if kept & set(name.split(".")):
                parameter.data = parameter.data.float()
    return model


def _hub_folder(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except Exception as error:  # the hub's errors differ between its versions
        raise OptionError(
            f"MODEL {hub_id!r} is no folder here, and no hub repository of that name is on disk; fastpar downloads "
            f"nothing (`hf download {hub_id}` does)"
        ) from error


def _from_folder(folder: Path, dtype: torch.dtype, fake: bool, component: str | None) -> Any:
    """The model of a model's folder, or a component of a pipeline's."""
    if component is None and not (folder / "config.json").exists():
        component = next((name for name in _DENOISERS if (folder / name / "config.json").exists()), None)
    inner = folder / component if component else folder
    if not (inner / "config.json").exists():
        there = sorted(p.parent.name for p in folder.glob("*/config.json"))
        raise OptionError(
            f"{str(inner)!r} holds no config.json of a model"
            + (f"; choose one with --component: {', '.join(there)}" if there else "")
        )
    config = read_json(inner / "config.json")
    if fake:
        return _from_config(config, str(inner / "config.json"), dtype, 0, fake)
    cls = _diffusers_class(str(config.get("_class_name")))
    try:
        return cls.from_pretrained(str(inner), local_files_only=True, torch_dtype=dtype)
    except FastparError:
        raise
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise OptionError(
            f"the weights in {str(inner)!r} cannot be loaded: {said}. Give its config.json for random "
            "weights, or --fake to plan without any"
        ) from error
