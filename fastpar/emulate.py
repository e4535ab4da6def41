"""``fastpar.emulate``: one process and its device as rank r of N, on links of a chosen topology.

::

    with fastpar.emulate.start("h100-8", rank=0, ranks=8) as emulation:
        split = torch.compile(model, backend="fastpar", options={"plan": "ulysses=8"})
        split(**inputs)                      # takes as long as on rank 0 of 8, as far as links go
        print(emulation.tallies)

It starts ``torch.distributed`` with the backend ``emulate`` (``fastpar.backends.emulate``), on which everything else
that communicates through ``torch.distributed`` runs as it is. Times are those of ``Topology.seconds``, which the
planner and the clock use as well. Values are wrong: there are no other ranks whose data one could get.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from fastpar.core.errors import OptionError
from fastpar.core.options import DEFAULT_TIMEOUT
from fastpar.plan.topology import DEFAULT, Topology, load


@dataclass
class Emulation:
    """What ``start`` gives: the default process group is emulated until ``stop``, or the end of a ``with``."""

    topology: Topology
    rank: int
    ranks: int
    links: Any

    @property
    def tallies(self) -> dict[str, Any]:
        """By kind of collective: ``count``, ``bytes`` that left this rank and ``seconds`` on the links so far."""
        return self.links.tallies

    def move(self, topology: str | Topology) -> None:
        """Go on with the same ranks on another topology's links. What a CUDA graph holds keeps its old times.

        Raises OptionError for a topology that is unknown or has fewer devices than there are ranks.
        """
        shape = load(topology) if isinstance(topology, str) else topology
        shape.check(self.ranks)
        self.topology = shape
        self.links.replace(shape.seconds)

    def reset(self) -> None:
        """Count anew."""
        self.links.tallies.clear()

    def stop(self) -> None:
        """Take the process group down. Nothing happens if that was done before."""
        import torch.distributed as dist

        from fastpar.backends.emulate.group import NAME, uninstall

        if dist.is_initialized() and dist.get_backend() == NAME:
            dist.destroy_process_group()
        uninstall()

    def __enter__(self) -> Emulation:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()


def start(
    topology: str | Topology = DEFAULT,
    rank: int = 0,
    ranks: int | None = None,
    *,
    ctas: int = 1,
    timeout: float = 10 * DEFAULT_TIMEOUT,
) -> Emulation:
    """Make this process ``rank`` of ``ranks`` (by default all devices of ``topology``) on emulated links.

    ``topology`` is a preset's name, a TOML file or a Topology. On a GPU every exchange keeps ``ctas`` thread blocks
    busy. Waiting for an exchange on the CPU ends with an error after ``timeout`` seconds. Raises OptionError where
    there is a process group already, and for a topology, a rank or a number that does not fit.
    """
    import torch.distributed as dist

    from fastpar.backends.emulate.group import NAME, Links, install, uninstall

    if not dist.is_available():
        raise OptionError("emulate needs torch.distributed, which this build of torch lacks")
    if dist.is_initialized():
        raise OptionError("emulate starts a process group of its own; destroy the one that there is first")
    shape = load(topology) if isinstance(topology, str) else topology
    world = shape.devices if ranks is None else ranks
    if world < 1 or not 0 <= rank < world:
        raise OptionError(f"emulate: rank {rank} of {world}; valid: ranks of at least 1, a rank from 0 to ranks - 1")
    if ctas < 1 or timeout <= 0:
        raise OptionError(f"emulate: ctas={ctas}, timeout={timeout}; valid: at least one block, seconds above 0")
    shape.check(world)
    links = Links(shape.seconds, world, ctas)
    install(links)
    try:
        dist.init_process_group(
            NAME, store=dist.HashStore(), rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )
    except BaseException:
        uninstall()
        raise
    return Emulation(shape, rank, world, links)
