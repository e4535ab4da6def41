"""``python -m benchmarks.launches``: how many kernels a step of a rank has, counted in the code for a GPU.

FLUX.1 at its own width (4096 + 512 tokens, bf16, fake tensors), on one device and as rank 0 of 8. No GPU is needed and
none is measured: see ``benchmarks/gpu_code.py``. With fewer blocks than FLUX.1 has (``--layers``, ``--single``) the
counts are those blocks' and what stands around them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

PLANS = ("gather=1", "ulysses=8", "ulysses=8,fp8(qvo)", "ring=8", "ring=8,fp8(kv)", "ulysses=4,ring=2",
         "torus=2,ulysses=4", "gather=8", "tp=8")  # fmt: skip


def measure(captured: Any, plan: str) -> dict[str, Any]:
    from benchmarks.gpu_code import code_of_plan

    code = code_of_plan(captured, plan)
    kinds = {"products": ("mm", "addmm", "bmm"), "attentions": ("attention", "attention_lse")}
    named = {name.removesuffix(".default").split(".")[-1]: n for name, n in code.operators.items()}
    row: dict[str, Any] = {"plan": plan, "kernels": sum(code.kernels.values()), "megabytes": code.bytes / 1e6}
    row |= {kind: sum(named.get(name, 0) for name in names) for kind, names in kinds.items()}
    row["collectives"] = sum(n for name, n in code.operators.items() if "c10d" in name and "wait" not in name)
    row["our kernels"] = sum(n for name, n in code.operators.items() if "fastpar_kernels" in name)
    row["overwritten"] = code.overwritten
    row["longest"] = dict(code.kernels.most_common(8))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", nargs="+", default=list(PLANS))
    parser.add_argument("--layers", type=int, default=2, help="blocks of two streams")
    parser.add_argument("--single", type=int, default=2, help="blocks of one stream")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    import fastpar
    from benchmarks.real_size import flux

    captured = fastpar.capture(*flux(args.layers, args.single, 4096, 512)).programs[0].program
    names = ("kernels", "megabytes", "our kernels", "products", "attentions", "collectives")
    print(f"{'plan':22}" + "".join(f"{name:>12}" for name in names))
    rows = []
    for plan in args.plans:
        rows.append(measure(captured, plan))
        print(f"{plan:22}" + "".join(f"{rows[-1][name]:12.0f}" for name in names), flush=True)
    if args.out:
        from fastpar.core.record import write

        write(args.out, {"blocks": [args.layers, args.single], "plans": rows})


if __name__ == "__main__":
    main()
