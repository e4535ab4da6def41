"""``inductor``: Inductor lowers the compute of a localised program around its collectives.

The program is traced once more so that ``pack`` and ``unpack`` become the slices and
concatenations they stand for (which Inductor fuses with their neighbours) and composite
operators are decomposed; its order is pinned; then ``compile_fx_inner`` compiles it as it is.
Weights are static inputs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastpar.backends.pinned import pin
from fastpar.core.errors import OptionError
from fastpar.graph.program import Program
from fastpar.ops.checksum import checksum_formula
from fastpar.ops.collectives import pack_boxes, unpack_boxes


def compile_inductor(program: Program) -> Callable[[list[Any]], Sequence[Any]]:
    """A function from the flat inputs to the flat outputs of this rank's program.

    Raises OptionError where the CPU path has no C++ compiler to work with.
    """
    values = [n.meta["val"] for n in program.placeholders]
    if not any(isinstance(v, torch.Tensor) and v.device.type == "cuda" for v in values):
        _need_compiler()
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None) or FakeTensorMode()
    table = dict(select_decomp_table())
    table[torch.ops.fastpar.pack.default] = pack_boxes
    table[torch.ops.fastpar.unpack.default] = unpack_boxes
    table[torch.ops.fastpar.checksum.default] = checksum_formula
    program.gm.recompile()
    with mode, torch.no_grad():
        traced = make_fx(program.gm, decomposition_table=table)(*values)
    pin(traced.graph, compute=bool(program.gm.meta.get("pinned")))
    traced.recompile()
    static = [i for i, given in enumerate(program.inputs) if given.kind in ("parameter", "buffer")]
    with tracing(TracingContext(mode)), torch.no_grad():
        compiled = compile_fx_inner(traced, values, static_input_idxs=static, is_inference=True)

    def run(args: list[Any]) -> Sequence[Any]:
        return tuple(compiled(list(args)))

    return run


def _need_compiler() -> None:
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl")):
        raise OptionError(
            "lowering 'inductor' on the CPU needs a C++ compiler, and none is on the path; "
            "install one, or use lowering 'eager'"
        )
