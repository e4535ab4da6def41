"""fastpar's Triton kernels: equal to their references on fresh random rows, then against their byte floor.

The floor is what has to be read and written (docs/kernels.md), at the bandwidth of a copy of as many bytes that is
measured next to it. Small messages are also compared with the time of a copy of nothing, the floor of any launch.
Without a GPU the operators run their references, and rows say so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.part import Part, run
from benchmarks.gpu.timing import on_device
from fastpar.backends.kernels import copies, merge, normed, pack_quantized, table, unpack_dequantized
from fastpar.core.transfer import Box
from fastpar.ops.collectives import encode, pack_boxes, unpack_boxes

RANKS, HEADS, WIDTH = 8, 24, 128
TOKENS = {
    "full": {"FLUX's message": 576, "64 MiB": 10923, "256 MiB": 43691},
    "short": {"FLUX's message": 576, "64 MiB": 10923},
    "tiny": {"tiny": 8},
}
"""Name -> tokens of a rank; of 24 heads of 128 in bf16 they have so many bytes. FLUX's are 4608 on 8 ranks."""


@dataclass(frozen=True)
class Case:
    """A kernel on some rows: the call, what it must equal, and the bytes that it has to read and write."""

    call: Callable[[], Any]
    reference: Callable[[], Any]
    floor: int
    exact: bool = True


def heads_to_ranks(lanes: int, tokens: int, width: int = WIDTH) -> list[int]:
    """The boxes of an exchange of heads: for every rank in turn its heads of each tensor, all tokens."""
    each = HEADS // RANKS
    boxes = []
    for rank in range(RANKS):
        start = (0, rank * each, 0, 0)
        boxes += [(lane, Box(start, start, (1, each, tokens, width))) for lane in range(lanes)]
    return encode(boxes, "src")


