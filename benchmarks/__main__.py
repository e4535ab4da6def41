"""``python -m benchmarks``: every benchmark that runs without a GPU, each to ``benchmarks/results/<name>.json``.

``python -m benchmarks gpu`` is those that want one (``benchmarks/gpu/suite.py``), with options of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

COMMANDS = {
    "real_size": ["benchmarks.real_size", "--depths"],
    "plans": ["benchmarks.plans"],
    "exact_bytes": ["benchmarks.exact_bytes"],
    "passes": ["benchmarks.passes"],
    "hoist": ["benchmarks.hoist"],
    "published": ["benchmarks.published"],
    "verify_speed": ["benchmarks.verify_speed"],
    "quality": ["benchmarks.quality"],
    "launches": ["benchmarks.launches"],
    "peers": ["benchmarks.peers"],
}


def main() -> int:
    if sys.argv[1:2] == ["gpu"]:
        from benchmarks.gpu.suite import main as gpu

        return gpu(sys.argv[2:])
    folder = Path(__file__).parent / "results"
    failed = []
    for name in sys.argv[1:] or COMMANDS:
        if name not in COMMANDS:
            print(f"no benchmark {name!r}; there are {', '.join((*COMMANDS, 'gpu'))}", file=sys.stderr)
            return 2
        module, *options = COMMANDS[name]
        print(f"== {name}", flush=True)
        if subprocess.call([sys.executable, "-m", module, *options, "--out", str(folder / f"{name}.json")]):
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
