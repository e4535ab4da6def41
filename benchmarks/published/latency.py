"""Seconds of a published row by the planner's own prediction, at given constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np

from benchmarks.published import decoders, judge, workloads
from benchmarks.published.machines import FA3, Constants, stack, topology
from fastpar.core.plan import Plan
from fastpar.plan.predict import predict
from fastpar.plan.topology import Topology
from fastpar.plan.workload import Workload

# FlashAttention-3 over FlashAttention-2 and SDPA on Hopper, forward (FlashAttention-3, section 4.1: 1.5 to 2.0).
FASTER = 1.6
# What decoders' convolutions, of 96 to 512 channels and in three dimensions, reach of what products reach.
CONVOLUTIONS = 0.35
FA3_STACKS = ("lightx2v", "sglang", "vllm-omni")  # their default on Hopper; rows that ran another kernel say so
_LAYERS, _PRODUCTS = 32, 7  # of a text encoder


@dataclass(frozen=True)
class Parts:
    """Seconds of a row: the denoiser's calls, the text encoders, the decoder (and encoder of an image)."""

    denoiser: float
    text: float
    decoder: float

    @property
    def total(self) -> float:
        return self.denoiser + self.text + self.decoder


class Model:
    """Predicts rows; workloads are read once."""

    def __init__(self) -> None:
        self.denoisers, self.decoders = workloads.load()

    def known(self, row: Mapping[str, str]) -> bool:
        return workloads.key(row) in self.denoisers

    def seconds(self, row: Mapping[str, str], constants: Constants) -> float | None:
        """Predicted seconds, None where there is no workload or the planner lacks the plan."""
        parts = self.parts(row, constants)
        return None if parts is None else parts.total

    def parts(self, row: Mapping[str, str], constants: Constants) -> Parts | None:
        plan = judge.plan(row)
        if plan is None or not self.known(row):
            return None
        work = self.denoisers[workloads.key(row)]
        box = topology(row, constants, FASTER if _fast(row) else 1.0)
        if row["dtype"] == "fp8":
            work = self._fp8(workloads.key(row))
        calls = 1 if _batched(work, row) else int(row["calls"])
        lowering = "inductor" if row["lowering"] == "compile" else "eager"
        # graphs: kernels as eager has them, replayed as a CUDA graph, which is DistriFusion's default
        host = 0.0 if row["lowering"] == "graphs" else constants[("device", row["device"], "host")]
        call = _call(work, plan, box, lowering, host)
        factor = constants[("stack", stack(row), "stack")]
        denoiser = factor * int(row["steps"]) * calls * call
        if row["scope"] != "pipeline" or "per iteration" in row["note"]:
            return Parts(denoiser, 0.0, 0.0)
        kind, encoders = decoders.OF[row["model"]]
        prompts = 2 if int(row["calls"]) > 1 else 1
        text = sum(_once(_text(parameters, tokens * prompts), box, host) for parameters, tokens in encoders)
        convolving = replace(box, device=replace(box.device, products=box.device.products * CONVOLUTIONS))
        decode = sum(_once(self.decoders[key], convolving, host) for key in decoders.keys(row))
        return Parts(denoiser, factor * text, factor * decode)

    @cache  # noqa: B019  (one model per process; the same object again is what _call's cache knows it by)
    def _fp8(self, key: str) -> Workload:
        """Products at twice bf16's rate, their weights at half its bytes; attention as it was."""
        work = self.denoisers[key]
        return replace(work, flops=np.where(work.attends, work.flops, work.flops / 2), weights=work.weights / 2)

    def flops(self, row: Mapping[str, str]) -> float | None:
        """FLOPs of the row's denoiser, all ranks together."""
        if not self.known(row):
            return None
        work = self.denoisers[workloads.key(row)]
        return work.total_flops * int(row["steps"]) * (1 if _batched(work, row) else int(row["calls"]))


def _fast(row: Mapping[str, str]) -> bool:
    """Whether the row ran FlashAttention-3, where that is faster."""
    note = row["note"].lower()
    said = "flashattention 3" in note or "flash attention 3" in note
    return row["device"] in FA3 and (said or (row["stack"] in FA3_STACKS and "sdpa" not in note))


def _batched(work: Workload, row: Mapping[str, str]) -> bool:
    return workloads.key(row).split()[-1] != "1"


def _once(work: Workload, box: Topology, host: float) -> float:
    return _call(work, Plan(ulysses=1), box, "eager", host)


@lru_cache(maxsize=1 << 17)
def _call(work: Workload, plan: Plan, box: Topology, lowering: str, host: float) -> float:
    return predict(work, plan, box, lowering, host).seconds


@cache
def _text(parameters: float, tokens: int) -> Workload:
    """A text encoder: equal products over its parameters, their weights read, and a few kernels beside each."""
    count = _LAYERS * _PRODUCTS
    one = np.ones(1)
    return Workload(
        attentions=(), flops=one * 2 * parameters * tokens / count, activations=one * 0,
        weights=one * 2 * parameters / count, carries=one < 0, launches=5 * count, outputs=0,
        parameters=int(2 * parameters), peak=0, rows=1, batch=1, counts=one * count,
    )  # fmt: skip
