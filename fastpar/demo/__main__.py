"""``python -m fastpar.demo``."""

from __future__ import annotations

import typer

from fastpar.demo.main import demo

# The guard matters: the launched processes import this file again, under another name.
if __name__ == "__main__":
    typer.run(demo)
