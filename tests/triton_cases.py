"""What every Triton kernel must do, case by case: random shapes, strides, dtypes, tails and values, all of them
held against the torch reference. ``python -m tests.triton_cases COUNT NAME...`` runs some kernels' cases in Triton's
interpreter, which has to be chosen before Triton is imported; on a GPU the same functions run in the test's process.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Sequence
from itertools import product

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 2, 3, 4, 8, 13, 16, 17, 32, 40)


def strided(rng: random.Random, shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Numbers of widely different magnitude in some layout: permuted, with gaps, from an odd place, or expanded."""
    order = rng.sample(range(len(shape)), len(shape))
    pads = [rng.choice((0, 0, 1, 3)) for _ in shape]
    base = values(rng, [shape[d] + pads[d] for d in order], dtype)
    x = base.permute([order.index(d) for d in range(len(shape))])
    for d, size in enumerate(shape):
        x = x.narrow(d, rng.randint(0, pads[d]), size)
    if device != "cpu":
        x = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).copy_(x)
    if rng.random() < 0.15 and shape[0] > 1:
        x = x[:1].expand(shape)
    return x


def values(rng: random.Random, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
    if not dtype.is_floating_point:
        return (x * 1000).to(dtype)
    return (x * 10.0 ** rng.uniform(-3, 3)).to(dtype)


def spoil(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    """Rows of zeros, of very large and very small numbers, and some that are not finite; in the layout of ``x``."""
    y = x.clone() if min(x.stride(), default=1) > 0 else x.contiguous()
    if not y.numel():
        return y
    info = torch.finfo(x.dtype)
    inf, least = float("inf"), info.smallest_normal
    bad = (0.0, -0.0, float("nan"), inf, -inf, info.max, -info.max, least, least / 4)
    for _ in range(6):
        at = tuple(rng.randrange(n) for n in y.shape)
        where = at[:-1] if rng.random() < 0.4 else at
        y[where] = rng.choice(bad)
    row = tuple(rng.randrange(n) for n in y.shape[:-1])
    y[row] = (y[row].float() * 10.0 ** rng.choice((-42, -38, -20, 3, 30))).to(x.dtype)
    return y


def cut(rng: random.Random, size: int) -> list[tuple[int, int]]:
    """A dimension in parts (start, size), an empty one among them now and then."""
    at = sorted(rng.randint(0, size) for _ in range(rng.choice((0, 0, 0, 1, 2))))
    return [(a, b - a) for a, b in zip([0, *at], [*at, size], strict=True)]


def grid(rng: random.Random, shapes: Sequence[Sequence[int]], whole_rows: bool, empty: bool = True) -> list[int]:
    """Boxes that cover the tensors, those of several in any order; ``empty`` ones too."""
    from fastpar.core.transfer import Box
    from fastpar.ops.collectives import encode

    boxes = []
    for lane, shape in enumerate(shapes):
        cuts = [[(0, n)] if whole_rows and d == len(shape) - 1 else cut(rng, n) for d, n in enumerate(shape)]
        for cell in product(*cuts):
            start = tuple(s for s, _ in cell)
            box = Box(start, start, tuple(n for _, n in cell))
            if empty or box.numel:
                boxes.append((lane, box))
    rng.shuffle(boxes)
    return encode(boxes, "src")


def shape_of(rng: random.Random, rank: int, width: int | None = None) -> list[int]:
    sizes = [rng.choice((0, 1, 2, 3)) if rng.random() < 0.1 else rng.randint(1, 3) for _ in range(rank - 1)]
    if sizes:
        sizes[-1] = rng.choice((1, 2, 7, 33, 130))
    return [*sizes, rng.choice(WIDTHS) if width is None else width]


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Bit for bit; NaN is NaN."""
    assert got.shape == want.shape and got.dtype == want.dtype and got.device == want.device
    if want.dtype.is_floating_point:
        assert torch.equal(got.isnan(), want.isnan())
        got, want = got.nan_to_num(), want.nan_to_num()
        assert torch.equal(torch.signbit(got), torch.signbit(want))
    assert torch.equal(got, want), (got != want).nonzero()[:5]


def near(got: torch.Tensor, want: torch.Tensor, off: float, least: float = 1e-30) -> None:
    """Within ``off`` of the largest number of the row, or of ``least``, and NaN and infinities in the same places."""
    assert got.shape == want.shape and got.dtype == want.dtype
    got, want = got.double(), want.double()
    assert torch.equal(got.isfinite(), want.isfinite()) and torch.equal(got.isnan(), want.isnan())
    got, want = got.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0)
    if want.numel():
        worst = ((got - want).abs() / want.abs().amax(-1, keepdim=True).clamp_min(least)).max()
        assert float(worst) <= off, float(worst)


def copies(rng: random.Random, device: str) -> None:
    from fastpar.backends.kernels import copies as k
    from fastpar.backends.kernels.table import make_table
    from fastpar.ops.collectives import names_of, pack_boxes, unpack_boxes

    dtypes = [*FLOATS, torch.float64, torch.uint8, torch.int64, torch.int32, torch.int16]
    one = rng.choice(dtypes)
    kinds = [rng.choice(dtypes) if rng.random() < 0.7 else one for _ in range(rng.randint(1, 6))]
    if rng.random() < 0.4:
        kinds = [one] * len(kinds)
    shapes = [shape_of(rng, rng.randint(1, 4)) for _ in kinds]
    if rng.random() < 0.3:  # wider than what a program takes at once
        shapes, kinds = [[2, 700 if kinds[0].itemsize > 2 else 2100]], kinds[:1]
    xs = [strided(rng, shape, d, device) for shape, d in zip(shapes, kinds, strict=True)]
    boxes = grid(rng, [x.shape for x in xs], rng.random() < 0.5)
    table = make_table(boxes, [x.element_size() for x in xs], device)
    want = pack_boxes(xs, boxes)
    buffer = k.launch_pack(xs, boxes, table)
    same(buffer.view(torch.uint8), want.view(torch.uint8))
    flat = [n for x in xs for n in (x.dim(), *x.shape)]
    mixed = [x.dtype for x in xs] if len({x.dtype for x in xs}) > 1 else []
    boxes = grid(rng, [x.shape for x in xs], rng.random() < 0.5, empty=False)
    table = make_table(boxes, [x.element_size() for x in xs], device)
    buffer = pack_boxes(xs, boxes)
    back = k.launch_unpack(buffer, flat, boxes, names_of(mixed), table)
    for y, x, ref in zip(back, xs, unpack_boxes(buffer, flat, boxes, names_of(mixed)), strict=True):
        same(y, x)
        same(y, ref)


def pack_quantized(rng: random.Random, device: str) -> None:
    from fastpar.backends.kernels import pack_quantized as k
    from fastpar.backends.kernels.table import make_table

    kind, width = rng.choice(FLOATS), rng.choice(WIDTHS)
    n = rng.randint(1, 5)
    rounded = [True] + [rng.random() < 0.7 for _ in range(n - 1)]
    xs = []
    for is_rounded in rounded:
        shape = shape_of(rng, rng.randint(1, 4), width if rng.random() < 0.8 else None)
        x = strided(rng, shape, kind if rng.random() < 0.8 else rng.choice(FLOATS), device)
        xs.append(spoil(rng, x) if is_rounded and rng.random() < 0.7 else x)
    shapes = [[*x.shape[:-1], x.shape[-1] + 4] if r else list(x.shape) for x, r in zip(xs, rounded, strict=True)]
    boxes = grid(rng, shapes, True)
    table = make_table(boxes, k.sizes_of(xs, rounded), device)
    same(k.launch(xs, rounded, boxes, table), k.reference(xs, rounded, boxes))


def unpack_dequantized(rng: random.Random, device: str) -> None:
    from fastpar.backends.kernels import pack_quantized as there
    from fastpar.backends.kernels import unpack_dequantized as k
    from fastpar.backends.kernels.table import make_table
    from fastpar.ops.collectives import names_of

    kind, width = rng.choice(FLOATS), rng.choice(WIDTHS)
    rounded = [True] + [rng.random() < 0.7 for _ in range(rng.randint(0, 4))]
    dtypes = [kind if rng.random() < 0.8 else rng.choice(FLOATS) for _ in rounded]
    xs = [
        spoil(rng, values(rng, shape_of(rng, rng.randint(1, 4), width if rng.random() < 0.8 else None), d))
        for d in dtypes
    ]
    sent = [[*x.shape[:-1], x.shape[-1] + 4] if r else list(x.shape) for x, r in zip(xs, rounded, strict=True)]
    boxes = grid(rng, sent, True, empty=False)
    buffer = there.reference(xs, rounded, boxes)
    if rng.random() < 0.4:  # any bytes, NaN and infinite scales among them
        buffer = torch.randint(0, 256, buffer.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    buffer = buffer.to(device)
    shapes = [n for s in sent for n in (len(s), *s)]
    table = make_table(boxes, k.sizes_of(dtypes, rounded), device)
    got = k.launch(buffer, shapes, boxes, names_of(dtypes), rounded, table)
    for y, ref in zip(got, k.reference(buffer, shapes, boxes, names_of(dtypes), rounded), strict=True):
        same(y, ref)


def codes(rng: random.Random, device: str) -> None:
    """Every number that e4m3 has, every tie between two, and their neighbours; and back from every byte."""
    from fastpar.backends.kernels import pack_quantized as there
    from fastpar.backends.kernels import unpack_dequantized as back
    from fastpar.backends.kernels.table import make_table
    from fastpar.ops.quantize import quantize

    if rng.random() < 0.5:
        scale = torch.tensor([rng.choice((1.0, 2.0**-120, 0.37, float("inf"), float("nan"), 1e38, 0.0))])
        row = torch.cat([torch.arange(256, dtype=torch.uint8), scale.view(torch.uint8)]).to(device)
        dtype = rng.choice(("float32", "bfloat16", "float16"))
        args = ([1, 260], [0, 1, 0, 260], dtype, [True])
        table = make_table(args[1], [1], device)
        same(back.launch(row, *args, table)[0], back.reference(row, *args)[0])
        return
    exact = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448
    ties = (exact[1:] + exact[:-1]) / 2
    near_ties = [torch.nextafter(ties, torch.tensor(to)) for to in (0.0, 500.0)]
    row = torch.cat([exact, ties, *near_ties])
    x = (torch.stack([row, -row]) * rng.choice((1.0, 2.0**20, 2.0**-100, 0.3))).to(device)
    boxes = [0, 2, 0, 0, *x.shape[:-1], x.shape[-1] + 4]
    table = make_table(boxes, [1], device)
    same(there.launch([x], [True], boxes, table), quantize(x).view(-1))


def rows(rng: random.Random, device: str) -> None:
    from fastpar.backends.kernels import rows as k
    from fastpar.ops.quantize import dequantize, quantize

    dtype = rng.choice(FLOATS)
    x = spoil(rng, strided(rng, shape_of(rng, rng.randint(1, 4)), dtype, device))
    want = quantize(x)
    got = k.launch_quantize(x) if x.shape[-1] else want
    same(got, want)
    laid = want.transpose(0, -1).contiguous().transpose(0, -1) if rng.random() < 0.5 else want
    if x.shape[-1]:
        same(k.launch_dequantize(laid, dtype), dequantize(want, dtype))


def merge(rng: random.Random, device: str) -> None:
    from fastpar.backends.kernels import merge as k

    dtype = rng.choice((*FLOATS, torch.float64))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = shape_of(rng, rng.randint(2, 4))
    size = rng.choice((1.0, 30.0, 1e4))
    pairs = []
    for kind in (rng.choice((dtype, wide)), dtype):  # what was merged before is wide, a block comes as it is computed
        x = strided(rng, shape, kind, device)
        lse = strided(rng, shape[:-1], wide, device)
        lse = lse / lse.abs().max().clamp_min(1e-3) * size if lse.numel() else lse
        blind = torch.rand(lse.shape, generator=torch.Generator().manual_seed(rng.randrange(999))).to(device) < 0.3
        lse = lse.masked_fill(blind, -float("inf"))
        x = x.masked_fill(blind[..., None], 0)
        if rng.random() < 0.5:
            x, lse = x.mT.contiguous().mT, lse.transpose(0, -1).contiguous().transpose(0, -1)
        pairs += [x, lse]
    out, lse, block, block_lse = pairs
    if rng.random() < 0.3 and lse.numel():
        lse[tuple(rng.randrange(n) for n in lse.shape)] = rng.choice((float("nan"), float("inf")))
    if rng.random() < 0.3:
        block_lse = lse.clone()
    want, total = k.reference(out, lse, block, block_lse)
    off = 1e-13 if wide == torch.float64 else 3e-6
    new, new_lse = torch.full_like(out, 7, dtype=wide), torch.full_like(lse, 7)
    k.launch(out, lse, block, block_lse, (new, new_lse))
    near(new, want, off + (1e-6 if wide == torch.float32 else 0) * size)
    near(new_lse[..., None], total[..., None], 1e-6 if wide == torch.float32 else 1e-13, 1.0)
    blind = (lse == -float("inf")) & (block_lse == -float("inf"))
    assert not new[blind].any() and bool((new_lse[blind] == -float("inf")).all())
    k.launch(out, lse, block, block_lse, (out, lse))
    same(out, new.to(out.dtype))
    same(lse, new_lse)


def normed(rng: random.Random, device: str) -> None:
    from fastpar.backends.kernels import normed as k
    from fastpar.backends.kernels.table import make_table, tiles
    from fastpar.ops.quantize import dequantize, quantize

    dtype, norm, half = rng.choice(FLOATS), rng.choice(k.NORMS), rng.random() < 0.5
    shape = shape_of(rng, 4, 2 * rng.choice((1, 2, 3, 8, 20, 32)))
    b, _, s, d = shape
    rounded = rng.random() < 0.5
    x = strided(rng, shape, dtype, device)

    def maybe(*sizes: int, chance: float = 0.6) -> torch.Tensor | None:
        return values(rng, sizes, dtype).to(device).clamp(-30, 30) if rng.random() < chance else None

    weight, bias = maybe(d), maybe(d, chance=0.3)

    def some() -> tuple[int, int]:
        return rng.choice((1, b)), rng.choice((1, s))

    both = maybe(*some(), 2 * d)  # as models have them: parts of one projection
    scale, shift = both.chunk(2, -1) if both is not None else (None, None)
    if both is not None and rng.random() < 0.5:
        shift = maybe(*some(), d, chance=1)
    angles, others = (maybe(rng.choice((1, b)), s, d, chance=1) for _ in range(2))
    cos, sin = (angles.cos(), others.sin()) if rng.random() < 0.8 else (None, None)
    want = k.chain(x, weight, bias, scale, shift, cos, sin, norm, 1e-5, half)
    other = values(rng, [3, 5], dtype).to(device)  # something else in the same buffer
    lane = rng.randint(0, 1)
    shapes = [list(other.shape), [*shape[:-1], d + 4] if rounded else shape]
    sizes = [dtype.itemsize, 1 if rounded else dtype.itemsize]
    if lane == 0:
        shapes.reverse()
        sizes.reverse()
    boxes = grid(rng, shapes, True)
    table = make_table(boxes, sizes, device)
    length = sum(t.numel * sizes[t.lane] for t in tiles(boxes, sizes))
    out = torch.full((length,), 7, dtype=torch.uint8, device=device)
    out = out if rounded else out.view(dtype)
    ref = out.clone()
    args = (weight, bias, scale, shift, cos, sin, norm, 1e-5, half, rounded, lane, boxes, sizes, table)
    k.launch(out, x, *args)
    k.reference(ref, quantize(want) if rounded else want, lane, boxes, sizes)
    for t in tiles(boxes, sizes):
        part = slice(t.offset, t.offset + t.numel * sizes[t.lane])
        got, expected = out.view(torch.uint8)[part], ref.view(torch.uint8)[part]
        if t.lane != lane:
            assert bool((got == expected).all())  # left alone
        elif rounded and t.numel:
            got, expected = (dequantize(y.view(-1, d + 4), torch.float32) for y in (got, expected))
            near(got, expected, 2.0**-4 + 0.02)
            assert float((got != expected).float().mean()) < 0.2 or got.numel() < 100
        elif t.numel:
            off = {torch.float32: 3e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}[dtype]
            near(got.clone().view(dtype).view(-1, d), expected.clone().view(dtype).view(-1, d), off)


def checksums(rng: random.Random, device: str) -> None:
    from fastpar.backends.kernels.checksums import launch
    from fastpar.ops import checksum

    kinds = (*FLOATS, torch.int8, torch.int64, torch.bool, torch.float64)
    xs = [strided(rng, [rng.choice((1, 2, 3, 8, 70)) for _ in range(rng.randint(1, 3))], rng.choice(kinds), device)
          for _ in range(rng.choice((1, 2, 8, 9, 11)))]  # fmt: skip
    size = rng.choice((0, 4096, 4096 * 16 + 5, 4096 * 40))  # none; one row; more than one program's
    xs.insert(rng.randint(0, len(xs)), strided(rng, [size], rng.choice((torch.int64, torch.float32)), device))
    assert torch.equal(launch(xs), checksum.checksums(xs))


CASES: dict[str, Callable[[random.Random, str], None]] = {
    f.__name__: f for f in (copies, codes, pack_quantized, unpack_dequantized, rows, merge, normed, checksums)
}


def run(name: str, count: int, device: str) -> None:
    for seed in range(count):
        try:
            CASES[name](random.Random(seed), device)
        except BaseException:
            print(f"{name}: seed {seed} on {device}", file=sys.stderr)
            raise


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    import warnings

    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, of infinities and NaN that are meant
    for chosen in sys.argv[2:]:
        run(chosen, int(sys.argv[1]) * (2 if chosen == "normed" else 1), "cpu")  # it has the most forms
