"""What Inductor writes for a GPU that is not there: the kernels of a rank's step, counted without running one.

On fake CUDA tensors the whole road up to the Python that launches kernels needs no device, only its properties. So how
many kernels a step has, how many bytes they read and write, and whether something is copied that need not be, is known
where no GPU is; how long they take is not. Bytes are those that Inductor counts: of its own kernels, each tensor that
one of them touches, once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

PROPERTIES = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=32, max_threads_per_block=1024,
    max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, total_memory=80 << 30, gcnArchName="",
    L2_cache_size=50 << 20, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
)  # fmt: skip


@dataclass(frozen=True)
class Code:
    """The wrapper that Inductor wrote for a program."""

    text: str

    @property
    def call(self) -> str:
        """The function that launches."""
        return self.text[self.text.rindex("def call(") :]

    @property
    def kernels(self) -> Counter[str]:
        """Launches of Inductor's own kernels, by name without numbers."""
        return Counter(re.sub(r"_\d+$", "", name) for name in re.findall(r"(triton_\w+)\.run\(", self.call))

    @property
    def operators(self) -> Counter[str]:
        """Calls of everything else: products, attentions, collectives, kernels of ours."""
        return Counter(re.findall(r"(?:= |^\s+)(torch\.ops\.[\w.]+|extern_kernels\.\w+)\(", self.call, re.MULTILINE))

    @property
    def overwritten(self) -> list[str]:
        """Lines that take the memory of a message, sent or received, while it is under way."""
        under_way: dict[str, str] = {}  # what is received -> what was sent
        found = []
        for line in self.call.splitlines():
            started = re.search(r"(buf\d+) = torch\.ops\._c10d_functional\.\w+\.default\((?:\w+\()?(buf\d+)", line)
            waited = re.search(r"wait_tensor\.default\((buf\d+)", line)
            reused = re.search(r"= (?:reinterpret_tensor\()?(buf\d+)\b.*# reuse", line)
            if waited:
                under_way.pop(waited[1], None)
            elif started:
                under_way[started[1]] = started[2]
            elif reused and reused[1] in {*under_way, *under_way.values()}:
                found.append(line.strip())
        return found

    @property
    def bytes(self) -> float:
        """What Inductor's own kernels read and write."""
        bodies = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", self.text, re.DOTALL)
        found = {name: re.search(r"'kernel_num_gb': ([\d.e+-]+)", body) for name, body in bodies}
        each = {name: float(match[1]) * 1e9 if match else 0.0 for name, match in found.items()}
        return sum(each[name] for name in re.findall(r"(triton_\w+)\.run\(", self.call))


class _Written(Exception):
    """The code is there, and nothing is to be compiled."""


