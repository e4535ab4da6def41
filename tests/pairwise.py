"""Small samples of large matrices: every pair of values of two factors, as far as the allowance goes, greedily."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")
Row = tuple[object, ...]
Pair = tuple[int, object, int, object]


def pairs(row: Row) -> set[Pair]:
    """All pairs of values in ``row``, with their positions."""
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}


def greedy(
    rows: Sequence[T],
    most: int,
    seed: int = 0,
    first: Iterable[T] = (),
    covers: Callable[[T], set[Pair]] = pairs,  # type: ignore[assignment]
) -> list[T]:
    """At most ``most`` of ``rows``, each the one that ``covers`` most that is new; fewer where nothing new is left.

    ``first`` are taken in any case. Ties are broken by chance, the same for the same ``seed``.
    """
    chosen = list(first)
    seen: set[Pair] = set().union(*map(covers, chosen))
    left = list(rows)
    random.Random(seed).shuffle(left)
    while len(chosen) < most:
        best = max(left, key=lambda row: len(covers(row) - seen))
        if not covers(best) - seen:
            break
        chosen.append(best)
        seen |= covers(best)
    return chosen
