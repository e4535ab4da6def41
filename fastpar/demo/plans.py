"""The plans that the demo shows when none is asked for."""

from __future__ import annotations

# One line per plan: its text, and the ranks that the text takes besides {n}. A plan is shown where that
# number divides the ranks: ("cfg=2,gather={n}", 2) is cfg=2,gather=2 on 4 ranks and nothing on 3.
TEMPLATES: tuple[tuple[str, int], ...] = (
    ("gather={n}", 1),
    ("gather={n},displaced", 1),
    ("ulysses={n}", 1),
    ("ring={n}", 1),
    ("ulysses={n},ring=2", 2),
    ("torus={n},ring=2", 2),
    ("cfg=2,ulysses={n}", 2),
    ("tp={n}", 1),
)


def available_plans(ranks: int) -> tuple[str, ...]:
    """Plan texts for ``ranks`` processes, in the order of the table. Raises ``ValueError`` below one rank."""
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, not {ranks}")
    return tuple(text.format(n=ranks // taken) for text, taken in TEMPLATES if ranks % taken == 0)
