"""Topologies: devices, the switches that join them, and what a link carries.

A topology is a tree of levels, from the inside out: devices hang on a switch (NVLink, a PCIe root), switches
on the next level (a socket link, a network), each by one link with a bandwidth per direction and a latency.
``graph()`` gives it as a networkx graph. Presets stand in ``presets/*.toml``, one's own machine in a file of
the same form:

    speeds = [1, 1, 0.6]  # of the devices in order, as multiples of [device]; may be left out: all alike

    [device]
    name = "H100 SXM 80 GB"
    flops = 989e12        # dense bf16 products, FLOP/s
    bandwidth = 3.35e12   # memory, bytes/s
    memory = 80e9         # bytes
    products = 0.7        # of ``flops`` that matrix products reach; may be left out, as the next three
    attention = 0.45      # of ``flops`` that attention reaches
    streaming = 0.85      # of ``bandwidth`` that reading and writing reach
    cache = 50e6          # last-level cache, bytes; may be left out: none

    [[level]]
    name = "NVLink 4"
    size = 8              # members that the switch joins
    bandwidth = 450e9     # of one member's link, bytes/s per direction
    latency = 12e-6       # of one collective that crosses this level, seconds
    efficiency = 0.8      # of ``bandwidth`` that large messages reach
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from fastpar.core.errors import OptionError
from fastpar.core.text import unknown

DEFAULT = "h100-8"
_ENTRIES = ("description", "speeds", "device", "level")
_DEVICE = ("name", "flops", "bandwidth", "memory")
_OPTIONAL = ("cache",)
_LEVEL = ("name", "size", "bandwidth", "latency")

# What devices and links reach of their data sheets where nobody has said it: on an H200, an 8192-cubed bf16 product
# ran at 0.8 of the peak and a copy at 0.9, and a model's products are smaller; FlashAttention-2 runs at 0.35 to 0.6
# (FlashAttention-3, section 4.1); NCCL reaches about 0.8 of a link with large messages.
PRODUCTS, ATTENTION, STREAMING, LINK = 0.7, 0.5, 0.85, 0.8
NARROW = 0.85
CACHED = 3.0  # bandwidth of the last-level cache over that of memory
_SHARES = ("products", "attention", "streaming", "efficiency")


@dataclass(frozen=True)
class Device:
    """One accelerator: dense bf16 FLOP/s, memory bytes/s, memory bytes; and what it reaches of the first two."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    products: float = PRODUCTS
    attention: float = ATTENTION
    streaming: float = STREAMING
    cache: float = 0.0

    def attends(self, width: int) -> float:
        """Share of ``flops`` that attention with heads of ``width`` reaches. Narrow heads have as many exponentials
        to take for fewer products: FlashAttention-2 (section 4.1) runs at about 0.85 with 64 of what it does with 128.
        """
        return self.attention * (NARROW if width < 96 else 1.0)

    def pointwise(self, moved: float) -> float:
        """Bytes/s that pointwise operators reach, one after the other, each moving ``moved`` bytes: what one of them
        wrote is still in the cache for the next one where both fit."""
        cached = min(1.0, max(0.0, 2 - 2 * moved / self.cache)) if self.cache else 0.0
        return self.bandwidth * self.streaming / (1 - cached * (1 - 1 / CACHED))


@dataclass(frozen=True)
class Level:
    """A switch and the links of its ``size`` members: bytes/s per direction, seconds per collective, and what
    large messages reach of the bandwidth."""

    name: str
    size: int
    bandwidth: float
    latency: float
    efficiency: float = LINK

    @property
    def reached(self) -> float:
        """Bytes/s of large messages."""
        return self.bandwidth * self.efficiency


