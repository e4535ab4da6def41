"""The Triton kernels: equal to their references, taken by tracers and compilers, and not needed where there is no GPU.

Kernels run in Triton's interpreter, in a process of their own, because it is chosen by the environment when Triton is
imported. What they must do is in ``tests/triton_cases.py``; with a GPU (marker ``gpu``) the same cases run there.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastpar
from fastpar.backends import inductor
from fastpar.backends.kernels import (
    checksums,
    choose,
    copies,
    launch,
    merge,
    normed,
    pack_quantized,
    rows,
    unpack_dequantized,
)
from fastpar.backends.kernels.choose import with_kernels
from fastpar.backends.kernels.table import LANES, make_table
from fastpar.backends.simulate.lockstep import run_local
from fastpar.graph.forward import forwarded
from fastpar.graph.program import Input, Program
from fastpar.ops.checksum import COLUMNS, ROW, STEP, STIR
from fastpar.ops.checksum import LANES as TOGETHER
from fastpar.ops.checksum import checksums as checksums_in_torch
from fastpar.ops.collectives import pack, unpack
from fastpar.ops.quantize import dequantize, quantize
from fastpar.ops.ring import merge as merge_in_torch
from fastpar.run.build import build
from tests.triton_cases import CASES, run, same

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton is not installed (pip install 'fastpar[test]' on Linux), or TRITON_INTERPRET is set for all tests",
)
torch.set_num_threads(1)

# Two tensors [1, 2, 5, 16] in one buffer, the first one quantized.
SHAPE = (1, 2, 5, 16)
BOXES = [0, 4, 0, 0, 0, 0, 1, 2, 5, 20, 1, 4, 0, 0, 0, 0, 1, 2, 5, 16]
PLAIN = [n if n != 20 else 16 for n in BOXES]
SHAPES = [4, 1, 2, 5, 20, 4, 1, 2, 5, 16]


# -- equal to the reference ------------------------------------------------------------------------


def interpret(count: int, *names: str) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.triton_cases", str(count), *names]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
def test_in_the_interpreter() -> None:
    interpret(8, *CASES)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_many_in_the_interpreter(name: str) -> None:
    interpret(120, name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu(name: str) -> None:
    run(name, 200, "cuda")


# -- compiled for GPUs that are not there --------------------------------------------------------------


class NoGpu:
    """Enough of Triton's driver to compile for an H100."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


ONE = {"LANE0": 0, "LANE1": -1, "LANE2": -1, "LANE3": -1}
TILE = {"ROWS": 16, "COLUMNS": 128}
SENT = {"out": "*u8", "buffer": "*u8", "flat": "*u8", "table": "*i64", "sums": "*i64"}
KERNELS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "pack": (copies._copy, "*bf16", {**ONE, **TILE, "PACK": True, "ITEM": 2, "UNIT": 8}),
    "unpack": (copies._copy, "*bf16", {**ONE, **TILE, "PACK": False, "ITEM": 2, "UNIT": 2}),
    "pack_quantized": (pack_quantized._quantize, "*bf16", {**ONE, **TILE, "WIDTH": 128}),
    "unpack_dequantized": (unpack_dequantized._dequantize, "*bf16", {**ONE, **TILE, "WIDTH": 128}),
    "quantize": (rows._quantize_rows, "*bf16", {**TILE, "WIDTH": 128}),
    "dequantize": (rows._dequantize_rows, "*u8", {**TILE, "WIDTH": 128}),
    "merge": (merge._merge, "*fp32", {**TILE, "WIDTH": 128}),
    "merge_blocks": (merge._merge, "*fp32", {**TILE, "WIDTH": 128}),  # the first two, as attention writes them
    "normed": (normed._normed, "*bf16", {**TILE, "WIDTH": 128, "NORM": 2, "WEIGHT": True, "BIAS": False, "SCALE": True,
                                         "ROTARY": 1, "ROUNDED": True, "ITEM": 2}),
    "checksums": (checksums._checksums, "*i64", {"S": STIR, "C": STEP, "R": ROW, "H": 16, "W": COLUMNS}),
}  # fmt: skip
STRIDES_OF_MERGE = {f"{letter}{i}" for letter in "xy" for i in range(LANES)}  # elsewhere tensors
POINTERS = {"x", "y", "z", "xl", "yl", "zl", "weight", "bias", "scale", "shift", "cos", "sin"} | STRIDES_OF_MERGE
POINTERS |= {f"x{i}" for i in range(LANES, TOGETHER)}  # of checksums


