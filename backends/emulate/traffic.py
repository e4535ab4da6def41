"""Who sends how much to whom in a collective: the messages that links are asked to carry.

Members of a group are numbered from 0; messages are (from, to, bytes), three arrays of one length. Gathers and sums go
round the group from neighbour to neighbour, as NCCL's rings do; an all-to-all sends from each member to each. One
process knows its own part only, and programs are the same on all ranks: so others are taken to do what this rank does,
turned by their place in the group, and all groups that lie in the world as this one does are busy at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Messages = tuple[np.ndarray, np.ndarray, np.ndarray]


def ring(members: int, size: float) -> Messages:
    """Every member passes ``size`` bytes on to the next one; nothing where there is one member."""
    sizes = [0.0] * members
    if members > 1:
        sizes[1] = size
    return shifts(sizes)


def shifts(sizes: Sequence[float]) -> Messages:
    """Every member sends ``sizes[d]`` bytes to the member d places on; there are as many members as sizes."""
    members = len(sizes)
    used = np.flatnonzero(np.asarray(sizes))
    src = np.repeat(np.arange(members), len(used))
    dst = (src + np.tile(used, members)) % members
    return src, dst, np.tile(np.asarray(sizes, np.float64)[used], members)


def rooted(members: int, root: int, size: float, to_root: bool) -> Messages:
    """Every other member sends ``size`` bytes to ``root`` (``to_root``), or gets them from there."""
    others = np.array([m for m in range(members) if m != root], dtype=np.int64)
    roots = np.full(len(others), root)
    ends = (others, roots) if to_root else (roots, others)
    return *ends, np.full(len(others), float(size))


def joined(several: Sequence[Messages]) -> Messages:
    """Messages that are under way at once."""
    src, dst, size = (np.concatenate(arrays) for arrays in zip(*several, strict=True))
    return src, dst, size


def sisters(group: Sequence[int], ranks: int) -> list[tuple[int, ...]]:
    """The groups that lie in a world of so many ranks as ``group`` does, itself among them.

    Groups along axes of a mesh are each other's translations and fill the world; then these are the answer. Where
    translations do not fill it, the group is alone.
    """
    first, found, seen = min(group), list[tuple[int, ...]](), set[int]()
    for rank in range(ranks):
        if rank not in seen:
            moved = tuple(member + rank - first for member in group)
            if max(moved) >= ranks or seen.intersection(moved):
                return [tuple(group)]
            found.append(moved)
            seen.update(moved)
    return found if tuple(group) in found else [tuple(group)]


def everywhere(messages: Messages, groups: Sequence[Sequence[int]]) -> Messages:
    """The messages of one group as those of several, between ranks of the world."""
    src, dst, size = messages
    places = np.asarray(groups, dtype=np.int64)
    return places[:, src].reshape(-1), places[:, dst].reshape(-1), np.tile(size, len(places))
