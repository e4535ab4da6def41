"""``pack`` and ``unpack`` as a few views and copies, however many peers there are: what Inductor gets to lower.

Box by box a message to N peers is a concatenation of N pieces of every tensor in it, and Inductor writes a kernel for
each piece of a long concatenation: more than a hundred launches for one attention on 8 ranks. But boxes repeat: what
goes to the next peer is, mostly, the same boxes a step further along one dimension. Such a *run* of N peers is one
view: the dimension is cut in N, and the cut comes first.

    x [B, S, 24, D], 8 peers, 3 heads each:  [B, S, 24, D] -> [B, S, 8, 3, D] -> [8, B, S, 3, D] -> 1-D

So the message is one copy, or is written by what computes ``x``. Shares that differ by a row are two runs. Meaning,
bit for bit: ``pack_boxes`` and ``unpack_boxes``, but what comes out may be a view of what went in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastpar.ops.collectives import Piece, Tile, assemble, block, decode, dtypes_named, flat_bytes, shapes_of

_STAYS, _ELSEWHERE = -1, -2


@dataclass(frozen=True)
class Run:
    """``count`` times these boxes, each time a step further: box j moves along dimension ``steps[j]`` by its own size.

    A step of -1: it is the same box every time.
    """

    count: int
    boxes: tuple[Piece, ...]
    steps: tuple[int, ...]


def runs(boxes: Sequence[Piece]) -> list[Run]:
    """A list of boxes as few runs: from the first box that is left, each time the run that covers most."""
    places: dict[Piece, list[int]] = {}
    for i, box in enumerate(boxes):
        places.setdefault(box, []).append(i)
    found: list[Run] = []
    i = 0
    while i < len(boxes):
        best = Run(1, (boxes[i],), (_STAYS,))
        # only where the same box, or the one behind it, comes again can a run come round
        again = sorted(k for box in _following(boxes[i]) for k in places.get(box, ()) if k > i)
        for k in again:
            best = max(best, _run(boxes, i, k - i), key=_covered)
            if _covered(best) == len(boxes) - i:
                break
        found.append(best)
        i += _covered(best)
    return found


def _following(box: Piece) -> list[Piece]:
    """The box itself, and the box next to it along each dimension."""
    lane, starts, sizes = box
    moved = [tuple(s + n * (k == d) for k, (s, n) in enumerate(zip(starts, sizes, strict=True)))
             for d in range(len(sizes))]  # fmt: skip
    return [(lane, at, sizes) for at in dict.fromkeys([starts, *moved])]


def _covered(run: Run) -> int:
    return run.count * len(run.boxes) if run.count > 1 else 1


def _run(boxes: Sequence[Piece], i: int, length: int) -> Run:
    """The longest run of ``length`` boxes that begins at ``i``."""
    first, steps = boxes[i : i + length], [_ELSEWHERE] * length
    count = 1
    while i + (count + 1) * length <= len(boxes):
        for j, box in enumerate(first):
            step = _step(box, boxes[i + count * length + j], count)
            if step == _ELSEWHERE or (count > 1 and step != steps[j]):
                return Run(count, tuple(first), tuple(steps))
            steps[j] = step
        count += 1
    return Run(count, tuple(first), tuple(steps))


def _step(first: Piece, box: Piece, count: int) -> int:
    """The dimension along which ``box`` is ``first`` moved by ``count`` times its size."""
    if first[0] != box[0] or first[2] != box[2]:
        return _ELSEWHERE
    moved = [d for d, (a, b) in enumerate(zip(first[1], box[1], strict=True)) if a != b]
    if not moved:
        return _STAYS
    d = moved[0]
    return d if len(moved) == 1 and box[1][d] - first[1][d] == count * first[2][d] else _ELSEWHERE


def pieces(flat: Sequence[int]) -> int:
    """Of how many views a message with these boxes is put together."""
    return sum(len(run.boxes) for run in runs(decode(flat)))


def _cut(x: torch.Tensor, box: Piece, step: int, count: int) -> torch.Tensor:
    """A view ``[count, *sizes]``: the box, and again after each step."""
    _, starts, sizes = box
    if step == _STAYS:
        return block(x, starts, sizes).expand(count, *sizes)
    long = [n * count if d == step else n for d, n in enumerate(sizes)]
    return block(x, starts, long).unflatten(step, (count, sizes[step])).movedim(step, 0)


def pack_folded(xs: Sequence[torch.Tensor], flat: Sequence[int]) -> torch.Tensor:
    """``fastpar::pack`` of ``xs``."""
    mixed = len({x.dtype for x in xs}) > 1
    found = []
    for run in runs(decode(flat)):
        cut = [_cut(xs[box[0]], box, step, run.count) for box, step in zip(run.boxes, run.steps, strict=True)]
        if mixed:
            rows = [flat_bytes(c).view(run.count, -1) for c in cut]
        else:
            rows = [c.reshape(run.count, -1) for c in cut]
        found.append((torch.cat(rows, 1) if len(rows) > 1 else rows[0]).reshape(-1))
    if not found:
        return xs[0].new_empty(0, dtype=torch.uint8 if mixed else None)
    return torch.cat(found) if len(found) > 1 else found[0]


def unpack_folded(
    buffer: torch.Tensor, shapes: Sequence[int], flat: Sequence[int], dtypes: str = ""
) -> list[torch.Tensor]:
    """``fastpar::unpack`` of ``buffer``; what arrives in one piece is a view of it."""
    kinds = dtypes_named(dtypes)
    tiles: list[list[Tile[torch.Tensor]]] = [[] for _ in shapes_of(shapes)]
    offset = 0
    for run in runs(decode(flat)):
        sizes = [math.prod(box[2]) * (kinds[box[0]].itemsize if kinds else 1) for box in run.boxes]
        rows = buffer.narrow(0, offset, run.count * sum(sizes)).view(run.count, sum(sizes))
        offset += rows.numel()
        for box, step, row in zip(run.boxes, run.steps, rows.split(sizes, 1), strict=True):
            if kinds:  # a copy, since only what is aligned can be viewed as what it is
                row = row.clone(memory_format=torch.contiguous_format).view(kinds[box[0]])
            cut = row.unflatten(1, box[2]) if box[2] else row.squeeze(1)
            whole = cut.select(0, -1) if step == _STAYS else cut.movedim(0, step).flatten(step, step + 1)
            tiles[box[0]].append((box[1], tuple(whole.shape), whole))
    return [
        assemble(tile, torch.cat).contiguous() if tile else buffer.new_empty(shape, dtype=kinds[i] if kinds else None)
        for i, (tile, shape) in enumerate(zip(tiles, shapes_of(shapes), strict=True))
    ]
