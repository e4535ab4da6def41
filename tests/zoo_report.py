"""``python -m tests.zoo_report``: the whole zoo, verified, and held against what is committed in docs/zoo.json.

Every case is captured once and verified under every plan on virtual ranks; ``--plans ring=3 cfg=2,torus=2`` takes any
other ones. Exits with 1 where a case does not work, where a whole run leaves out what the ledger has, or where there
are more fallbacks than it allows. A whole run writes the ledger where there is none, and ``--update`` adds to it; the
fallbacks of what it has only grow with ``--force``.
Results go to disk one by one: ``--resume`` continues a run that was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fastpar.core.plan import Plan

from .zoo import CASES, ledger
from .zoo.ledger import Cases

ROOT = Path(__file__).resolve().parent.parent
LEDGER = ROOT / "docs" / "zoo.json"
STREAM = ROOT / "build" / "zoo.jsonl"
PLANS = ("ulysses=3", "ulysses=4", "gather=3", "gather=4", "ring=3", "ulysses=2,ring=2", "torus=3", "tp=2", "cfg=2")
CASES_PER_PROCESS = 25  # what Dynamo and Inductor keep of a model does not all go with a reset
GOOD = 1.15  # flops_share over attainable_share that the design asks for


def main() -> int:
    args = arguments()
    begin = time.perf_counter()
    plans = [str(Plan.parse(text)) for text in args.plans]
    names = [n for n in CASES if not args.only or n.startswith(tuple(args.only))]
    done = restored(names, plans) if args.resume else {}
    if not done:
        STREAM.parent.mkdir(parents=True, exist_ok=True)
        STREAM.write_text("")
    print(f"{len(names)} cases, {len(done)} of them from the interrupted run; plans {' '.join(plans)}")
    print(HEADER, flush=True)
    for name, record in done.items():
        table(name, record)
    for name, record in run([n for n in names if n not in done], plans, args.jobs, args.timeout):
        done[name] = record
        with STREAM.open("a") as out:
            out.write(json.dumps({"name": name, "asked": plans, "record": record}) + "\n")
        table(name, record)
    now = {name: done[name] for name in CASES if name in done}
    return judge(args, now, time.perf_counter() - begin)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo_report", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="PREFIX", help="cases whose names begin so; default all")
    parser.add_argument("--plans", nargs="+", metavar="PLAN", default=PLANS, help="default " + " ".join(PLANS))
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one case")
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted run finished")
    parser.add_argument("--update", action="store_true", help="write docs/zoo.json")
    parser.add_argument("--force", action="store_true", help="with --update: even if the zoo got worse")
    return parser.parse_args()


def restored(names: list[str], plans: list[str]) -> Cases:
    """Records of an interrupted run with the same plans."""
    lines = STREAM.read_text().splitlines() if STREAM.exists() else []
    found: Cases = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # the line that was being written
            continue
        if entry["name"] in names and entry["asked"] == plans:
            found[entry["name"]] = entry["record"]
    return found


# -- worker processes -----------------------------------------------------------------------------


def run(names: list[str], plans: list[str], jobs: int, timeout: float) -> Iterable[tuple[str, dict[str, Any]]]:
    """(case, record) as they are finished. A case that ends its process is recorded as an error."""
    todo: queue.Queue[str] = queue.Queue()
    for name in names:
        todo.put(name)
    results: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
    for _ in range(min(jobs, len(names))):
        threading.Thread(target=_attend, args=(todo, results, plans, timeout), daemon=True).start()
    for _ in names:
        yield results.get()


def _attend(
    todo: queue.Queue[str], results: queue.Queue[tuple[str, dict[str, Any]]], plans: list[str], timeout: float
) -> None:
    """Hand cases to one worker process after the other."""
    context = get_context("spawn")
    while not todo.empty():
        here, there = context.Pipe()
        worker = context.Process(target=_work, args=(there, plans), daemon=True)
        worker.start()
        there.close()
        for _ in range(CASES_PER_PROCESS):
            try:
                name = todo.get_nowait()
            except queue.Empty:
                break
            record = _ask(here, name, timeout)
            if record is None:
                worker.kill()
                worker.join()
                why = f"took more than {timeout:g} s or ended its process (exit code {worker.exitcode})"
                case = CASES[name]
                record = {"class": case.cls, "family": case.family, "graphs": 0, "error": why, "plans": {}}
                results.put((name, record))
                break
            results.put((name, record))
        here.close()
        worker.join()


def _ask(worker: Connection, name: str, timeout: float) -> dict[str, Any] | None:
    try:
        worker.send(name)
        return worker.recv() if worker.poll(timeout) else None
    except (EOFError, OSError):
        return None


def _work(parent: Connection, plans: list[str]) -> None:
    import torch

    from .zoo.measure import measure

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the models' own, on every call
    while True:
        try:
            name = parent.recv()
        except EOFError:
            return
        parent.send(measure(name, plans))


# -- what is printed, and the verdict -------------------------------------------------------------

_TITLES = f"{'error':>8} {'split':>11} {'colls':>5} {'kB':>7} {'fallbacks':>9} {'s':>5}  verdict"
HEADER = f"{'case':42} {'graphs':>6} {_TITLES}"


def table(name: str, record: dict[str, Any]) -> None:
    """One line per case (the worst of its plans), and one per plan that does not work.

    ``split`` is the share of FLOPs of the busiest rank over the attainable one.
    """
    rows = [r for r in record["plans"].values() if "error" not in r]
    bad = list(ledger.lost({name: record}))
    numbers = f"{'':8} {'':>11} {'':>5} {'':>7} {'':>9}"
    if rows:
        split = max(r["flops_share"] / r["attainable_share"] for r in rows)
        numbers = (
            f"{max(r['max_rel_err'] for r in rows):8.1e} {split:9.2f}{' >' if split > GOOD else '  '} "
            f"{max(r['collectives'] for r in rows):5} {max(r['bytes'] for r in rows) / 1e3:7.1f} "
            f"{sum(f['count'] for r in rows for f in r['fallbacks']):9}"
        )
    seconds = record.get("seconds", 0) + sum(r.get("seconds", 0) for r in record["plans"].values())
    print(f"{name:42} {record['graphs']:6} {numbers} {seconds:5.0f}  {'LOST' if bad else 'ok'}", flush=True)
    for line in bad:
        print(f"    {line}", flush=True)


def judge(args: argparse.Namespace, now: Cases, seconds: float) -> int:
    """Compare with the ledger, write it where that is asked for and allowed; the exit code."""
    before = ledger.read(LEDGER)
    bad = list(ledger.lost(now))
    if not args.only and list(args.plans) == list(PLANS):
        bad += ledger.gone(before["cases"], now)
    # like is held against like: cases and plans that the ledger has and that were run
    allowed, counted = ledger.fallbacks(before["cases"], like=now), ledger.fallbacks(now, like=before["cases"])
    more = counted > allowed
    rows = [r for c in now.values() for r in c["plans"].values() if "error" not in r]
    fine = sum(r["flops_share"] <= GOOD * r["attainable_share"] for r in rows)
    works = len(now) - len({line.split(":")[0].split(" under ")[0] for line in ledger.lost(now)})
    print(f"\n{works} of {len(now)} cases work; {fine} of {len(rows)} verifications within {GOOD} of attainable;")
    print(f"{ledger.fallbacks(now)} fallbacks; of what the ledger has {counted}, {allowed} allowed")
    for line in bad:
        print(f"lost: {line}")
    if more:
        print(f"more fallbacks than committed: {counted}, and {allowed} are allowed")
    if args.update or not (LEDGER.exists() or args.only):
        if (more or bad) and LEDGER.exists() and not args.force:
            print("docs/zoo.json stays as it is; --force overwrites it nevertheless")
        else:
            cases = {n: merged(before["cases"].get(n), now.get(n)) for n in CASES if n in now or n in before["cases"]}
            ledger.write(LEDGER, {**heading(seconds), "fallbacks_total": ledger.fallbacks(cases), "cases": cases})
            print(f"wrote {LEDGER.relative_to(ROOT)}")
    return 1 if bad or more else 0


def merged(before: dict[str, Any] | None, now: dict[str, Any] | None) -> dict[str, Any]:
    """A new record, with the plans that only the ledger has."""
    if before is None or now is None:
        return now or before or {}
    return {**now, "plans": {**before["plans"], **now["plans"]}}


def heading(seconds: float) -> dict[str, Any]:
    import diffusers
    import torch

    import fastpar

    return {
        "command": " ".join(["python", "-m", "tests.zoo_report", *sys.argv[1:]]),
        "versions": {
            "fastpar": fastpar.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": ".".join(map(str, sys.version_info[:3])),
        },
        "seconds": round(seconds),
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores
    sys.exit(main())
