"""The process group of ``torch.distributed``'s backend ``emulate``: one process, any number of ranks.

Every collective takes, on its group's channel, the seconds that the links need for its messages. What it brings has the
right shape and dtype and is this rank's own data, repeated: times are right, values are not. Sums leave a rank's own
summand, received messages are what this rank sent last (ones before that), broadcasts from another rank leave ones.
Whatever cannot happen with one process (another rank failing, not coming) does not.

Names of methods are torch's, those of 2.11 and, where 2.13 renamed them, the new ones as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from fastpar.backends.emulate import dynamo
from fastpar.backends.emulate.channel import StreamChannel, StreamWork, ThreadChannel, ThreadWork
from fastpar.backends.emulate.spin import Spinner
from fastpar.backends.emulate.traffic import Messages, everywhere, joined, ring, rooted, shifts, sisters
from fastpar.core.errors import OptionError

NAME = "emulate"
"""What the backend is called in ``torch.distributed``."""

HARMLESS = 0x3C
"""A byte that stands for a finite number wherever it stands: all of e4m3, float16, bfloat16 and float32."""

Work = ThreadWork | StreamWork


@dataclass
class Tally:
    """Exchanges of one kind that were started: how many, bytes that left this rank, seconds on the links."""

    count: int = 0
    bytes: float = 0.0
    seconds: float = 0.0


@dataclass
class Links:
    """What connects the ranks: ``seconds`` gives the time of messages (from, to, bytes) between ranks of the world.

    ``ctas`` thread blocks of a GPU are busy with each exchange. ``tallies`` counts what was started, by kind; what a
    CUDA graph replays was started once.
    """

    seconds: Callable[[Messages], float]
    ranks: int
    ctas: int = 1
    version: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)
    _spinners: dict[torch.device, Spinner] = field(default_factory=dict)

    def replace(self, seconds: Callable[[Messages], float]) -> None:
        """Other links between the same ranks, from the next exchange on."""
        self.seconds = seconds
        self.version += 1

    def spinner(self, device: torch.device) -> Spinner:
        """The kernels for one GPU, compiled when it is first asked for."""
        if device not in self._spinners:
            self._spinners[device] = Spinner(device, self.ctas)
        return self._spinners[device]


_installed: list[Links] = []


def install(links: Links) -> None:
    """Process groups made from now on are connected by ``links``; registers the backend."""
    _installed[:] = [links]
    if NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, _make, extended_api=True, devices=["cpu", "cuda"])
        dynamo.tell(Group)
        # From 2.15 on torch attaches its flight recorder to every backend but these; here is nothing to record.
        recorded: set[str] = getattr(dist.distributed_c10d, "_FR_SELF_RECORDING_BACKENDS", set())
        recorded.add(NAME)


def uninstall() -> None:
    """No process groups can be made any more."""
    _installed.clear()


def _make(options: Any, _: Any) -> Group:
    if not _installed:
        raise OptionError("process groups of the backend 'emulate' are made inside of fastpar.emulate.start(...)")
    links, members = _installed[0], tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
    return Group(options.group_rank, members, links, options.group_id, options.timeout.total_seconds())


def repeat(out: torch.Tensor, src: torch.Tensor) -> None:
    """Fill ``out`` with the numbers of ``src`` again and again; with ones (``HARMLESS`` bytes) where there are none."""
    if not out.is_contiguous():
        whole = torch.empty_like(out, memory_format=torch.contiguous_format)
        repeat(whole, src)
        out.copy_(whole)
        return
    to, have = out.view(-1), src.reshape(-1)
    n, m = to.numel(), have.numel()
    if n and not m:
        to.fill_(HARMLESS if to.dtype == torch.uint8 else 1)
    elif n <= m:
        to.copy_(have[:n])
    else:
        whole = n // m * m
        to[:whole].view(-1, m).copy_(have.expand(whole // m, m))
        to[whole:].copy_(have[: n - whole])


def size_of(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


@dynamo.unseen
class Group(dist.ProcessGroup):
    """One rank of a process group on emulated links (see the module)."""

    def __init__(self, rank: int, members: Sequence[int], links: Links, name: str, patience: float) -> None:
        super().__init__(rank, len(members))
        self.members, self.links, self.patience = tuple(members), links, patience
        self._me, self._n, self._name, self._desc = rank, len(members), name, ""
        self._groups = sisters(self.members, links.ranks)
        self._channels: dict[tuple[torch.device, str], ThreadChannel | StreamChannel] = {}
        self._prices: dict[Hashable, tuple[float, float]] = {}
        self._batch: list[tuple[str, Messages, Callable[[], None], list[Any], list[Any]]] | None = None
        self._sent: torch.Tensor | None = None
        self._closed = False
        if torch.cuda.is_available():  # before any capture
            self._channel(torch.device("cuda", torch.cuda.current_device()), "collective")

    # -- what torch asks of a group ------------------------------------------------------------

    @property
    def group_name(self) -> str:
        return self._name

    @property
    def group_desc(self) -> str:
        return self._desc

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu"), torch.device("cuda")]

    @property
    def supports_coalescing(self) -> bool:
        return True

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _set_group_desc(self, desc: str) -> None:
        self._desc = desc

    def _get_backend(self, device: torch.device) -> Group:
        return self

    def rank(self) -> int:
        return self._me

    def size(self) -> int:
        return self._n

    def name(self) -> str:
        return NAME

    getRank, getSize, getBackendName, _get_backend_name = rank, size, name, name
    getGroupName, setGroupName = (lambda self: self._name), _set_group_name
    getGroupDesc, setGroupDesc = (lambda self: self._desc), _set_group_desc

    def _set_sequence_number_for_group(self) -> None: ...

    def _get_sequence_number_for_group(self) -> int:
        return sum(tally.count for tally in self.links.tallies.values())

    def set_timeout(self, timeout: Any) -> None:
        self.patience = timeout.total_seconds()

    def shutdown(self) -> None:
        for channel in self._channels.values():
            channel.close()
        self._sent, self._closed = None, True

    def abort(self) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        return f"emulated group {self._name}: rank {self._me} of {self._n}"

    # -- exchanges -----------------------------------------------------------------------------

    def _channel(self, device: torch.device, role: str) -> Any:
        if self._closed:
            raise RuntimeError(f"emulated group {self._name}: has been destroyed")
        if (device, role) not in self._channels:
            made = (
                StreamChannel(device, self.links.spinner(device))
                if device.type == "cuda"
                else ThreadChannel(f"emulate {self._name} {role}", self.patience)
            )
            self._channels[device, role] = made
        return self._channels[device, role]

    def _price(self, key: Hashable, make: Callable[[], Messages]) -> tuple[float, float]:
        """Seconds of an exchange, and bytes that leave this rank; worked out once for those alike."""
        key = (self.links.version, key)
        if key not in self._prices:
            messages = make()
            src, dst, size = messages
            leaving = float(size[(src == self._me) & (dst != self._me)].sum())
            seconds = self.links.seconds(everywhere(messages, self._groups)) if len(size) else 0.0
            self._prices[key] = seconds, leaving
        return self._prices[key]

    def _start(
        self,
        kind: str,
        key: Hashable,
        make: Callable[[], Messages],
        move: Callable[[], None],
        outputs: list[Any],
        inputs: Sequence[torch.Tensor] = (),
        role: str = "collective",
    ) -> Work | None:
        held = [*(t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)), *inputs]
        if not held:
            raise OptionError(f"{kind}: needs a tensor")
        if self._batch is not None:
            self._batch.append((kind, make(), move, outputs, held))
            return None
        seconds, leaving = self._price((kind, key), make)
        self._count(kind, seconds, leaving)
        return self._channel(held[0].device, role).occupy(seconds, move, outputs, held)

    def _count(self, kind: str, seconds: float, leaving: float) -> None:
        tally = self.links.tallies.setdefault(kind, Tally())
        tally.count += 1
        tally.bytes += leaving
        tally.seconds += seconds

    def _start_coalescing(self, device: torch.device) -> None:
        self._batch = []

    def _end_coalescing(self, device: torch.device) -> Work:
        """One exchange of all that was asked for since: their messages are under way at once."""
        batch, self._batch = self._batch or [], None
        moves = [move for _, _, move, _, _ in batch]
        outputs = [x for _, _, _, given, _ in batch for x in given]
        held = [x for _, _, _, _, given in batch for x in given]
        seconds, leaving = 0.0, 0.0
        if batch:
            messages = joined([messages for _, messages, _, _, _ in batch])
            seconds, leaving = self._price(tuple(map(_text, messages)), lambda: messages)
            self._count("coalesced", seconds, leaving)

        def move() -> None:
            for one in moves:
                one()

        return self._channel(device, "collective").occupy(seconds, move, outputs, held)

    start_coalescing, end_coalescing = _start_coalescing, _end_coalescing

    # -- sums ----------------------------------------------------------------------------------

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Work | None:
        size = 2 * size_of(tensors) * (self._n - 1) / self._n
        return self._start("all_reduce", size, lambda: ring(self._n, size), _nothing, tensors)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Work | None:
        size = size_of(tensors)
        return self._start("reduce", size, lambda: ring(self._n, size), _nothing, tensors)

    def reduce_scatter(
        self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any = None
    ) -> Work | None:
        return self._scattered(outputs, [each[self._me] for each in inputs])

    def _reduce_scatter_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Work | None:
        return self.reduce_scatter_tensor_coalesced([output], [input])

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> Work | None:
        return self._scattered(outputs, [x.reshape(self._n, -1)[self._me] for x in inputs])

    def _scattered(self, outputs: list[torch.Tensor], own: list[torch.Tensor]) -> Work | None:
        size = size_of(outputs) * (self._n - 1)
        return self._start("reduce_scatter", size, lambda: ring(self._n, size), _copies(outputs, own), outputs, own)

    reduce_scatter_single, reduce_scatter_single_coalesced = _reduce_scatter_base, reduce_scatter_tensor_coalesced

    # -- gathers -------------------------------------------------------------------------------

    def allgather(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None
    ) -> Work | None:
        # Of uneven ones everybody passes on everything that is not its own.
        size = sum(size_of(parts) for parts in outputs) - size_of(inputs)
        pairs = [(part, x) for parts, x in zip(outputs, inputs, strict=True) for part in parts]
        move = _copies(*zip(*pairs, strict=True))
        return self._start("all_gather", size, lambda: ring(self._n, size), move, outputs, inputs)

    def allgather_coalesced(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None
    ) -> Work | None:
        if len(outputs) == self._n and len(outputs) != len(inputs):  # by rank, then by tensor
            outputs = [list(parts) for parts in zip(*outputs, strict=True)]
        return self.allgather(outputs, inputs)

    def _allgather_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Work | None:
        return self.allgather_into_tensor_coalesced([output], [input])

    def allgather_into_tensor_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> Work | None:
        size = size_of(inputs) * (self._n - 1)
        return self._start("all_gather", size, lambda: ring(self._n, size), _copies(outputs, inputs), outputs, inputs)

    all_gather_single, all_gather_single_coalesced = _allgather_base, allgather_into_tensor_coalesced

    def gather(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None
    ) -> Work | None:
        root, size = opts.rootRank, size_of(inputs)
        parts = [part for each in outputs for part in each]
        return self._start("gather", (root, size), lambda: rooted(self._n, root, size, True),
                           _copies(parts, inputs * len(parts)), parts, inputs)  # fmt: skip

    def scatter(
        self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any = None
    ) -> Work | None:
        root, size = opts.rootRank, size_of(outputs)
        own = [each[self._me] for each in inputs] if inputs else [x.new_empty(0) for x in outputs]
        return self._start("scatter", (root, size), lambda: rooted(self._n, root, size, False),
                           _copies(outputs, own), outputs, own)  # fmt: skip

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> Work | None:
        size, move = size_of(tensors), _nothing
        if opts is not None and opts.rootRank != self._me:
            move = _copies(tensors, [x.new_empty(0) for x in tensors])
        return self._start("broadcast", size, lambda: ring(self._n, size), move, tensors)

    # -- all to all ----------------------------------------------------------------------------

    def alltoall_base(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        opts: Any = None,
    ) -> Work | None:
        rows = _row_bytes(input), _row_bytes(output)
        sends, receives = (
            tuple(n * row for n in (splits or [tensor.shape[0] // self._n] * self._n))
            for splits, tensor, row in ((input_splits, input, rows[0]), (output_splits, output, rows[1]))
        )
        given = input
        if input.dtype == torch.uint8 and len({*sends, *receives}) > 1:
            given = input.new_empty(0)  # rows of several kinds: another message's bytes stand for anything, here
        return self._exchanged(sends, receives, _copies([output], [given]), [output], [input])

    all_to_all_single = alltoall_base

    def alltoall(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> Work | None:
        sends, receives = (tuple(size_of([t]) for t in tensors) for tensors in (inputs, outputs))
        return self._exchanged(sends, receives, _copies(outputs, inputs), outputs, inputs)

    def _exchanged(
        self,
        sends: tuple[int, ...],
        receives: tuple[int, ...],
        move: Callable[[], None],
        outputs: list[torch.Tensor],
        inputs: list[torch.Tensor],
    ) -> Work | None:
        """What goes to the member d places on; or what comes from the one d places back, where that is more."""

        def make() -> Messages:
            me, n = self._me, self._n
            going, coming = [sends[(me + d) % n] for d in range(n)], [receives[(me - d) % n] for d in range(n)]
            return shifts(going if sum(going[1:]) >= sum(coming[1:]) else coming)

        return self._start("all_to_all", (sends, receives), make, move, outputs, inputs)

    # -- one to one ----------------------------------------------------------------------------

    def send(self, tensors: list[torch.Tensor], destination: int, tag: int = 0) -> Work | None:
        self._sent = tensors[-1]
        return self._passed("send", tensors, (destination - self._me) % self._n, _nothing)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int = 0) -> Work | None:
        own = self._sent
        if own is None or own.dtype != tensors[0].dtype or own.device != tensors[0].device:
            own = tensors[0].new_empty(0)
        return self._passed("receive", tensors, (self._me - source) % self._n, _copies(tensors, [own] * len(tensors)))

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int = 0) -> Work | None:
        return self.recv(tensors, (self._me - 1) % self._n, tag)

    def _passed(self, kind: str, tensors: list[torch.Tensor], places: int, move: Callable[[], None]) -> Work | None:
        """All members send alike; sending and receiving do not wait for each other, so each has its channel."""
        sizes = [0.0] * self._n
        sizes[places] = size_of(tensors)
        if self._batch is not None and kind == "receive":
            sizes = [0.0] * self._n  # what others send is already among the messages that this rank and they send
        return self._start(kind, (places, sizes[places]), lambda: shifts(sizes), move, tensors, role=kind)

    # -- meeting -------------------------------------------------------------------------------

    def barrier(self, opts: Any = None) -> Work:
        """As long as a sum of one byte. On a GPU waiting for it holds the caller, too."""
        seconds, leaving = self._price("barrier", lambda: ring(self._n, 1.0))
        self._count("barrier", seconds, leaving)
        if torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
            return self._channel(device, "collective").occupy(seconds, _nothing, [], [], host=True)
        return self._channel(torch.device("cpu"), "collective").occupy(seconds, _nothing, [], [])


def _nothing() -> None:
    """What a rank has already."""


def _copies(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Callable[[], None]:
    def move() -> None:
        for out, given in zip(outputs, inputs, strict=True):
            repeat(out.detach(), given.detach())

    return move


def _row_bytes(x: torch.Tensor) -> int:
    """Bytes of one index of the first dimension."""
    return math.prod(x.shape[1:]) * x.element_size()


def _text(array: Any) -> tuple[Any, ...]:
    return tuple(array.tolist())
