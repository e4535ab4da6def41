"""``python -m fastpar.cli``."""

from __future__ import annotations

from fastpar.cli.main import app

# The guard matters: the processes that `demo` launches import this file again, under another name.
if __name__ == "__main__":
    app(prog_name="fastpar")