class _Driver:
    """Enough of Triton's driver to write kernels for an H100."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda")

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return PROPERTIES.major, PROPERTIES.minor

    @property
    def utils(self) -> Any:
        most = {"max_shared_mem": PROPERTIES.shared_memory_per_block_optin, "multiprocessor_count": 132}
        return SimpleNamespace(get_device_properties=lambda index: most)


@contextmanager
def pretended() -> Iterator[list[Code]]:
    """In here there is an H100, on which nothing can run; yields the code that Inductor writes."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.graph import GraphLowering
    from torch._subclasses import fake_tensor

    codes: list[Code] = []

    def stop(graph: GraphLowering, *args: Any) -> Any:
        written = graph.codegen()[0]
        codes.append(Code(getattr(written, "value", written)))
        raise _Written

    def always(value: Any) -> Any:
        return lambda *args, **kwargs: value

    queries = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": PROPERTIES,
        "get_device_capability": (PROPERTIES.major, PROPERTIES.minor), "get_device_name": PROPERTIES.name,
        "synchronize": None, "_lazy_init": None, "is_bf16_supported": True, "_exchange_device": 0,
        "_maybe_exchange_device": 0, "set_device": None, "is_initialized": False,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
    }  # fmt: skip
    interface = {name: queries[name] for name in ("is_available", "device_count", "current_device",
                 "get_device_properties", "is_bf16_supported")} | {"get_compute_capability": 90}  # fmt: skip
    with ExitStack() as stack:
        enter = stack.enter_context
        for name, value in queries.items():
            enter(mock.patch.object(torch.cuda, name, always(value), create=True))
        for name, value in interface.items():
            enter(mock.patch.object(CudaInterface, name, staticmethod(always(value)), create=True))
        for name in ("get_device_properties", "current_device"):
            enter(mock.patch.object(CudaInterface.Worker, name, staticmethod(always(queries[name])), create=True))
        enter(mock.patch.object(triton.runtime.driver, "_active", _Driver(), create=True))
        enter(mock.patch.object(fake_tensor, "init_gpu_context", always(None), create=True))
        # patterns of unfused attention are traced on the device, and matter to no program of ours
        enter(mock.patch.object(joint_graph, "lazy_init", always(None)))
        for name in ("compile_to_module", "_compile_to_module"):
            enter(mock.patch.object(GraphLowering, name, stop, create=True))
        # the last two make Inductor note the bytes of every kernel
        enter(config.patch(fx_graph_cache=False, compile_threads=1, shape_padding=False,
                           profile_bandwidth=True, benchmark_kernel=True))  # fmt: skip
        torch._C._ensureCUDADeviceGuardSet()
        stack.callback(_forget)
        _forget()
        yield codes


def _forget() -> None:
    """What torch remembers of whether Triton works here."""
    from torch.utils import _triton

    for found in vars(_triton).values():
        if hasattr(found, "cache_clear"):
            found.cache_clear()


def on_cuda(program: Any) -> Any:
    """A localised program, captured on the CPU, as if it had been on a GPU."""
    from fastpar.graph.program import copy_module

    gm = copy_module(program.gm)
    for node in gm.graph.nodes:
        node.meta = {**node.meta, "val": _moved(node.meta.get("val"))}
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda")}
    gm.recompile()
    return replace(program, gm=gm)


def _moved(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_moved, value))
    if not isinstance(value, torch.Tensor):
        return value
    with value.fake_mode:  # type: ignore[attr-defined]
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def code_of(program: Any) -> Code:
    """What Inductor writes for a localised program whose inputs are fake tensors. Needs Triton, and no GPU."""
    from fastpar.backends.inductor import compile_inductor
    from fastpar.backends.kernels import choose

    tables: list[torch.Tensor] = []  # alive, so that each has an id of its own

    def on_the_host(boxes: Any, itemsizes: Any, device: Any) -> torch.Tensor:
        tables.append(make_table(boxes, itemsizes, "cpu"))
        return tables[-1]

    def from_tensor(mode: Any, tensor: torch.Tensor, **options: Any) -> Any:
        given = to_fake(mode, tensor, **options)
        if any(tensor is t for t in tables):
            with mode:
                return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
        return given

    make_table, to_fake = choose.make_table, torch._subclasses.FakeTensorMode.from_tensor
    with (
        pretended() as codes,
        mock.patch.object(choose, "make_table", on_the_host),
        mock.patch.object(torch._subclasses.FakeTensorMode, "from_tensor", from_tensor),
    ):
        try:
            compile_inductor(on_cuda(program))
        except Exception as error:
            if not codes:  # not the end that we made
                raise error
    return codes[-1]


def code_of_plan(captured: Any, plan: str, topology: str = "h100-8") -> Code:
    """What Inductor writes for rank 0 of a plan; ``captured`` is a program on fake CPU tensors."""
    from fastpar import emulate
    from fastpar.core.plan import Plan
    from fastpar.run.build import build
    from fastpar.run.groups import group_of, process_groups

    ranks = Plan.parse(plan).degree
    built = build(captured, plan, topology=topology if ranks > 1 else None, verify_structure=False)
    if ranks == 1:
        return code_of(built.localise(0))
    with emulate.start(topology, rank=0, ranks=ranks):
        groups = process_groups(built.lowered.graph, built.mesh, group_of(None))
        return code_of(built.localise(0, groups))
