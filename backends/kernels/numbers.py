"""Numbers inside kernels: 16-bit floats, e4m3, and the rows of a box.

Rounding is written in integers throughout, for two reasons. Triton's interpreter truncates where hardware rounds to
the nearest (to bfloat16, and to e4m3 whatever rounding is asked for), so a kernel that used its conversions could not
be held against the reference bit for bit. And GPUs before sm_89 have no conversion to e4m3 at all.
"""

from __future__ import annotations

from fastpar.backends.kernels.launch import jit, tl


@jit
def widen(x):
    """Float32 of a float32, float16 or bfloat16."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@jit
def narrow(x, kind: tl.constexpr):
    """``kind`` of a float32, to the nearest, ties to even."""
    if kind == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        low = tl.where(x == x, upper, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        low = x.to(kind)
    return low


@jit
def to_e4m3(x):
    """Bytes of a float32 that is at most 448 in magnitude or NaN, to the nearest, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    # 20 bits of mantissa go; the exponent's bias is 7 in place of 127
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6 a unit is 2^-9, the last place of 2^14: adding that rounds
    shifted = size.to(tl.float32, bitcast=True) + 16384.0
    small = shifted.to(tl.uint32, bitcast=True) & 0xF
    code = tl.where(size < (121 << 23), small, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | sign).to(tl.uint8)


@jit
def from_e4m3(code):
    """Float32 of bytes."""
    code = code.to(tl.uint32)
    size = code & 0x7F
    normal = (size << 20) + (120 << 23)
    small = (size.to(tl.float32) * 0.001953125).to(tl.uint32, bitcast=True)  # 2^-9
    bits = tl.where(size < 8, small, normal)
    bits = tl.where(size == 0x7F, 0x7FC00000, bits)
    return (bits | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@jit
def scale_of(x):
    """Scale of each row of ``x [rows, columns]``, as ``fastpar.ops.quantize`` has it."""
    size = tl.abs(x)
    largest = tl.max(tl.where(size < float("inf"), size, 0.0), axis=1)
    scale = tl.maximum(tl.div_rn(largest, 448.0), 1.1754943508222875e-38)
    return tl.where(largest == 0, 0.0, scale)


@jit
def store_quantized(out, x, row, col, keep, WIDTH: tl.constexpr):
    """Writes rows ``x [rows, columns]`` (0 where masked) as ``WIDTH`` bytes and a scale, row ``row`` of ``out``."""
    scale = scale_of(x)
    units = tl.div_rn(x, tl.where(scale == 0, 1.0, scale)[:, None])
    finite = tl.abs(x) < float("inf")
    units = tl.where(finite, tl.minimum(tl.maximum(units, -448.0), 448.0), float("nan"))
    there = out + row * (WIDTH + 4)
    tl.store(there[:, None] + col[None, :], to_e4m3(units), mask=keep[:, None] & (col < WIDTH)[None, :])
    # byte by byte, since rows need not start at multiples of four
    byte = tl.arange(0, 4)
    parts = scale.to(tl.uint32, bitcast=True)[:, None] >> (8 * byte)[None, :].to(tl.uint32)
    tl.store(there[:, None] + WIDTH + byte[None, :], (parts & 0xFF).to(tl.uint8), mask=keep[:, None])


@jit
def load_quantized(here, step, col, keep, WIDTH: tl.constexpr):
    """Float32 of rows that begin at ``here``: ``WIDTH`` bytes and a scale each, bytes ``step`` apart."""
    mask = keep[:, None] & (col < WIDTH)[None, :]
    scale = tl.load(here + WIDTH * step, mask=keep, other=0).to(tl.uint32)
    for byte in tl.static_range(1, 4):
        scale = scale | (tl.load(here + (WIDTH + byte) * step, mask=keep, other=0).to(tl.uint32) << (8 * byte))
    units = from_e4m3(tl.load(here[:, None] + (col * step)[None, :], mask=mask, other=0))
    return units * scale.to(tl.float32, bitcast=True)[:, None]


@jit
def rows_of(first, a, b, c, size, m, n, ROWS: tl.constexpr):
    """Rows ``first`` and on of a box of ``size x m x n`` rows that starts at ``a, b, c``.

    Their numbers, indices in three dimensions, and which there are. Takes numbers and not the table: torch, which
    looks through calls at what an address depends on, would take the table for written to.
    """
    row = first + tl.arange(0, ROWS).to(tl.int64)
    keep = row < size * m * n
    m, n = tl.maximum(m, 1), tl.maximum(n, 1)
    return row, a + row // (m * n), b + row // n % m, c + row % n, keep
