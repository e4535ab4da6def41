"""Published ratios of two plans' times, against predicted ones.

StreamFusion's ablation runs on machines of eight A100: its baseline keeps heads inside a machine and rings across;
``tas`` puts heads across and rings inside; the torus pulls and pushes in stages under the attention. The planner has
one torus: how its transfers are made (two-sided or one-sided) is not modelled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.published import workloads
from benchmarks.published.latency import Model
from benchmarks.published.machines import DEVICE, LINK, LINKS, Constants, topology
from benchmarks.published.models import MODELS
from benchmarks.published.split import RATIOS, read
from fastpar.core.errors import FastparError, PlanError
from fastpar.core.plan import Plan
from fastpar.plan.predict import predict_in
from fastpar.plan.topology import Topology, load

_FRAMES = {"20 s": "321", "40 s": "641"}  # at 16 frames a second, and the first
_TEXT = {"flux-dev": "512", "cogvideox-2b": "226", "cogvideox-5b": "226", "cogvideox1.5-5b": "224", "sdxl": "77"}
_TEXT |= {"wan2.1-14b": "512", "wan2.2-14b": "512"}
_DEVICES = ("GB200", "H200", "H100", "H20", "L40", "A100")


def rows() -> list[dict[str, Any]]:
    """The ratios in the form of latencies' rows, for their workloads."""
    out = []
    for row in read(RATIOS):
        name = row["model"]
        frames = _FRAMES.get(row["frames"], row["frames"])
        if name in MODELS and row["width"] and frames:
            calls = "2" if MODELS[name].batched or name in ("qwen-image", "wan2.1-14b", "wan2.2-14b") else "1"
            out.append(row | {"frames": frames, "text": _TEXT.get(name, ""), "calls": calls, "scope": "transformer"})
    return out


def predicted(model: Model, constants: Constants) -> list[dict[str, Any]]:
    """Every published ratio with the predicted one, or why there is none."""
    ready = {row["id"]: row for row in rows()}
    out = []
    for given in read(RATIOS):
        made: dict[str, Any] = {"id": given["id"], "published": float(given["ratio"]), "predicted": None, "reason": ""}
        row = ready.get(given["id"])
        if row is None:
            made["reason"] = "no workload: the model is not diffusers', or its size is unsaid"
        elif workloads.key(row) not in model.denoisers:
            made["reason"] = "no workload"
        else:
            try:
                times = [_seconds(model, row, row[plan], constants) for plan in ("plan_a", "plan_b")]
                made["predicted"] = round(times[0] / times[1], 3)
            except PlanError as error:  # the terms are there, but not together
                made["reason"] = f"not in the planner: {str(error).splitlines()[0]}"
            except (FastparError, ValueError):
                made["reason"] = "not in the planner: a plan that is not published, or a term that it does not have"
        out.append(made)
    return out


def _seconds(model: Model, row: Mapping[str, Any], text: str, constants: Constants) -> float:
    work = model.denoisers[workloads.key(row)]
    if row["id"].startswith("streamfusion"):
        plan, order = _streamfusion(text, int(row["ranks"]) // 8)
        return predict_in(work, plan, _a100s(constants), order)
    device = next(d.lower() for d in _DEVICES if d in row["hardware"])
    if text == "1 rank":
        text = "ulysses=1"
    plan = Plan.parse(text)
    return predict_in(work, plan, topology({"device": device}, constants), None)


def _streamfusion(text: str, machines: int) -> tuple[Plan, tuple[str, ...]]:
    """Its plan as ours, and the order of the axes from the outside in. Its rule shares heads over as many ranks as
    divide them: 24 of 24 on three machines, 8 of 32 on four."""
    across = 8 if machines == 3 else 2  # ranks of a machine that share heads with those of other machines
    if text.startswith("usp"):
        return Plan(ulysses=8, ring=machines), ("ring", "ulysses")
    ring = {"ring": 8 // across} if across < 8 else {}
    if "(tas)" in text:
        return Plan(ulysses=machines * across, **ring), ("ulysses", "ring") if ring else ("ulysses",)
    if re.search("torus|onesided", text):
        plan = Plan(torus=machines, ulysses=across, **ring)
        return plan, ("torus", *(("ring",) if ring else ()), "ulysses")
    raise ValueError(text)


def _a100s(constants: Constants) -> Topology:
    """Machines of eight A100 at the fitted constants; the network, which no row has, is the preset's."""
    box = load("a100-4x8")
    products, attention = (constants[("device", "a100", kind)] for kind in DEVICE[:2])
    efficiency, latency = (constants[("link", LINKS["a100"], kind)] for kind in LINK)
    inner = replace(box.levels[0], efficiency=efficiency, latency=latency)
    return replace(
        box, device=replace(box.device, products=products, attention=attention), levels=(inner, *box.levels[1:])
    )
