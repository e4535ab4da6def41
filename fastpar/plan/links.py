"""Exchanges that share links: what each would take alone, and what it gets where others are under way.

A fluid model: an exchange is all messages of one group, and they advance together, so alone it lasts as long as its
busiest link needs. Where several are under way on a link that cannot carry them all at full speed, each gets an equal
share of its bandwidth unless it needs less (max-min fairness; the tightest link is shared out first).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastpar.plan.topology import Topology

Link = tuple[int, int, bool]
"""Level of the topology, member of it, and whether bytes leave that member (else they come to it)."""

_SLACK = 1e-9  # of a link: rounding, not load


@dataclass(frozen=True)
class Load:
    """One exchange when nothing else is under way: seconds before anything moves, seconds in which it moves, and the
    share of each link's bandwidth that it takes meanwhile (1 of the busiest one's)."""

    latency: float = 0.0
    moving: float = 0.0
    links: Mapping[Link, float] = field(default_factory=dict)


def load(topology: Topology, sends: tuple[Any, Any, Any]) -> Load:
    """What the messages of one exchange (from, to, bytes; as of ``Topology.seconds``) take of a topology."""
    src, dst, size = (np.asarray(x) for x in sends)
    # Twice the bytes take twice the moving. So the topology alone says what latency and efficiency are.
    whole, twice = topology.seconds((src, dst, size)), topology.seconds((src, dst, 2 * size))
    if not whole:
        return Load()
    busy: dict[Link, float] = {}
    for depth, (level, span) in enumerate(zip(topology.levels, topology.spans(), strict=True)):
        a, b = src // span, dst // span
        crosses = a != b
        for ends, leaves in ((a, True), (b, False)):
            for member, total in enumerate(np.bincount(ends[crosses], size[crosses])):
                if total:
                    busy[depth, member, leaves] = float(total) / level.reached
    most = max(busy.values())
    moving = min(twice - whole, whole)
    return Load(whole - moving, moving, {link: seconds / most for link, seconds in busy.items()})


def speeds(loads: Sequence[Load], bandwidths: Sequence[float]) -> list[float]:
    """Of each exchange under way the share (0 to 1) of its own full speed; ``bandwidths`` are those of the levels."""
    found = [1.0] * len(loads)
    users: dict[Link, list[int]] = {}
    for i, one in enumerate(loads):
        for link in one.links:
            users.setdefault(link, []).append(i)
    tight = {link: who for link, who in users.items() if len(who) > 1}
    while tight:
        levels = {}
        for link, who in list(tight.items()):
            wanted = [found[i] * loads[i].links[link] for i in who]
            if sum(wanted) <= 1 + _SLACK:
                del tight[link]
            else:
                levels[link] = _level(wanted)
        if levels:
            link = min(levels, key=lambda x: levels[x] * bandwidths[x[0]])
            for i in tight.pop(link):
                found[i] = min(found[i], levels[link] / loads[i].links[link])
    return found


def _level(wanted: Sequence[float]) -> float:
    """The share that everyone may have of a link that is wanted more than once over: who wants less leaves the rest."""
    left = 1.0
    ordered = sorted(wanted)
    for i, one in enumerate(ordered):
        level = left / (len(ordered) - i)
        if one > level:
            return level
        left -= one
    return max(ordered)
