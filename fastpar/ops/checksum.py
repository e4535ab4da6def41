"""``fastpar::checksums``: numbers that tell whether tensors still have the same bits, computed where they are.

Values are taken as integers, stirred so that every bit (a sign is one) reaches the middle ones, multiplied by an odd
number that depends on the place, and summed modulo 2^64. One changed word always changes the sum; changes of several
(elements that swapped places, signs, rows that were permuted) cancel with a chance of about 2^-60, for the
multipliers of different places have no pattern. On a GPU one Triton kernel takes all of them
(``fastpar.backends.kernels.checksums``), and gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

_LIB = torch.library.Library("fastpar", "FRAGMENT")
_LIB.define("checksums(Tensor[] xs) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))

STIR, STEP, ROW = -7046029254386353131, -4658895280553007687, -7723592293110705685  # odd, no pattern in their bits
COLUMNS = 1 << 12
LANES = 8
"""Tensors that one kernel takes, where there are kernels."""
_CHUNK = {"cpu": 1 << 15}  # words at a time: so few that a core keeps them in its cache
_LARGE_CHUNK = 1 << 24
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum_of(x: torch.Tensor) -> torch.Tensor:
    """The checksum of ``x`` as a 0-d int64 tensor on its device; nothing waits for the device."""
    words = words_of(x.detach())
    size = _CHUNK.get(x.device.type, _LARGE_CHUNK)
    columns, sums = _places(x.device, STEP), []
    room = torch.empty((2, min(size, words.numel())), dtype=torch.int64, device=x.device)
    for start in range(0, words.numel(), size):
        part = _stirred(words[start : start + size].to(torch.int64), room)
        whole = len(part) // COLUMNS * COLUMNS
        if whole:
            sums.append(_products(part[:whole].view(-1, COLUMNS), columns))
        if whole < len(part):
            sums.append(_products(part[whole:].view(1, -1), columns[: len(part) - whole]))
    if not sums:
        return torch.zeros((), dtype=torch.int64, device=x.device)
    rows, known = torch.cat(sums), _places(x.device, ROW)
    few = len(rows) <= len(known)
    return (rows * (known[: len(rows)] if few else odd(torch.arange(len(rows), device=x.device), ROW))).sum()


@lru_cache(maxsize=16)
def _places(device: torch.device, step: int) -> torch.Tensor:
    """Odd numbers for the first places; kept, for it takes longer to make them than to sum a small tensor."""
    with torch.inference_mode(False):
        return odd(torch.arange(COLUMNS, device=device), step)


def _products(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Sum of each row times ``columns``."""
    if rows.device.type == "cpu":
        return torch.mv(rows, columns)
    return (rows * columns).sum(1)  # elsewhere there are no products of integer matrices


def _stirred(words: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """int64 to int64, one to one: high bits reach low ones. In ``room``, for new memory takes longer than the work."""
    stirred, high = room[:, : len(words)]
    torch.mul(words, STIR, out=stirred)
    return stirred.bitwise_xor_(torch.bitwise_right_shift(stirred, 32, out=high))


def odd(place: torch.Tensor, step: int) -> torch.Tensor:
    """An odd number for every place (int64), without a pattern between neighbours (after SplitMix64)."""
    mixed = (place + 1) * step
    mixed = (mixed ^ (mixed >> 29)) * STIR
    return (mixed ^ (mixed >> 32)) | 1


def words_of(x: torch.Tensor) -> torch.Tensor:
    """All bits of ``x``, in the order of memory, as the widest integers that fit; no copy unless there are gaps."""
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    x = x.resolve_neg()
    if _dense(x):
        x = x.as_strided((x.numel(),), (1,))
    else:
        x = x.contiguous().view(-1)
    size = x.numel() * x.element_size()
    start = x.storage_offset() * x.element_size()
    for width in (8, 4, 2, 1):
        if size % width == 0 and start % width == 0:
            break
    return x.view(torch.uint8).view(_INTEGERS[width])


def _dense(x: torch.Tensor) -> bool:
    """Whether elements fill their memory without gaps or overlaps, in whatever order."""
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != extent:
            return False
        extent *= size
    return True


def _checksums(xs: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([checksum_of(x) for x in xs])


_LIB.impl("checksums", _checksums, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastpar::checksums", lambda xs: xs[0].new_empty((len(xs),), dtype=torch.int64), lib=_LIB
)

checksums = torch.ops.fastpar.checksums.default
"""From tensors of one device to int64 ``[tensors]``."""