@needs_triton
@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KERNELS)
def test_it_compiles_to_machine_code(name: str, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sm_80 has no 8-bit floats: the kernels do not need any."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, kind, constants = KERNELS[name]
    sizes = {n: "constexpr" if n in constants else SENT.get(n, "i32") for n in kernel.arg_names}
    pointers = POINTERS - (STRIDES_OF_MERGE if name.startswith("merge") else set())
    sizes |= {n: kind for n in kernel.arg_names if n in pointers} | ({"eps": "fp32"} if name == "normed" else {})
    sizes |= {"out": "*bf16"} if name == "dequantize" else {}
    sizes |= {"x": "*bf16", "y": "*bf16"} if name == "merge_blocks" else {}
    given = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    done = triton.compile(ASTSource(kernel, sizes, constexprs=given), target=GPUTarget("cuda", arch, 32))
    assert done.asm["cubin"]
    ptx = done.asm["ptx"]
    assert ".ftz" not in ptx or name.startswith("merge")  # small numbers are numbers
    if name in ("pack_quantized", "quantize"):
        assert "div.rn.f32" in ptx and "div.full" not in ptx and "div.approx" not in ptx  # what torch computes


@needs_triton
def test_tracers_see_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torch.compile an operator is its kernel, and inputs, tables above all, are only read: a program that
    writes to its inputs is not captured in a CUDA graph."""
    import triton
    from torch._subclasses.functional_tensor import dispatch_functionalize

    monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu(), raising=False)
    mode = FakeTensorMode()
    with mode:
        x, o = (torch.empty(SHAPE, dtype=d, device="cuda") for d in (torch.bfloat16, torch.float32))
        table = torch.empty(2, 10, dtype=torch.int64, device="cuda")
        lse = torch.empty(SHAPE[:-1], device="cuda")

    def all_of_them(x: torch.Tensor, table: torch.Tensor, o: torch.Tensor, lse: torch.Tensor) -> Any:
        sent = pack_quantized.pack_quantized_operator([x, x], [True, False], BOXES, table)
        args = (SHAPES, BOXES, "bfloat16.bfloat16", [True, False], table)
        a, b = unpack_dequantized.unpack_dequantized_operator(sent, *args)
        whole = copies.pack_operator([a, b], PLAIN, table)
        c, d = copies.unpack_operator(whole, [n if n != 20 else 16 for n in SHAPES], PLAIN, "", table)
        normed.normed_(sent, c, None, None, None, None, None, None, "rms", 1e-6, False, True, 0, BOXES, [1, 2], table)
        back = rows.dequantize_operator(rows.quantize_operator(x), torch.float16)
        return sent, d, back, merge.merge(o, lse, o, lse), checksums.checksums_operator([x, table, o.mT, lse])

    with mode:
        traced = make_fx(dispatch_functionalize(all_of_them))(x, table, o, lse)
    kernels = [n for n in traced.graph.nodes if "triton_kernel_wrapper_functional" in str(n.target)]
    written = [sorted(n.kwargs["tensors_to_clone"]) for n in kernels]
    rounding = [["out"], ["out"]]
    want = [["flat"], ["out"], ["x0"], ["y0"], ["flat"], ["x0", "x1"], ["out"], *rounding, ["z", "zl"], ["sums"]]
    assert written == want


# -- as operators ----------------------------------------------------------------------------------------


def operators() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    torch.manual_seed(0)
    x, o, lse = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE[:-1])
    table, plain = make_table(BOXES, [1, 4], "cpu"), make_table(PLAIN, [4, 4], "cpu")
    sent = pack_quantized.pack_quantized([x, o], [True, False], BOXES)
    yield copies.pack_operator, ([x.mT.contiguous().mT, o], PLAIN, plain)
    yield copies.unpack_operator, (copies.pack([x, o], PLAIN), [4, *SHAPE] * 2, PLAIN, "", plain)
    yield pack_quantized.pack_quantized_operator, ([x, o], [True, False], BOXES, table)
    args = (SHAPES, BOXES, "float32.float32", [True, False], table)
    yield unpack_dequantized.unpack_dequantized_operator, (sent, *args)
    yield rows.quantize_operator, (x.mT,)
    yield rows.dequantize_operator, (rows.quantize_operator(x), torch.bfloat16)
    yield merge.merge, (o, lse, x, lse.clone())
    yield merge.merge_, (o.clone(), lse.clone(), x, lse.clone())
    angle = torch.randn(1, 5, 16)
    how = ("rms", 1e-6, True, True, 0, BOXES, [1, 4], table)
    yield normed.normed_, (sent.clone(), x, torch.randn(16), None, None, None, angle.cos(), angle.sin(), *how)
    yield checksums.checksums_operator, ([x, table, lse.mT],)


@pytest.mark.parametrize("which", range(8))
def test_operators_are_what_torch_expects_of_one(which: int) -> None:
    operator, args = list(operators())[which]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operator, args, test_utils=checks)


def test_on_the_cpu_they_are_their_references() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(SHAPE, dtype=torch.bfloat16), torch.randn(SHAPE, dtype=torch.bfloat16)
    sent = pack_quantized.pack_quantized([x, y], [True, False], BOXES)
    same(sent, pack([quantize(x), y], BOXES))
    back = unpack_dequantized.unpack_dequantized(sent, SHAPES, BOXES, [x.dtype] * 2, [True, False])
    same(back[0], dequantize(quantize(x), x.dtype))
    same(back[1], y)
    same(copies.pack([x, y], PLAIN), pack([x, y], PLAIN))
    for mine, theirs in zip(copies.unpack(copies.pack([x, y], PLAIN), [4, *SHAPE] * 2, PLAIN), (x, y), strict=True):
        same(mine, theirs)
    o, lse = torch.randn(SHAPE), torch.randn(SHAPE[:-1])
    want = merge_in_torch(o, lse, x.float(), lse + 1)
    merge.merge_(o, lse.clone(), x.float(), lse + 1)
    same(o, want[0])


@pytest.mark.parametrize("half", [False, True])
def test_the_rotary_form_is_that_of_diffusers(half: bool) -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings", reason="diffusers is not installed")
    torch.manual_seed(0)
    x, angle = torch.randn(2, 3, 7, 16), torch.randn(7, 16)
    want = embeddings.apply_rotary_emb(x, (angle.cos(), angle.sin()), use_real_unbind_dim=-2 if half else -1)
    got = normed.chain(x, cos=angle.cos()[None], sin=angle.sin()[None], norm="none", half=half)
    assert torch.allclose(got, want, atol=1e-6)


def test_the_norms_are_those_of_torch() -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 1, 7, 12).double(), torch.randn(12).double(), torch.randn(12).double()
    scale, shift = torch.randn(2, 1, 12).double(), torch.randn(2, 1, 12).double()
    got = normed.chain(x, w, b, norm="layer", eps=1e-5)
    assert torch.allclose(got, F.layer_norm(x, (12,), w, b, 1e-5))
    assert torch.allclose(normed.chain(x, w, eps=1e-5), F.rms_norm(x, (12,), w, 1e-5))
    modulated = F.layer_norm(x, (12,), eps=1e-5) * (1 + scale[:, None]) + shift[:, None]
    assert torch.allclose(normed.chain(x, scale=scale, shift=shift, norm="layer", eps=1e-5), modulated)


def test_without_triton_everything_but_a_gpu_works() -> None:
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import torch
        from fastpar.core.errors import OptionError
        from fastpar.backends.kernels import choose, launch, merge, normed, pack_quantized
        assert not choose.available()
        x = torch.randn(3, 8)
        assert pack_quantized.pack_quantized([x], [True], [0, 2, 0, 0, 3, 12]).shape == (36,)
        try:
            launch.wrap_triton(None)
        except OptionError as error:
            assert "fastpar[kernels]" in str(error)
            print("said so")
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    ours = [line for line in done.stderr.splitlines() if "torch/" not in line]  # some of torch's modules mention it
    assert done.stdout == "said so\n" and not ours, done.stdout + done.stderr


# -- in a rank's program ---------------------------------------------------------------------------------


def constants_for_tables(gm: fx.GraphModule, tables: list[torch.Tensor]) -> fx.GraphModule:
    """In simulation all ranks have the same inputs, but tables are a rank's own."""
    for i, table in enumerate(tables):
        node = next(n for n in gm.graph.nodes if n.target == f"table_{i}")
        gm.register_buffer(f"constant_{i}", table)
        with gm.graph.inserting_before(node):
            node.replace_all_uses_with(gm.graph.get_attr(f"constant_{i}"))
        gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
    return gm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("plan", "used"),
    [
        ("ulysses=2,fp8(qvo)", {"pack_quantized": 2, "unpack_dequantized": 2}),
        ("gather=3,fp8(kv)", {"pack_quantized": 1, "unpack_dequantized": 1}),
        ("ring=3,fp8(kvo)", {"merge": 2, "pack_quantized": 1, "unpack_dequantized": 2, "quantize": 2, "dequantize": 2}),
        ("ulysses=2,ring=2,fp8(qkvo)", {"pack_quantized": 2, "unpack_dequantized": 3, "dequantize": 2, "merge": 1}),
        ("torus=2,fp8(qvo)", None),
        ("ulysses=2", {}),
        ("ulysses=3", {"pack": 1, "unpack": 1}),
    ],
)
def test_programs_with_kernels_give_the_same_bits(
    plan: str, used: dict[str, int] | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    if plan == "ulysses=3":  # as if messages were in many pieces
        monkeypatch.setattr(choose, "PIECES", 0)
    x = torch.randn(1, 4, 11, 8).to(dtype)
    captured = fastpar.capture(lambda x: F.scaled_dot_product_attention(x * 2, x.sin(), x.cos()).tanh(), (x,))
    recorded = captured.programs[0]
    built = build(recorded.program, plan)
    programs = [built.localise(rank) for rank in range(built.mesh.ranks)]
    mine = []
    for program in programs:
        before = str(program.gm.graph)
        gm, tables = with_kernels(forwarded(program.gm), torch.device("cpu"))
        mine.append(replace(program, gm=constants_for_tables(gm, tables)))
        found = Counter(str(n.target).split(".")[1] for n in gm.graph.nodes if "fastpar_kernels" in str(n.target))
        assert found == used or used is None and found["pack_quantized"]
        assert str(program.gm.graph) == before
    for got, want in zip(run_local(mine, list(recorded.args)), run_local(programs, list(recorded.args)), strict=True):
        same(got[0], want[0])


def a_program(device: str) -> tuple[Program, list[torch.Tensor], Callable[..., Any]]:
    """Quantized, packed and back, and merged: one rank's program, with no one to talk to."""

    def f(x: torch.Tensor, y: torch.Tensor, lse: torch.Tensor) -> Any:
        sent = pack([quantize(x.sin()), quantize(y.cos())], [n if n != 16 else 20 for n in BOXES])
        a, b = unpack(sent, SHAPES[:5] * 2, [n if n != 16 else 20 for n in BOXES])
        a, b = dequantize(a, x.dtype), dequantize(b, y.dtype)
        out, total = merge_in_torch(a.float(), lse, b.float(), lse * 2)
        return out.tanh(), total, checksums_in_torch([x, y, lse])

    torch.manual_seed(0)
    args = [torch.randn(SHAPE, device=device).bfloat16() for _ in range(2)] + [torch.randn(SHAPE[:-1], device=device)]
    mode = FakeTensorMode()
    gm = make_fx(f, tracing_mode="real")(*args)
    for node, arg in zip((n for n in gm.graph.nodes if n.op == "placeholder"), args, strict=True):
        node.meta["val"] = mode.from_tensor(arg)
    inputs = tuple(Input(f"arg{i}", "user") for i in range(3))
    return Program(gm, inputs, "localised"), args, f


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_inductor_takes_programs_with_kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, args, f = a_program(device)
    if device == "cpu":
        monkeypatch.setattr(inductor, "gpu_of", lambda values: torch.device("cpu"))
        monkeypatch.setattr(inductor, "available", lambda: True)
    seen = []
    monkeypatch.setattr(inductor, "with_kernels", lambda *given: seen.append(with_kernels(*given)) or seen[-1])
    compiled = inductor.compile_inductor(program)
    for _ in range(3):
        for got, want in zip(compiled(list(args)), f(*args), strict=True):
            assert torch.allclose(got, want, atol=1e-5)
    assert len(seen) == 1 and len(seen[0][1]) == 2


@pytest.mark.gpu
def test_torch_compile_captures_them_in_a_cuda_graph() -> None:
    device = "cuda"
    table = make_table(BOXES, [1, 2], device)

    def f(x: torch.Tensor, table: torch.Tensor, lse: torch.Tensor) -> Any:
        sent = pack_quantized.pack_quantized_operator([x.sin(), x.cos()], [True, False], BOXES, table)
        args = (SHAPES, BOXES, "bfloat16.bfloat16", [True, False], table)
        a, b = unpack_dequantized.unpack_dequantized_operator(sent, *args)
        out, total = merge.merge(a.float(), lse, b.float(), lse * 2)
        return out.tanh(), total

    compiled = torch.compile(f, mode="reduce-overhead", fullgraph=True)
    with torch._inductor.config.patch({"triton.cudagraph_or_error": True}):
        for _ in range(4):
            x, lse = torch.randn(SHAPE, device=device).bfloat16(), torch.randn(SHAPE[:-1], device=device)
            for got, want in zip(compiled(x, table, lse), f(x, table, lse), strict=True):
                assert torch.allclose(got, want, atol=1e-5)


def test_kernels_are_off_without_a_gpu() -> None:
    assert inductor.gpu_of([torch.randn(3), 2.0]) is None
    with FakeTensorMode():
        assert inductor.gpu_of([torch.empty(3), torch.empty(3, device="cuda")]) == torch.device("cuda:0")
    assert inductor.available() == (importlib.util.find_spec("triton") is not None) == (launch.triton is not None)
