"""Ranks agree through a store: threads on several kinds of store, then real processes with gloo."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from fastpar.core.errors import AgreementError, OptionError
from fastpar.graph.unbroken import Broken
from fastpar.run.agree import Party, _excerpts, abort, agree, compiling, meet, party_of

FIELDS = {"graph": "5f1c", "plan": "ulysses=3", "order": "77aa"}
Outcome = str | None  # None: went on; else the error's type and message


class Ranks:
    """N ranks as threads, each with its own client of one store."""

    def __init__(self, stores: Sequence[Any], ranks: Sequence[int] | None = None) -> None:
        self.ranks = tuple(ranks if ranks is not None else range(len(stores)))
        self.parties = [Party(one, rank, self.ranks) for one, rank in zip(stores, self.ranks, strict=True)]
        self.seconds = [0.0] * len(stores)

    def run(self, work: Callable[[int, Party], Any]) -> list[Outcome]:
        outcomes: list[Outcome] = ["never ended"] * len(self.parties)

        def one(i: int) -> None:
            begin = time.monotonic()
            try:
                work(self.parties[i].rank, self.parties[i])
                outcomes[i] = None
            except Exception as error:
                outcomes[i] = f"{type(error).__name__}: {error}"
            self.seconds[i] = time.monotonic() - begin

        threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(len(self.parties))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return outcomes


def tcp_stores(count: int) -> list[Any]:
    first = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=10), wait_for_workers=False)
    more = [
        dist.TCPStore("127.0.0.1", first.port, None, False, timedelta(seconds=10), wait_for_workers=False)
        for _ in range(count - 1)
    ]
    return [first, *more]


@pytest.fixture(params=["hash", "tcp", "file"])
def ranks(request, tmp_path):
    if request.param == "hash":
        return Ranks([dist.HashStore()] * 3)
    if request.param == "file":
        return Ranks([dist.FileStore(str(tmp_path / "store"), 3) for _ in range(3)])
    return Ranks(tcp_stores(3))


def test_equal_fields_pass_and_leave_few_keys(ranks):
    store = ranks.parties[0].store
    counts = []
    for _ in range(4):
        assert ranks.run(lambda rank, party: agree(FIELDS, party, timeout=10)) == [None] * 3
        counts.append(store.num_keys())
    if not isinstance(store, dist.FileStore):  # it never forgets a key, nor do we promise that
        assert counts == [counts[0]] * 4


def test_one_differs_and_every_rank_says_which(ranks):
    def work(rank, party):
        plan = "ring=3" if rank == 1 else "ulysses=3"
        agree({**FIELDS, "plan": plan, "order": f"{rank}"}, party, timeout=10)

    said = "ranks do not agree on 'plan': ranks 0, 2 have 'ulysses=3'; rank 1 has 'ring=3'"
    assert ranks.run(work) == [f"AgreementError: {said}"] * 3
    assert ranks.run(lambda rank, party: agree(FIELDS, party, timeout=10)) == [None] * 3


def test_a_rank_that_does_not_come_is_named_and_hears_of_it_later(ranks):
    def work(rank, party):
        if rank != 2:
            agree(FIELDS, party, timeout=0.5)

    outcomes = ranks.run(work)
    assert outcomes[2] is None
    for said in outcomes[:2]:
        assert said is not None and "FASTPAR_TIMEOUT" in said
        assert "rank 2 did not come within 0.5 s: rank 2 did not begin to compile" in said
    with pytest.raises(AgreementError, match="rank 2 did not come within 0.5 s"):
        agree(FIELDS, ranks.parties[2], timeout=10)
    assert ranks.run(lambda rank, party: agree(FIELDS, party, timeout=10)) == [None] * 3


def test_a_rank_that_still_compiles_is_told_from_one_that_never_began(ranks):
    waiting = threading.Event()

    def work(rank, party):
        if rank == 0:
            try:
                agree(FIELDS, party, timeout=0.5)
            finally:
                waiting.set()
        elif rank == 1:
            with compiling(party):
                waiting.wait(10)
                agree(FIELDS, party, timeout=10)

    outcomes = ranks.run(work)
    assert outcomes[0] is not None and "ranks 1, 2 did not come within 0.5 s" in outcomes[0]
    assert "rank 1 began to compile and did not finish (slow, or dead); rank 2 did not begin" in outcomes[0]
    assert outcomes[1] == outcomes[0]  # the late rank obeys the verdict instead of waiting for the others


def test_a_failing_rank_stops_those_that_wait(ranks):
    def work(rank, party):
        with compiling(party):
            if rank == 1:
                time.sleep(0.2)
                raise ZeroDivisionError("no such kernel")
            agree(FIELDS, party, timeout=15)

    outcomes = ranks.run(work)
    assert outcomes[1] == "ZeroDivisionError: no such kernel"
    said = "AgreementError: rank 1 failed while compiling: ZeroDivisionError: no such kernel"
    assert [outcomes[0], outcomes[2]] == [said, said]
    assert max(ranks.seconds) < 3
    assert ranks.run(lambda rank, party: agree(FIELDS, party, timeout=10)) == [None] * 3


def test_a_graph_that_is_to_break_is_no_failure(ranks):
    """Dynamo converts its frame once more; ranks that are ahead wait for those that still do the first time."""

    def work(rank, party):
        time.sleep(0.1 * rank)
        try:
            with compiling(party):
                raise Broken("weights behind a read")
        except Broken:
            with compiling(party):
                agree(FIELDS, party, timeout=10)

    assert ranks.run(work) == [None] * 3


def test_a_rank_that_fails_after_agreeing_stops_those_that_meet(ranks):
    def work(rank, party):
        with compiling(party):
            agree(FIELDS, party, timeout=10)
            if rank == 0:
                raise ValueError("Inductor said no")
            meet(party, timeout=15)

    outcomes = ranks.run(work)
    assert outcomes[0] == "ValueError: Inductor said no"
    assert all("rank 0 failed while compiling: ValueError" in str(said) for said in outcomes[1:])
    assert ranks.run(lambda rank, party: agree(FIELDS, party, timeout=10)) == [None] * 3


def test_late_ranks_are_waited_for(ranks):
    times = {}

    def work(rank, party):
        time.sleep(0.4 * rank)
        agree(FIELDS, party, timeout=10)
        times[rank] = time.monotonic()

    assert ranks.run(work) == [None] * 3
    assert max(times.values()) - min(times.values()) < 0.6  # they met: nobody left before the last came


def test_an_agreement_error_is_not_told_twice():
    ranks = Ranks([dist.HashStore()] * 3)

    def work(rank, party):
        with compiling(party):
            try:
                agree({"plan": str(rank)}, party, timeout=10)
            except AgreementError as error:
                raise RuntimeError("wrapped by a compiler") from error

    assert ranks.run(work) == ["RuntimeError: wrapped by a compiler"] * 3
    assert {party.round() for party in ranks.parties} == {1}
    assert ranks.run(lambda rank, party: agree(FIELDS, party, timeout=10)) == [None] * 3


def test_an_abort_by_hand_reaches_who_waits_and_who_comes_later():
    ranks = Ranks([dist.HashStore()] * 3)

    def work(rank, party):
        time.sleep(0.1 * rank)
        if rank == 1:
            abort("by hand", party)
        else:
            agree(FIELDS, party, timeout=15)

    said = "AgreementError: rank 1 failed while compiling: by hand"
    assert ranks.run(work) == [said, None, said]


def test_an_abort_after_a_verdict_nobody_read_fails_the_next_round():
    ranks = Ranks([dist.HashStore()] * 2)
    party = ranks.parties[1]
    party.publish(0, FIELDS)  # rank 1 is interrupted right here; rank 0 comes, finds all, and goes on
    agree(FIELDS, ranks.parties[0], timeout=10)
    abort("interrupted", party)
    with pytest.raises(AgreementError, match="rank 1 failed while compiling: interrupted"):
        meet(ranks.parties[0], timeout=10)
    assert ranks.run(lambda rank, party: agree(FIELDS, party, timeout=10)) == [None] * 2


def test_random_failures_never_split_the_ranks():
    """Whatever the timing, a round is agreed for all ranks or for none."""
    import random

    ranks = Ranks([dist.HashStore()] * 4)
    for seed in range(25):
        rng = random.Random(seed)
        naps = [rng.choice([0, 0, 0.01, 0.06]) for _ in range(4)]
        failing = rng.choice([None, 0, 1, 2, 3])
        patience = rng.choice([0.03, 5])

        def work(rank, party, naps=naps, failing=failing, patience=patience):
            with compiling(party):
                time.sleep(naps[rank])
                if rank == failing:
                    raise ValueError("failed")
                agree(FIELDS, party, timeout=patience)

        outcomes = ranks.run(work)
        others = [said for rank, said in enumerate(outcomes) if rank != failing]
        assert len({said is None for said in others}) == 1, (seed, outcomes)
        if failing is not None:
            assert None not in others
        assert len({party.round() for party in ranks.parties}) == 1


def test_groups_of_one_world_do_not_meet():
    store = dist.HashStore()
    one, two = Ranks([store] * 2, (0, 2)), Ranks([store] * 2, (1, 3))
    assert one.run(lambda rank, party: agree({"plan": "a"}, party, timeout=5)) == [None] * 2
    assert two.run(lambda rank, party: agree({"plan": "b"}, party, timeout=5)) == [None] * 2


def test_fields_that_a_rank_lacks_differ():
    ranks = Ranks([dist.HashStore()] * 2)

    def work(rank, party):
        agree({"plan": "a", "lora": "x"} if rank else {"plan": "a"}, party, timeout=5)

    said = "AgreementError: ranks do not agree on 'lora': rank 0 has nothing; rank 1 has 'x'"
    assert ranks.run(work) == [said] * 2


def test_many_values_and_long_ones_stay_readable():
    ranks = Ranks([dist.HashStore()] * 7)
    said = ranks.run(lambda rank, party: agree({"plan": f"ring={rank}"}, party, timeout=5))[0]
    assert said is not None and "rank 3 has 'ring=3'; and 3 more values" in said
    long = "shard," * 100
    assert _excerpts([long + "pack", long + "overlap", None]) == [
        "..." + repr((long + "pack")[-54:]), "..." + repr((long + "overlap")[-57:]), "nothing"
    ]  # fmt: skip
    assert _excerpts(["a", "b"]) == ["'a'", "'b'"]
    assert _excerpts(["x" * 150, "y"])[0] == repr("x" * 100) + "..."


def test_alone_there_is_nothing_to_agree(monkeypatch):
    assert not dist.is_initialized()
    agree(FIELDS)
    meet(Party(None, 0, (0,)))
    abort("nobody hears")
    with pytest.raises(ZeroDivisionError), compiling():
        raise ZeroDivisionError
    monkeypatch.setenv("FASTPAR_TIMEOUT", "soon")
    with pytest.raises(OptionError, match="FASTPAR_TIMEOUT"):
        agree(FIELDS, Party(dist.HashStore(), 0, (0, 1)))


def test_a_store_that_is_gone_is_an_agreement_error():
    class Gone:
        def __getattr__(self, name):
            raise RuntimeError("connection reset")

    party = Party(Gone(), 1, (0, 1))
    with pytest.raises(AgreementError, match="rank 1 cannot reach the process group's store: conn"):
        agree(FIELDS, party, timeout=1)


# ------------------------------------------------------------------------------ real processes


def _scenarios(rank: int, world: int) -> dict[str, tuple[Outcome, float]]:
    """Every scenario in one set of processes: starting three takes longer than all that they do."""
    results: dict[str, tuple[Outcome, float]] = {}

    def scenario(name: str, work: Callable[[], Any]) -> None:
        dist.barrier()
        begin = time.monotonic()
        try:
            work()
            outcome = None
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        results[name] = (outcome, time.monotonic() - begin)

    def late() -> None:
        if rank == 1:
            time.sleep(1)
        agree(FIELDS)

    def missing() -> None:
        if rank == 2:
            time.sleep(2.5)
        agree(FIELDS, timeout=2)

    def aborting() -> None:
        with compiling():
            if rank == 0:
                time.sleep(0.5)
                raise ValueError("out of registers")
            agree(FIELDS, timeout=30)

    pair = dist.new_group([0, 2])
    mesh = dist.init_device_mesh("cpu", (world,), mesh_dim_names=("ulysses",))
    scenario("equal", lambda: agree(FIELDS))
    scenario("differs", lambda: agree({**FIELDS, "graph": "5f1c" if rank else "0bad"}))
    scenario("late", late)
    scenario("missing", missing)
    scenario("aborting", aborting)
    scenario("pair", lambda: agree({"replica": "a"}, pair, timeout=5))
    scenario("mesh", lambda: agree(FIELDS, mesh, timeout=5))
    for _ in range(20):
        agree(FIELDS, timeout=5)
    dist.barrier()
    party = party_of()
    assert party is not None
    before = party.store.num_keys()
    dist.barrier()
    for _ in range(20):
        agree(FIELDS, timeout=5)
    dist.barrier()
    # The barriers themselves may add a key or two; forty rounds would add eighty.
    results["keys"] = (str(party.store.num_keys() - before), 0.0)
    return results


def _process(rank: int, world: int, folder: str) -> None:
    # Rank 0 takes any free port and says which: a port chosen beforehand may be gone by the time it is used.
    port_file = Path(folder, "port")
    while rank and not port_file.exists():
        time.sleep(0.02)
    port = int(port_file.read_text()) if rank else 0
    store = dist.TCPStore("127.0.0.1", port, None, rank == 0, timedelta(seconds=30), wait_for_workers=False)
    if rank == 0:
        port_file.with_suffix(".tmp").write_text(str(store.port))
        port_file.with_suffix(".tmp").rename(port_file)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    Path(folder, f"{rank}.txt").write_text(repr(_scenarios(rank, world)))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.distributed
def test_real_processes(tmp_path):
    multiprocessing.set_forkserver_preload(["torch.distributed"])  # imported once instead of three times
    mp.start_processes(_process, args=(3, str(tmp_path)), nprocs=3, start_method="forkserver")
    results = [eval((tmp_path / f"{rank}.txt").read_text()) for rank in range(3)]

    def outcomes(name: str) -> list[Outcome]:
        return [result[name][0] for result in results]

    def slowest(name: str, among: Sequence[int] = (0, 1, 2)) -> float:
        return max(results[rank][name][1] for rank in among)

    assert outcomes("equal") == [None] * 3
    differs = "ranks do not agree on 'graph': rank 0 has '0bad'; ranks 1, 2 have '5f1c'"
    assert outcomes("differs") == [f"AgreementError: {differs}"] * 3
    assert outcomes("late") == [None] * 3
    assert all(0.9 < result["late"][1] < 3 for result in results)  # all of them waited for the late one
    for said in outcomes("missing"):
        assert said is not None and "rank 2 did not come within 2 s" in said
    assert slowest("missing", (0, 1)) < 4
    assert outcomes("aborting") == [
        "ValueError: out of registers",
        *["AgreementError: rank 0 failed while compiling: ValueError: out of registers"] * 2,
    ]
    assert slowest("aborting") < 2.5
    assert outcomes("pair")[::2] == [None, None]
    assert "rank 1 compiles for a mesh that it is not in" in str(outcomes("pair")[1])
    assert outcomes("mesh") == [None] * 3
    assert all(int(str(said)) <= 4 for said in outcomes("keys"))
