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
from torch import fx
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from fastpar.backends.cache import kept
from fastpar.backends.kernels.choose import available, with_kernels
from fastpar.backends.message_order import in_message_order
from fastpar.backends.pinned import pin
from fastpar.backends.ranges import PROVENANCE, numbered, under_profilers, wrapper_of, wrapper_with_ranges
from fastpar.core.errors import OptionError
from fastpar.graph.forward import forwarded
from fastpar.graph.program import Program
from fastpar.ops.folded import pack_folded, unpack_folded
from fastpar.ops.moments import moments
from fastpar.ops.moments import written as moments_written


def compile_inductor(program: Program) -> Callable[[list[Any]], Sequence[Any]]:
    """A function from the flat inputs to the flat outputs of this rank's program.

    Raises OptionError where the CPU path has no C++ compiler to work with.
    """
    values = [n.meta["val"] for n in program.placeholders]
    gpu = gpu_of(values)
    if gpu is None:
        _need_compiler()
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None) or FakeTensorMode()
    table = dict(select_decomp_table())
    table[torch.ops.fastpar.pack.default] = pack_folded
    table[torch.ops.fastpar.unpack.default] = unpack_folded
    table[moments] = moments_written
    gm, tables = forwarded(program.gm), list[torch.Tensor]()
    if gpu is not None and available():  # Triton kernels take what they fuse; their tables are inputs that never change
        gm, tables = with_kernels(gm, gpu)
    static = [i for i, given in enumerate(program.inputs) if given.kind in ("parameter", "buffer")]
    static += range(len(values), len(values) + len(tables))
    values += [mode.from_tensor(t) for t in tables]
    gm, names = numbered(gm)
    with mode, torch.no_grad(), preserve_node_meta():
        traced = make_fx(fx.Interpreter(gm).run, decomposition_table=table)(*values)
    in_message_order(traced.graph, mode)
    pin(traced.graph, compute=bool(program.gm.meta.get("pinned")))
    traced.recompile()
    level = config.trace.provenance_tracking_level or PROVENANCE  # more, if the user asks Inductor for more
    handles = config.patch({"trace.provenance_tracking_level": level})
    with tracing(TracingContext(mode)), torch.no_grad(), kept(program, traced), handles:
        compiled = compile_fx_inner(traced, values, static_input_idxs=static, is_inference=True)

    def run(args: list[Any]) -> Sequence[Any]:
        return tuple(compiled([*args, *tables]))

    wrapper = wrapper_of(compiled)
    return under_profilers(program.name, run, lambda: wrapper_with_ranges(wrapper, compiled, names, run))


def gpu_of(values: Sequence[Any]) -> torch.device | None:
    """The GPU on which these inputs are, if they are on one."""
    return next((v.device for v in values if isinstance(v, torch.Tensor) and v.device.type == "cuda"), None)


def _need_compiler() -> None:
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl")):
        raise OptionError(
            "lowering 'inductor' on the CPU needs a C++ compiler, and none is on the path; "
            "install one, or use lowering 'eager'"
        )
