"""``python -m tests.zoo_processes``: the zoo through ``torch.compile`` on real processes, beside virtual ranks.

``tests.zoo_report`` proves what the programs of the ranks compute. That each process makes the same program of the same
model, that ranks agree on it, and that it runs as ``torch.compile`` runs it, is seen here only: each case is compiled
on processes of this machine (gloo) and called twice, as steps of one sampling run. Exits with 1 where a rank fails, or
is further than 1e-9 from the virtual rank that it is: they do the same operators, in float64 where a model lets them.
``--lowering inductor`` writes other kernels, so the bound is then that of captured graphs against eager.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

import fastpar
from fastpar.core.plan import Plan
from fastpar.run.launch import LaunchError, joined, launch

from .zoo import CASES
from .zoo.check import difference
from .zoo.ledger import tolerance

AT_ONCE = 8
"""Cases that one launch runs: starting processes takes as long as a small case."""
SAME = 1e-9


@dataclass(frozen=True)
class Job:
    names: tuple[str, ...]
    plan: str
    lowering: str


def work(job: Job) -> dict[str, float]:
    """By case how far the rank that is furthest off is from its virtual rank, in either of two calls."""
    warnings.simplefilter("ignore")  # the models' own
    torch.set_num_threads(1)
    found = {}
    with joined(), torch.no_grad():
        for name in job.names:
            torch._dynamo.reset()
            case = CASES[name]
            model = case.build()
            expected = fastpar.simulate(model, case.inputs, job.plan)[dist.get_rank()]
            torch._dynamo.reset()
            options = {"plan": job.plan, "lowering": job.lowering}
            run = torch.compile(model, backend="fastpar", options=options)
            steps, off = fastpar.generation(streams=1), torch.zeros(())
            for _ in range(2):
                with steps:
                    off = off.max(torch.tensor(difference(run(**case.inputs()), expected)))
            dist.all_reduce(off, dist.ReduceOp.MAX)
            found[name] = float(off)
    return found


def results(names: Sequence[str], plan: str, lowering: str) -> Iterator[tuple[str, float | str]]:
    """(case, how far off, or the error), several cases to a launch; where one fails, each has one of its own."""
    ranks = Plan.parse(plan).degree
    for start in range(0, len(names), AT_ONCE):
        some = tuple(names[start : start + AT_ONCE])
        try:
            yield from launch(work, Job(some, plan, lowering), ranks).items()
        except LaunchError:
            for name in some:
                try:
                    yield from launch(work, Job((name,), plan, lowering), ranks).items()
                except LaunchError as error:
                    yield name, str(error)


def allowed(name: str, lowering: str) -> float:
    return SAME if lowering == "eager" else tolerance(str(CASES[name].dtype).removeprefix("torch."))


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo_processes", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="PREFIX", help="cases whose names begin so; default all")
    parser.add_argument("--plan", default="ulysses=2")
    parser.add_argument("--lowering", choices=("eager", "inductor"), default="eager")
    args = parser.parse_args(given)
    names = [n for n in CASES if not args.only or n.startswith(tuple(args.only))]
    bad = 0
    for name, found in results(names, args.plan, args.lowering):
        wrong = isinstance(found, str) or not found <= allowed(name, args.lowering)
        bad += wrong
        said = found if isinstance(found, str) else f"{found:8.1e}  {'WRONG' if wrong else 'ok'}"
        print(f"{name:42} {said}", flush=True)
    print(f"\n{len(names) - bad} of {len(names)} cases are what virtual ranks are, under {args.plan}, {args.lowering}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
