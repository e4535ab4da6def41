"""Ranks agree on what they compiled, through the store, before the first collective.

Every rank compiles for itself, so ranks can come to different programs (another version, another option, a
graph that depends on the rank), and a collective between different programs hangs or gives wrong numbers.
At every compile each rank therefore publishes what it is about to run, as ordered fields of text, and all go
on only if all fields are equal::

    with compiling(group):              # a failure in here reaches the ranks that wait, at once
        ...                             # capture, plan, passes
        agree({"graph": ..., "plan": ...}, group)
        ...                             # the slow part: Inductor
        meet(group)                     # nobody starts a collective before all can

One key of the store, the *verdict* of the round, decides for all: the rank that sees everybody's fields
writes it, or a rank whose patience ends, or one that fails. ``compare_set`` keeps the first verdict and
everybody obeys that one, so no rank goes on while another gives up. Rounds are counted per rank in the store
itself (not in the process, which may outlive a process group); what an older round left there is deleted once
all came to a later one.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import eq
from os.path import commonprefix
from typing import Any

from fastpar.core.errors import AgreementError
from fastpar.core.options import timeout_from_env
from fastpar.graph.unbroken import Broken

_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05  # seconds between two looks at the verdict
_AGREED = ""
_ALONE = ("fake", "emulate")  # torch.distributed backends on which one process plays a rank, nobody the rest


@dataclass(frozen=True)
class Party:
    """Ranks that compile together: the store between them, this rank, and all of them, by world rank."""

    store: Any
    rank: int
    ranks: tuple[int, ...]

    def key(self, *parts: object) -> str:
        # Named after its ranks: replicas of one world must not meet in each other's keys.
        ranks = hashlib.sha256(repr(self.ranks).encode()).hexdigest()[:16]
        return "/".join(("fastpar", "agree", ranks, *map(str, parts)))

    def round(self) -> int:
        """The round that this rank is in: how many it has concluded."""
        return int(self.store.add(self.key("count", self.rank), 0))

    def publish(self, round: int, fields: Mapping[str, str]) -> None:
        self.store.set(self.key(round, self.rank), json.dumps(list(fields.items())))

    def came(self, round: int, ranks: Sequence[int]) -> bool:
        return bool(self.store.check([self.key(round, rank) for rank in ranks]))

    def read(self, round: int, rank: int) -> dict[str, str]:
        return dict(json.loads(self.store.get(self.key(round, rank))))

    def verdict(self, round: int) -> str | None:
        """What the round came to: ``_AGREED``, an error's message, or ``None`` while it is open."""
        key = self.key(round, "verdict")
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def decide(self, round: int, verdict: str) -> str:
        """Propose a verdict; returns the one that holds, which is the first that anybody proposed."""
        return str(json.loads(self.store.compare_set(self.key(round, "verdict"), "", json.dumps(verdict))))

    def conclude(self, round: int, verdict: str) -> None:
        """Count the round, and delete what older ones left if everybody has come to this one."""
        self.store.add(self.key("count", self.rank), 1)
        if verdict != _AGREED:
            return
        for whose in (self.rank, "verdict") if self.rank == self.ranks[0] else (self.rank,):
            old = round - 1
            while old >= 0 and self.store.check([self.key(old, whose)]):
                self.store.delete_key(self.key(old, whose))
                old -= 1


def agree(
    key_fields: Mapping[str, str],
    group: Any = None,
    timeout: float | None = None,
    store: Any = None,
    same: Callable[[str, str], bool] = eq,
) -> None:
    """Return on all ranks of ``group`` once all have called this with the same fields, or raise on all of them.

    ``group`` is a process group or its name, a ``DeviceMesh``, a ``Party`` or ``None`` for the world; ``timeout`` is in
    seconds, ``FASTPAR_TIMEOUT`` (60) by default; ``store`` replaces the default process group's; ``same`` says
    whether two values of a field are. Every rank must make the same sequence of calls. With one rank, without
    ``torch.distributed`` and on backends where one process stands for all ranks there is nobody to agree with, and
    nothing happens.

    Raises ``AgreementError``: ranks differ (names them, the first differing field and the values), ranks did
    not come in time (names them), a rank failed while compiling (with its message), or the store is gone.
    """
    party = party_of(group, store)
    if party is None:
        return
    timeout = timeout_from_env() if timeout is None else timeout
    try:
        round = party.round()
        party.publish(round, key_fields)
        verdict = _await_verdict(party, round, timeout, same)
        party.conclude(round, verdict)
    except RuntimeError as error:  # what torch's stores raise; rank 0 holds the store in most set-ups
        raise AgreementError(f"rank {party.rank} cannot reach the process group's store: {error}") from error
    if verdict != _AGREED:
        raise AgreementError(verdict)


def meet(group: Any = None, timeout: float | None = None, store: Any = None) -> None:
    """Return on all ranks once all have come. Raises as ``agree`` does."""
    agree({}, group, timeout, store)


def abort(reason: str, group: Any = None, store: Any = None) -> None:
    """Make the round that this rank is in fail on every rank: those that wait there, and those still to come.

    For a rank that cannot come to the next ``agree``. ``reason`` becomes their ``AgreementError``.
    """
    party = party_of(group, store)
    if party is None:
        return
    while True:
        round = party.round()
        # First the verdict: who came now and saw all ranks would compare our fields instead.
        verdict = party.decide(round, f"rank {party.rank} failed while compiling: {reason}")
        party.publish(round, {})  # the chain of keys stays without gaps, which is how old ones are found
        party.conclude(round, verdict)
        if verdict != _AGREED:  # else we were interrupted before we read it, and the others are one round on
            return


