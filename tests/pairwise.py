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
    rows: Sequence[T], most: int, seed: int = 0, first: Iterable[T] = (), key: Callable[[T], Row] = lambda row: row
) -> list[T]:
    """At most ``most`` of ``rows``, each the one with most new pairs; fewer where nothing new is left.

    ``first`` are taken in any case. Ties are broken by chance, the same for the same ``seed``.
    """
    chosen = list(first)
    seen: set[Pair] = set().union(*(pairs(key(row)) for row in chosen))
    left = list(rows)
    random.Random(seed).shuffle(left)
    while len(chosen) < most:
        best = max(left, key=lambda row: len(pairs(key(row)) - seen))
        if not pairs(key(best)) - seen:
            break
        chosen.append(best)
        seen |= pairs(key(best))
    return chosen
