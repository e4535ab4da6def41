"""Orders that Inductor gives to programs: ``torchrun --nproc-per-node=N -m tests.scripts.order PLAN...``.

Every rank prints a JSON line per plan: the order of the program that it lowered and that of the code which Inductor
generated, as letters (s starts a collective, w waits for one, p is a product while one is under way), for the plan's
pipeline and for the same without ``pin``; and how far the values are from eager's.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from fastpar.backends.inductor import compile_inductor
from fastpar.core.plan import Plan
from fastpar.graph.program import Program
from fastpar.plan.expand import pipeline_text
from fastpar.registry import LOWERINGS

KINDS = {"all_to_all_single": "s", "all_gather_into_tensor": "s", "all_reduce": "s", "wait_tensor": "w",
         "addmm": "p", "mm": "p"}  # fmt: skip
CALL = re.compile(r"(?:extern_kernels|torch\.ops\._c10d_functional)\.(\w+)(?:\.default)?\(")


class Parallel(nn.Module):
    """Two of FLUX's single blocks: attention beside an MLP, a wide one, that does not wait for it."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleList(nn.ModuleList(nn.Linear(width, width) for _ in range(3)) for _ in range(2))
        self.up, self.down = (nn.ModuleList(nn.Linear(*s) for _ in range(2)) for s in ((width, 256), (256, width)))

    def forward(self, x: Tensor) -> Tensor:
        for qkv, up, down in zip(self.qkv, self.up, self.down, strict=True):
            q, k, v = (F.normalize(one(x).unflatten(-1, (self.heads, -1)).transpose(1, 2), dim=-1) for one in qkv)
            x = x + down(F.gelu(up(x))) + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x


def letters(names: Iterable[str]) -> str:
    """What is kept in order, of the operators' names; products only while an exchange is under way."""
    out, under_way = "", 0
    for name in names:
        letter = KINDS.get(name, "")
        under_way += {"s": 1, "w": -1}.get(letter, 0)
        out += letter if letter != "p" or under_way else ""
    return out


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    lowered: list[Program] = []

    def seen(program: Program) -> Callable[[list[Any]], Sequence[Any]]:
        lowered.append(program)
        return compile_inductor(program)

    LOWERINGS["inductor"] = lambda: seen
    torch.manual_seed(0)
    model, x = Parallel().double().eval().requires_grad_(False), torch.randn(1, 26, 16).double()
    for plan in sys.argv[1:]:
        found: dict[str, Any] = {"plan": plan, "rank": dist.get_rank(), "error": 0.0}
        text = pipeline_text(Plan.parse(plan))
        for name, passes in (("pinned", text), ("free", text.removesuffix(",pin"))):
            torch._dynamo.reset()
            lowered.clear()
            # a machine on which the MLP takes about as long as an exchange, so that there is something to keep
            options = {"plan": plan, "passes": passes, "lowering": "inductor", "topology": "h100-8"}
            compiled = torch.compile(model, backend="fastpar", options=options)
            out, code = run_and_get_code(compiled, x)
            found["error"] = max(found["error"], float((out - model(x)).abs().max()))
            (program,) = lowered
            targets = [str(n.target).split(".")[1] for n in program.graph.nodes if "." in str(n.target)]
            body = "\n".join(code).split("def call(", 1)[1]
            found[name] = {"program": letters(targets), "code": letters(CALL.findall(body))}
        print("\n" + json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