@contextmanager
def compiling(group: Any = None, store: Any = None) -> Iterator[None]:
    """While a rank compiles: if the body raises, all ranks that wait for this one raise with its message.

    Also lets a rank whose patience ends tell the ranks that still compile from those that never began.
    """
    party = party_of(group, store)
    if party is None:
        yield
        return
    busy = party.key("busy", party.rank)
    try:
        party.store.set(busy, "1")
        yield
    except BaseException as error:
        # A failed agreement has already failed everywhere; aborting the next round as well would put
        # this rank one round ahead of the others. A graph that Dynamo is to break is no failure at all.
        if not isinstance(error, (AgreementError, Broken)) and not isinstance(error.__cause__, AgreementError):
            try:
                abort(f"{type(error).__name__}: {error}", party)
            except RuntimeError as gone:
                error.add_note(f"the other ranks could not be told, they will wait in vain: {gone}")
        raise
    finally:
        _forget(party, busy)


def party_of(group: Any = None, store: Any = None) -> Party | None:
    """The ranks of ``group`` and a store between them; ``None`` if there is nobody to agree with.

    Raises ``AgreementError`` if this rank is not in ``group``.
    """
    if isinstance(group, Party):
        return group if len(group.ranks) > 1 else None
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return None
    if hasattr(group, "mesh"):  # a DeviceMesh, which need not have one process group over all its ranks
        ranks = tuple(sorted(group.mesh.flatten().tolist()))
    elif group == dist.GroupMember.NON_GROUP_MEMBER:
        ranks = ()
    else:
        ranks = tuple(sorted(dist.get_process_group_ranks(named(group))))
    rank = dist.get_rank()
    if rank not in ranks:
        raise AgreementError(f"rank {rank} compiles for a mesh that it is not in (ranks {_listed(ranks)})")
    if len(ranks) == 1 or dist.get_backend() in _ALONE:
        return None
    return Party(dist.distributed_c10d._get_default_store() if store is None else store, rank, ranks)


def named(group: Any) -> Any:
    """The process group of this name; anything else as it is. Raises RuntimeError where it was destroyed."""
    import torch.distributed as dist

    return dist.distributed_c10d._resolve_process_group(group) if isinstance(group, str) else group


def _await_verdict(party: Party, round: int, timeout: float, same: Callable[[str, str], bool]) -> str:
    deadline, pause = time.monotonic() + timeout, _FIRST_PAUSE
    # Whoever comes last sees everybody's fields, for the store puts all writes in one order; the others only
    # have to look at the verdict.
    if party.came(round, party.ranks):
        return party.decide(round, _compare(party, round, same))
    while (verdict := party.verdict(round)) is None:
        if time.monotonic() >= deadline:
            missing = [rank for rank in party.ranks if not party.came(round, [rank])]
            # None missing: the last one came but ended before it could decide.
            message = _absent(party, missing, timeout) if missing else _compare(party, round, same)
            return party.decide(round, message)
        time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
        # Thousands of ranks look at one store: they look less often.
        pause = min(pause * 1.5, max(_LONGEST_PAUSE, len(party.ranks) / 10_000))
    return verdict


def _compare(party: Party, round: int, same: Callable[[str, str], bool]) -> str:
    """``_AGREED`` if all ranks published the same fields, else the message that names the first difference."""
    given = {rank: party.read(round, rank) for rank in party.ranks}
    for name in dict.fromkeys(name for fields in given.values() for name in fields):
        holders: dict[str | None, list[int]] = {}
        for rank, fields in given.items():
            value = fields.get(name)
            held = (v for v in holders if v == value or None not in (v, value) and same(v, value))  # type: ignore[arg-type]
            holders.setdefault(next(held, value), []).append(rank)
        if len(holders) > 1:
            shown = _excerpts([value for value in holders])
            told = [
                f"{_ranks(ranks)} {'has' if len(ranks) == 1 else 'have'} {text}"
                for ranks, text in zip(holders.values(), shown, strict=True)
            ]
            more = f"; and {len(told) - 4} more values" if len(told) > 4 else ""
            return f"ranks do not agree on {name!r}: {'; '.join(told[:4])}{more}"
    return _AGREED


def _absent(party: Party, missing: Sequence[int], timeout: float) -> str:
    busy = [rank for rank in missing if party.store.check([party.key("busy", rank)])]
    never = [rank for rank in missing if rank not in busy]
    told = []
    if busy:
        told.append(f"{_ranks(busy)} began to compile and did not finish (slow, or dead)")
    if never:
        told.append(f"{_ranks(never)} did not begin to compile")
    return (
        f"{_ranks(missing)} did not come within {timeout:g} s: {'; '.join(told)}. Every rank must call the "
        "compiled model, with inputs of the same shapes; if compiling only takes long, raise FASTPAR_TIMEOUT"
    )


def _excerpts(values: Sequence[str | None], width: int = 100) -> list[str]:
    """Values for a message; long ones are cut to where they begin to differ."""
    texts = [value for value in values if value is not None]
    start = max(0, len(commonprefix(texts)) - width // 2) if max(map(len, texts)) > width else 0
    shown = []
    for value in values:
        if value is None:
            shown.append("nothing")
            continue
        before, after = "..." if start else "", "..." if len(value) > start + width else ""
        shown.append(f"{before}{value[start : start + width]!r}{after}")
    return shown


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_listed(ranks)}"


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")


def _forget(party: Party, key: str) -> None:
    try:
        party.store.delete_key(key)
    except RuntimeError:
        pass  # the store is gone, and the key with it