@dataclass(frozen=True)
class Topology:
    """A tree of devices. Ranks are devices in order: neighbours share the innermost switch. ``speeds`` has a number
    per device where some compute faster than others: 0.6 takes 1/0.6 times as long for everything as ``device``."""

    name: str
    description: str
    device: Device
    levels: tuple[Level, ...]
    speeds: tuple[float, ...] = ()

    @property
    def devices(self) -> int:
        return math.prod(level.size for level in self.levels)

    def spans(self) -> tuple[int, ...]:
        """Devices below one member's link of each level: 1 for a device's own."""
        out, span = [], 1
        for level in self.levels:
            out.append(span)
            span *= level.size
        return tuple(out)

    def speed(self, rank: int) -> float:
        """How fast a rank's device is, as a multiple of ``device``."""
        return self.speeds[rank] if self.speeds else 1.0

    def check(self, ranks: int) -> None:
        """Raise OptionError where a plan needs more devices than there are."""
        if ranks > self.devices:
            raise OptionError(
                f"topology {self.name!r} has {self.devices} devices, the plan needs {ranks}; valid: at most "
                f"{self.devices} ranks, another preset ({', '.join(presets())}), or a TOML file"
            )

    def seconds(self, sends: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]] | Any) -> float:
        """Seconds of one exchange: ``sends`` is (from, to, bytes), three arrays of one length.

        All messages are under way at once; the busiest link decides, each direction by itself, and the
        outermost level that is crossed gives the latency. 0 where nothing leaves a device.
        """
        src, dst, size = (np.asarray(x) for x in sends)
        away = src != dst
        src, dst, size = src[away], dst[away], size[away].astype(np.float64)
        if not size.sum():
            return 0.0
        slowest, latency = 0.0, 0.0
        for level, span in zip(self.levels, self.spans(), strict=True):
            a, b = src // span, dst // span
            crosses = a != b
            if not crosses.any():
                break
            latency = max(latency, level.latency)
            for end in (a, b):
                slowest = max(slowest, float(np.bincount(end[crosses], size[crosses]).max()) / level.reached)
        return latency + slowest

    def graph(self) -> nx.Graph:
        """Devices (integers) and switches (text), edges with ``bandwidth`` (what is reached), ``latency``, ``name``."""
        graph = nx.Graph()
        for device in range(self.devices):
            graph.add_node(device, kind="device", **self.device.__dict__)
        for depth, (level, span) in enumerate(zip(self.levels, self.spans(), strict=True)):
            for member in range(self.devices // span):
                inner: Any = member if depth == 0 else f"{self.levels[depth - 1].name} {member}"
                switch = f"{level.name} {member // level.size}"
                graph.add_node(switch, kind="switch")
                graph.add_edge(inner, switch, name=level.name, bandwidth=level.reached, latency=level.latency)
        return graph

    def link(self, ranks: Sequence[int]) -> str:
        """Name of the outermost link that messages among ``ranks`` cross."""
        name = "none"
        for level, span in zip(self.levels, self.spans(), strict=True):
            if len({r // span for r in ranks}) > 1:
                name = level.name
        return name


def presets() -> tuple[str, ...]:
    """Names of the topologies that come with the package, sorted."""
    folder = resources.files("fastpar.plan") / "presets"
    return tuple(sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml")))


def load(name: str) -> Topology:
    """A preset by name, or a TOML file by path. Raises OptionError naming what is valid."""
    if name in presets():
        text = (resources.files("fastpar.plan") / "presets" / f"{name}.toml").read_text()
        return parse(text, name)
    path = Path(name)
    if path.suffix != ".toml":
        raise OptionError(unknown("topology", name, presets()) + "; or the path of a .toml file")
    try:
        return parse(path.read_text(), path.stem)
    except OSError as error:
        raise OptionError(f"topology {name!r}: cannot be read: {error}") from error


def parse(text: str, name: str) -> Topology:
    """A topology from TOML. Raises OptionError for what is missing, unknown or not a positive number."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"topology {name!r}: {error}") from error
    extra = [key for key in data if key not in _ENTRIES]
    if extra:
        raise OptionError(f"topology {name!r}: " + unknown("entry", extra[0], _ENTRIES))
    levels = data.get("level")
    if not isinstance(levels, list) or not levels:
        raise OptionError(f"topology {name!r}: needs a [[level]] or more, from the inside out")
    device = _fields(data.get("device"), _DEVICE, _SHARES[:3], f"topology {name!r}: [device]", _OPTIONAL)
    made = [
        _fields(level, _LEVEL, _SHARES[3:], f"topology {name!r}: [[level]] {i + 1}") for i, level in enumerate(levels)
    ]
    joined = tuple(Level(**{**level, "size": int(level["size"])}) for level in made)
    speeds = _speeds(data.get("speeds", []), math.prod(level.size for level in joined), name)
    return Topology(name, str(data.get("description", name)), Device(**device), joined, speeds)


def _speeds(given: Any, devices: int, name: str) -> tuple[float, ...]:
    good = isinstance(given, list) and len(given) in (0, devices)
    if not good or any(isinstance(x, bool) or not isinstance(x, int | float) or not 0 < x < math.inf for x in given):
        raise OptionError(f"topology {name!r}: speeds are {devices} numbers above 0, one per device, not {given!r}")
    return tuple(map(float, given))


def _fields(
    given: Any, names: Sequence[str], shares: Sequence[str], where: str, more: Sequence[str] = ()
) -> dict[str, Any]:
    """The entries: all of ``names``, and those of ``shares`` (of what a data sheet promises) and ``more`` that are
    there."""
    if not isinstance(given, Mapping):
        raise OptionError(f"{where} is missing; it has {', '.join(names)}")
    for key in given:
        if key not in (*names, *shares, *more):
            raise OptionError(f"{where}: {unknown('entry', str(key), (*names, *shares, *more))}")
        share = given[key]
        if key in shares and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1):
            raise OptionError(f"{where}: {key} is a share above 0 and at most 1, not {share!r}")
    for key in (*names, *(x for x in more if x in given)):
        value = given.get(key)
        good = isinstance(value, str) if key == "name" else isinstance(value, int | float) and value > 0
        whole = key != "size" or (isinstance(value, int | float) and value == int(value))
        if not good or isinstance(value, bool) or not whole:
            kind = "text" if key == "name" else "a whole number above 0" if key == "size" else "a number above 0"
            raise OptionError(f"{where}: {key} is {kind}, not {value!r}")
    return dict(given)


def detect(ranks: int) -> tuple[Topology, str]:
    """The topology of the machine at hand, widened to ``ranks`` devices if need be, and how it was found."""
    import torch

    chosen, why = load(DEFAULT), f"no accelerator here and no topology given: planned for {DEFAULT}"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        best = [p for p in presets() if load(p).device.name.split()[0] in name.split()
                or " ".join(load(p).device.name.split()[:2]) in name]  # fmt: skip
        best.sort(key=lambda p: len(load(p).levels))  # one machine, until something says that there are more
        if best:
            chosen, why = load(best[0]), f"found {name}: planned for {best[0]}"
        else:
            why = f"found {name}, for which there is no preset: planned for {DEFAULT}; give topology=FILE.toml"
    if chosen.devices < ranks:
        outer = chosen.levels[-1]
        levels = (*chosen.levels[:-1], replace(outer, size=-(-ranks * outer.size // chosen.devices)))
        chosen = replace(chosen, levels=levels, speeds=())
        why += f", with {chosen.devices} devices on {outer.name}"
    return chosen, why
