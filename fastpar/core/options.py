"""The options of ``torch.compile(model, backend="fastpar", options={...})`` and their environment twins."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from fastpar.core.errors import FastparError, OptionError
from fastpar.core.plan import Plan
from fastpar.core.text import parse_terms, unknown

LOWERINGS = ("inductor", "eager")
TRANSPORTS = ("two-sided", "one-sided")
DEFAULT_TIMEOUT = 60.0
_TIMEOUT = "FASTPAR_TIMEOUT"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True)
class Options:
    """What a user asked for. ``None`` means that nothing was said and a default is chosen later.

    ``plan`` is a ``Plan``; ``mesh`` a ``DeviceMesh`` or a process group (``None``: the world); ``topology``
    a preset's name or a file; ``lowering`` one of ``LOWERINGS`` (``None``: ``inductor`` on CUDA, ``eager`` on
    the CPU); ``transport`` one of ``TRANSPORTS``, how exchanges travel; ``cudagraphs`` whether the step is
    captured; ``passes`` the text of a pipeline that replaces the plan's own; ``dump`` a folder for the graph
    after every pass; ``verify`` whether every compiled graph is compared with eager. ``timeout`` is how many
    seconds ranks wait for each other while compiling, and for a one-sided message; it comes from
    ``FASTPAR_TIMEOUT`` only, since it belongs to the machine and not to the model.
    """

    plan: Plan = field(default_factory=lambda: Plan(auto=True))
    mesh: Any = None
    topology: str | None = None
    lowering: str | None = None
    transport: str = "two-sided"
    cudagraphs: bool = False
    passes: str | None = None
    dump: str | None = None
    verify: bool = False
    timeout: float = DEFAULT_TIMEOUT

    @classmethod
    def from_user(
        cls,
        options: Mapping[str, Any] | None = None,
        mode: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Options:
        """Options from ``torch.compile``'s ``options`` and ``mode`` and from the environment.

        A given option wins over its environment twin, which is then not even read; ``None`` counts as not
        given, an empty variable as not set. The environment is ``os.environ`` unless ``env`` is given. Raises
        ``OptionError`` for an unknown option or mode and for values that an option does not take,
        ``PlanError`` and ``TextError`` for a bad plan or pipeline; each names the option or the variable.
        """
        env = os.environ if env is None else env
        if options is not None and not isinstance(options, Mapping):
            raise OptionError(f"options: expected a dict, got {type(options).__name__}")
        for name in options or {}:
            if name not in OPTIONS:
                raise OptionError(unknown("option", str(name), OPTIONS))
        given = {name: value for name, value in (options or {}).items() if value is not None}
        found: dict[str, Any] = {"timeout": timeout_from_env(env)}
        for name, variable in ENVIRONMENT.items():
            if env.get(variable) and name not in given:
                found[name] = _named(f"environment variable {variable}", _FROM_TEXT[name], env[variable])
        if mode not in (None, "default", "reduce-overhead"):
            raise OptionError(
                unknown("mode", str(mode), ("default", "reduce-overhead"))
                + "; fastpar chooses kernels through its options, not through Inductor's modes"
            )
        if mode == "reduce-overhead":
            found["cudagraphs"] = True
        for name, value in given.items():
            found[name] = _named(f"option {name!r}", _CHECKS[name], value)
        return cls(**found)


def timeout_from_env(env: Mapping[str, str] | None = None) -> float:
    """Seconds of ``FASTPAR_TIMEOUT``, 60 if it is not set. Raises ``OptionError`` unless it is above 0."""
    text = (os.environ if env is None else env).get(_TIMEOUT)
    return _named(f"environment variable {_TIMEOUT}", _seconds, text) if text else DEFAULT_TIMEOUT


def _named(source: str, check: Callable[[Any], Any], value: Any) -> Any:
    """``check(value)``, with ``source`` in front of the message of any error."""
    try:
        return check(value)
    except FastparError as error:
        raise type(error)(f"{source}: {error}") from None


def _plan(value: Any) -> Plan:
    if isinstance(value, Plan):
        return value
    if isinstance(value, str):
        return Plan.parse(value)
    raise OptionError(f"expected a plan's text or a Plan, got {type(value).__name__}")


def _mesh(value: Any) -> Any:
    # Imported here: planning and simulating need no torch.distributed, which some builds of torch lack.
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(value, DeviceMesh | dist.ProcessGroup):
        return value
    raise OptionError(f"expected a torch DeviceMesh or ProcessGroup, got {type(value).__name__}")


def _path(value: Any) -> str:
    if isinstance(value, str | os.PathLike):
        path = os.fspath(value)
        if isinstance(path, str) and path:
            return path
    raise OptionError(f"expected text or a path, not empty, got {value!r}")


def _lowering(value: Any) -> str:
    if value in LOWERINGS:
        return str(value)
    raise OptionError(unknown("lowering", str(value), LOWERINGS))


def _transport(value: Any) -> str:
    if value in TRANSPORTS:
        return str(value)
    raise OptionError(unknown("transport", str(value), TRANSPORTS))


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise OptionError(f"expected True or False, got {value!r}")


def _pipeline(value: Any) -> str:
    # Only the grammar: which passes there are is known further up, and checked when the pipeline is made.
    parse_terms(value, "pipeline")
    return str(value)


def _flag(text: str) -> bool:
    word = text.strip().lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    raise OptionError(f"expected one of {', '.join(_TRUE + _FALSE)}, got {text!r}")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise OptionError(f"expected a number of seconds above 0, got {text!r}")
    return seconds


_CHECKS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "plan": _plan,
        "mesh": _mesh,
        "topology": _path,
        "lowering": _lowering,
        "transport": _transport,
        "cudagraphs": _bool,
        "passes": _pipeline,
        "dump": _path,
        "verify": _bool,
    }
)
OPTIONS = tuple(_CHECKS)
"""Names of the options, in the order that errors list them."""

ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {"plan": "FASTPAR_PLAN", "dump": "FASTPAR_DUMP", "verify": "FASTPAR_VERIFY"}
)
"""Option -> the environment variable that stands in for it."""
VARIABLES = (*ENVIRONMENT.values(), _TIMEOUT)
"""Environment variables that are read; no other begins with ``FASTPAR_``."""
_FROM_TEXT: Mapping[str, Callable[[str], Any]] = MappingProxyType(
    {"plan": _plan, "dump": _path, "verify": _flag}
)

assert {*OPTIONS, "timeout"} == {f.name for f in fields(Options)}  # an option without a check would be a hole
