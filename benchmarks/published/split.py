"""Which published rows constants may be fitted to: a third, by a hash of the row's id, fixed before any fit."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any

ROWS = Path(__file__).with_name("rows.csv")
RATIOS = Path(__file__).with_name("ratios.csv")


def may_fit(row: str) -> bool:
    """Whether the row of this id is one of the third to fit to; all others are only ever predicted."""
    return int.from_bytes(hashlib.sha256(row.encode()).digest()[:8], "big") % 3 == 0


def read(path: Path = ROWS) -> list[dict[str, Any]]:
    """Rows as they stand in the file, as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
