"""Ranks were given the same values: looked at once per compile, in the first call.

What ranks compiled says nothing about what they are called with, and ranks that are called with other noise, or have
other weights, compute something that no device would, with no sign of it. So the first call of a program makes
checksums of its inputs and weights and compares them through the store; later calls take what they get.

Weights and whole numbers have the same bits on all ranks. What the user passes may have been computed on each rank, a
prompt's embedding say, and devices that are not alike round differently: there some numbers are compared as well.
A program that draws random numbers also has the state of the generator compared.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import torch

from fastpar.core.errors import AgreementError
from fastpar.graph.devices import device_of
from fastpar.graph.program import Program, draws
from fastpar.ops.checksum import LANES, checksums
from fastpar.run.agree import agree, party_of
from fastpar.run.artefact import Runner

log = logging.getLogger("fastpar")

SAMPLES = 32  # numbers of a tensor
NEAR = 0.1  # of their root mean square: rounding in a text encoder is below, other noise is far above
_VALID = (
    "every rank must call the model with the same inputs and weights: seed the generators that draw noise (or initial "
    "weights) alike on all ranks, and load the same checkpoints"
)


def alike(run: Runner, program: Program, group: str | None, timeout: float, held: bool = False) -> Runner:
    """``run``, which raises AgreementError on all ranks in its first call if they were given other values.

    ``held``: weights are parts, which every rank has its own of.
    """
    if party_of(group) is None:
        return run
    seen: list[bool] = []

    def checked(args: list[Any]) -> Sequence[Any]:
        if not seen:
            seen.append(True)
            try:
                agree(values(program, args, held), group, timeout, same=near)
            except AgreementError as error:
                differ = str(error).startswith("ranks do not agree on")
                raise AgreementError(f"{error}; {_VALID}") from error if differ else error
        return run(args)

    return checked


def values(program: Program, args: Sequence[Any], held: bool = False) -> dict[str, str]:
    """A text per input, those of the user first: a number's own, or a tensor's checksum, and some of its numbers."""
    drawn = any(map(draws, program.graph.nodes))
    pairs = sorted(zip(program.inputs, args, strict=True), key=lambda pair: pair[0].kind != "user")
    out = {"the state of the random generator": _generator(device_of(program.graph))} if drawn else {}
    tensors: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for given, value in pairs:
        name = f"the values of {given.name}"
        if not isinstance(value, torch.Tensor):
            out[name] = repr(value)
        elif not (held and given.kind == "parameter"):
            out[name] = _samples(value) if given.kind == "user" else ""
            tensors.setdefault(value.device, []).append((name, value))
    for several in tensors.values():
        xs = [x for _, x in several]
        found = torch.cat([checksums(xs[start : start + LANES]) for start in range(0, len(xs), LANES)])
        for (name, _), number in zip(several, found.tolist(), strict=True):
            out[name] += f" (checksum {number & (1 << 64) - 1:016x})"
    return out


def _generator(device: torch.device | None) -> str:
    """The state of the generator that operators draw from, as a number."""
    state = torch.get_rng_state() if device is None else getattr(torch, device.type).get_rng_state(device)
    return hashlib.sha256(state.numpy().tobytes()).hexdigest()[:16]


def _samples(x: torch.Tensor) -> str:
    """Numbers from all over a tensor of floats."""
    if not (x.is_floating_point() or x.is_complex()) or not x.numel():
        return ""
    flat = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).detach().reshape(-1)
    at = torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).long()
    return " ".join(f"{number:.4g}" for number in flat[at.to(x.device)].double().tolist())


def near(a: str, b: str) -> bool:
    """Whether two texts of ``values`` are equal or differ as roundings do; the latter is logged."""
    if a == b:
        return True
    if not all(" (checksum" in text for text in (a, b)):
        return False
    x, y = ([float(number) for number in text.partition(" (")[0].split()] for text in (a, b))
    if not x or len(x) != len(y):
        return False
    size = sum(number * number for number in (*x, *y)) / len((*x, *y))
    if not all((p - q) ** 2 <= NEAR**2 * size for p, q in zip(x, y, strict=True)):
        return False
    log.warning("ranks were called with inputs that differ as if rounded differently: %s and %s", a, b)
    return True