def rows(tokens: int, device: torch.device, count: int = 1) -> list[torch.Tensor]:
    """``count`` tensors [1, heads, tokens, width] of normal numbers, with the strides that projections give them."""
    return [
        torch.randn(1, tokens, HEADS, WIDTH, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(count)
    ]


def packing(tokens: int, device: torch.device) -> Case:
    xs, boxes = rows(tokens, device, 1), heads_to_ranks(1, tokens)
    made = table.make_table(boxes, [2], device)
    return Case(lambda: copies.pack_operator(xs, boxes, made), lambda: pack_boxes(xs, boxes), 4 * xs[0].numel())


def unpacking(tokens: int, device: torch.device) -> Case:
    (x,), boxes = rows(tokens, device), heads_to_ranks(1, tokens)
    buffer, shapes = x.reshape(-1), [4, *x.shape]
    made = table.make_table(boxes, [2], device)
    return Case(
        lambda: copies.unpack_operator(buffer, shapes, boxes, "", made),
        lambda: unpack_boxes(buffer, shapes, boxes),
        4 * x.numel(),
    )


def rounding(tokens: int, device: torch.device) -> Case:
    xs, boxes = rows(tokens, device, 1), heads_to_ranks(1, tokens, WIDTH + 4)
    made = table.make_table(boxes, [1], device)
    many = xs[0].numel() // WIDTH
    return Case(
        lambda: pack_quantized.pack_quantized_operator(xs, [True], boxes, made),
        lambda: pack_quantized.reference(xs, [True], boxes),
        many * (2 * WIDTH + WIDTH + 4),
    )


def widening(tokens: int, device: torch.device) -> Case:
    xs, boxes = rows(tokens, device, 1), heads_to_ranks(1, tokens, WIDTH + 4)
    buffer = pack_quantized.reference(xs, [True], boxes)
    shapes, many = [4, 1, HEADS, tokens, WIDTH + 4], xs[0].numel() // WIDTH
    made = table.make_table(boxes, [1], device)
    args = (buffer, shapes, boxes, "bfloat16", [True])
    return Case(
        lambda: unpack_dequantized.unpack_dequantized_operator(*args, made),
        lambda: unpack_dequantized.reference(*args),
        many * (WIDTH + 4 + 2 * WIDTH),
    )


def merging(tokens: int, device: torch.device) -> Case:
    x, y = rows(tokens, device, 2)
    a, b = (torch.randn(1, HEADS, tokens, device=device) for _ in range(2))
    many = x.numel() // WIDTH
    x = x.float()  # what was merged before
    floor = many * ((4 * WIDTH + 4) + (2 * WIDTH + 4) + (4 * WIDTH + 4))
    return Case(lambda: merge.merge(x, a, y, b), lambda: merge.reference(x, a, y, b), floor, exact=False)


def norming(tokens: int, device: torch.device) -> Case:
    """RMS norm and rotary embedding of queries, rounded to where they are sent from."""
    (x,), boxes = rows(tokens, device), heads_to_ranks(1, tokens, WIDTH)
    weight = torch.randn(WIDTH, device=device)
    cos, sin = (torch.randn(1, tokens, WIDTH, device=device) for _ in range(2))
    made = table.make_table(boxes, [2], device)
    out = torch.empty(2 * x.numel(), dtype=torch.uint8, device=device)
    chain = (weight, None, None, None, cos, sin, "rms", 1e-6, False)

    def call() -> torch.Tensor:
        normed.normed_(out, x, *chain, False, 0, boxes, [2], made)
        return out.view(torch.bfloat16)

    def reference() -> torch.Tensor:
        want = torch.empty_like(out)
        normed.reference(want, normed.chain(x, *chain), 0, boxes, [2])
        return want.view(torch.bfloat16)

    tables = 2 * tokens * WIDTH * 4
    return Case(call, reference, 4 * x.numel() + tables, exact=False)


KERNELS: dict[str, Callable[[int, torch.device], Case]] = {
    "pack_quantized": rounding,
    "unpack_dequantized": widening,
    "pack": packing,
    "unpack": unpacking,
    "merge": merging,
    "normed_": norming,
}


def equal(case: Case) -> float:
    """Largest difference over the largest value. Raises AssertionError where a kernel does not equal its reference."""
    worst = 0.0
    got, want = (torch.utils._pytree.tree_leaves(f()) for f in (case.call, case.reference))
    for a, b in zip(got, want, strict=True):
        if case.exact:
            assert a.dtype == b.dtype and torch.equal(a, b), "differs from its reference, which it should equal"
        off = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)
        worst = max(worst, float(off))
    assert worst <= 2**-7, f"is off by {worst:.1e} of the largest value, more than bf16's rounding"
    return worst


def measured(name: str, tokens: int, device: torch.device) -> dict[str, Any]:
    """Microseconds, bytes/s over the floor's bytes, and the share that this is of a copy's of as many bytes."""
    case = KERNELS[name](tokens, device)
    off = equal(case)
    source = torch.randn(case.floor // 4, device=device).view(torch.uint8)[: case.floor // 2]
    target = torch.empty_like(source)
    took = on_device(case.call, device)
    copied = on_device(lambda: target.copy_(source), device)
    (nothing,) = [torch.zeros(1, device=device)]
    floor = on_device(lambda: nothing.add_(1), device)
    found = {
        "us": 1e6 * took,
        "mb": case.floor / 1e6,
        "gb_per_s": case.floor / took / 1e9,
        "copy_gb_per_s": case.floor / copied / 1e9,
        "share_of_copy": copied / took,
        "launch_us": 1e6 * floor,
        "off": off,
    }
    return found if device.type == "cuda" else {**found, "runs": "its reference: there is no GPU"}


def body(part: Part) -> None:
    for size, tokens in TOKENS[part.size].items():
        for name in KERNELS:
            part.attempt(f"{name}, {size}", lambda name=name, tokens=tokens: measured(name, tokens, part.device))


if __name__ == "__main__":
    run(body)
