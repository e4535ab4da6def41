"""Devices and links of the published rows, and the constants that are fitted to them.

A device has three constants (what products and attention reach of its data sheet, and the seconds that the host of
such machines needs per kernel that Python launches), a kind of link two (what large messages reach of its bandwidth,
seconds per collective), a software stack one (a factor on its seconds). What no row knows is at a common value, from
which constants move only where rows ask for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from fastpar.plan.topology import Topology, load

PRESETS = {
    "h100": "h100-8", "h200": "h200-8", "h800": "h800-8", "h20": "h20-8", "a100": "a100-8", "l20": "l20-8",
    "l40": "l40-8", "rtx4090": "rtx4090-8", "rtx5090": "rtx5090-8", "rtxpro5000": "rtxpro5000-4", "b200": "b200-8",
    "gb200": "gb200-nvl72",
}  # fmt: skip
LINKS = {
    "h100": "NVLink 4", "h200": "NVLink 4", "h800": "NVLink 4", "h20": "NVLink 4", "a100": "NVLink 3",
    "l20": "PCIe 4", "l40": "PCIe 4", "rtx4090": "PCIe 4, through the host", "rtx5090": "PCIe 5, through the host",
    "rtxpro5000": "PCIe 5", "b200": "NVLink 5", "gb200": "NVLink 5",
}  # fmt: skip
FA3 = ("h100", "h200", "h800")  # Hopper with all its tensor cores: H20's are slow enough for FlashAttention-2


@dataclass(frozen=True)
class Kind:
    """A kind of constant: its common value, how far it is believed to lie from it (of its logarithm), bounds."""

    prior: float
    spread: float
    low: float
    high: float


KINDS = {
    "products": Kind(0.65, 0.2, 0.35, 0.98),
    "attention": Kind(0.5, 0.25, 0.2, 0.98),
    "host": Kind(25e-6, 0.4, 5e-6, 60e-6),
    "efficiency": Kind(0.6, 0.35, 0.05, 0.95),
    "latency": Kind(25e-6, 0.5, 4e-6, 250e-6),
    "stack": Kind(1.0, 0.12, 0.6, 1.6),
}
DEVICE = ("products", "attention", "host")
LINK = ("efficiency", "latency")
PER = {"device": DEVICE, "link": LINK, "stack": ("stack",)}

Name = tuple[str, str, str]  # ("device", "h100", "products")


def names(rows: Iterable[Mapping[str, str]]) -> list[Name]:
    """Every constant that predicting these rows needs."""
    found: dict[Name, None] = {}
    for row in rows:
        for name in of(row):
            found[name] = None
    return list(found)


def stack(row: Mapping[str, str]) -> str:
    """The software that ran: xDiT's figures of HunyuanVideo are of the model's own repository, on L20 of diffusers."""
    if row["model"] == "hunyuanvideo" and row["stack"] == "xdit":
        return "diffusers" if row["device"] == "l20" else "hunyuanvideo"
    return row["stack"]


def of(row: Mapping[str, str]) -> list[Name]:
    """The constants that one row's prediction needs; a link only where it runs on several devices."""
    device = row["device"]
    out = [("device", device, kind) for kind in DEVICE]
    if int(row["ranks"]) > 1:
        out += [("link", LINKS[device], kind) for kind in LINK]
    return [*out, ("stack", stack(row), "stack")]


class Constants:
    """Values by name; what has none is at its common value."""

    def __init__(self, values: Mapping[Name, float] | None = None, priors: Mapping[str, float] | None = None) -> None:
        self.values = dict(values or {})
        self.priors = {kind: k.prior for kind, k in KINDS.items()} | dict(priors or {})

    def __getitem__(self, name: Name) -> float:
        return self.values.get(name, self.priors[name[2]])

    def changed(self, name: Name, value: float) -> Constants:
        kind = KINDS[name[2]]
        return Constants(self.values | {name: min(kind.high, max(kind.low, value))}, self.priors)

    def distance(self, name: Name) -> float:
        """From the common value, in spreads."""
        kind = KINDS[name[2]]
        return math.log(self[name] / kind.prior) / kind.spread

    def mean(self, what: Iterable[Name]) -> dict[str, float]:
        """Geometric mean by kind."""
        logs: dict[str, list[float]] = {}
        for name in what:
            logs.setdefault(name[2], []).append(math.log(self[name]))
        return {kind: math.exp(sum(values) / len(values)) for kind, values in logs.items()}


def topology(row: Mapping[str, str], constants: Constants, faster: float = 1.0) -> Topology:
    """The row's machine at these constants; ``faster``: the row's attention kernel against the usual one."""
    device = row["device"]
    shares = tuple(constants[("device", device, kind)] for kind in DEVICE[:2])
    link = tuple(constants[("link", LINKS[device], kind)] for kind in LINK)
    return _topology(device, shares, link, faster)


@lru_cache(maxsize=4096)
def _topology(device: str, shares: tuple[float, ...], link: tuple[float, ...], faster: float) -> Topology:
    preset = load(PRESETS[device])
    products, attention = shares
    efficiency, latency = link
    inner = preset.levels[0].latency
    return replace(
        preset,
        device=replace(preset.device, products=products, attention=min(0.9, attention * faster)),
        # What an outer level takes more than the inner one is the preset's.
        levels=tuple(
            replace(x, efficiency=efficiency, latency=latency + x.latency - inner) for x in preset.levels
        ),
    )  # fmt: skip
