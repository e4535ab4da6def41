"""The version, where every module may read it, and the exact state of the source, which changes more often."""

from __future__ import annotations

import functools
import hashlib
from importlib.util import find_spec
from pathlib import Path

VERSION = "0.1.0"
PACKAGES = ("fastpar", "fastpar.passes", "fastpar.backends")  # in a checkout these are three folders


@functools.cache
def source_hash() -> str:
    """Hash of this package's source: what one state of it compiled, another does not take for its own."""
    digest = hashlib.sha256()
    for name in PACKAGES:
        for root in map(Path, _folders(name)):
            for path in sorted(root.rglob("*.py")):
                digest.update(f"{name}/{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _folders(package: str) -> list[str]:
    found = find_spec(package)  # does not import it, so that the lowest floor knows no other
    return sorted(found.submodule_search_locations or ()) if found else []
