"""``auto``: every valid plan for a number of ranks, what each is predicted to take, and why one was chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fastpar.core.plan import Plan
from fastpar.plan.predict import USABLE, Prediction, predict
from fastpar.plan.topology import Topology
from fastpar.plan.workload import Workload

TIE = 0.05  # predictions nearer than this are not told apart
FINALISTS = 4  # so many of them are built and scheduled to tell them apart
CLEARLY = 0.01  # what a scheduled program must save to overturn the prediction


@dataclass(frozen=True)
class Verdict:
    """One plan: its prediction (None where it is invalid) and why it won, lost or is invalid."""

    plan: str
    prediction: Prediction | None
    reason: str


@dataclass(frozen=True)
class Choice:
    """The plan that was chosen, and all that were looked at, fastest first and invalid ones last."""

    plan: Plan
    topology: Topology
    verdicts: tuple[Verdict, ...]
    near: tuple[Prediction, ...] = ()  # what the prediction does not tell from the fastest, the chosen one first

    def decided(self, seconds: Mapping[str, float]) -> Choice:
        """The choice among plans that are near each other, once their programs were scheduled and played.

        ``seconds`` has the plans' texts. The chosen one stays unless another is faster by more than ``CLEARLY``.
        """
        was = str(self.plan)
        best = min(seconds, key=lambda text: seconds[text])
        if best == was or seconds[best] >= (1 - CLEARLY) * seconds[was]:
            return self
        mine = {v.plan: v for v in self.verdicts}
        lost = f"tie within {TIE:.0%} as predicted; scheduled, {_ms(seconds[was])}"
        first = Verdict(best, mine[best].prediction, f"{lost} of {was} against {_ms(seconds[best])}")
        rest = [Verdict(v.plan, v.prediction, lost) if v.plan == was else v for v in self.verdicts if v.plan != best]
        near = sorted(self.near, key=lambda p: str(p.plan) != best)
        return replace(self, plan=near[0].plan, verdicts=(first, *rest), near=tuple(near))

    @property
    def note(self) -> str:
        """What a report says of it, in a sentence."""
        won = self.verdicts[0]
        close = [v.plan for v in self.verdicts[1:] if v.reason.startswith("tie")]
        slower = [v for v in self.verdicts[1:] if v.plan == "one device" and v.prediction and won.prediction]
        seconds = won.prediction.seconds if won.prediction else 0.0
        tie = f"; as good by this model: {', '.join(close)}" if close else ""
        if slower and slower[0].prediction and slower[0].prediction.seconds < seconds:
            tie += f"; one device alone is faster, with {_ms(slower[0].prediction.seconds)}"
        return (
            f"plan auto: {self.plan} for {self.topology.name}, predicted {_ms(seconds)} per call{tie}"
        )


def choose(work: Workload, ranks: int, topology: Topology, lowering: str = "inductor") -> Choice:
    """The plan with the least predicted time among those that fit in memory.

    Raises OptionError where the topology has fewer devices. Where none fits, the one that needs least memory.
    """
    topology.check(ranks)
    invalid = []
    found: list[Prediction] = []
    for plan, why in _plans(work, ranks, topology):
        plan = _paced(plan, topology)
        if why:
            invalid.append(Verdict(str(plan), None, why))
        else:
            found.append(predict(work, plan, topology, lowering))
    limit = USABLE * topology.device.memory
    # Ties go to the plan with fewer terms, and of these to fewer bytes: less that can go wrong.
    fitting = [p for p in found if p.memory <= limit]
    best = min(fitting, key=lambda p: p.seconds) if fitting else min(found, key=lambda p: p.memory)
    near = [p for p in fitting if p.seconds <= (1 + TIE) * best.seconds] or [best]
    won = min(near, key=lambda p: (len(p.plan.axes), p.seconds))
    rows = sorted((p for p in found if p is not won), key=lambda p: (p.memory > limit, p.seconds))
    verdicts = [Verdict(str(won.plan), won, _won(won, limit))]
    alone = predict(work, Plan(ulysses=1), topology, lowering)
    if ranks > 1:
        verdicts.append(Verdict("one device", alone, _lost(alone, won, limit)))
    verdicts += [Verdict(str(p.plan), p, _lost(p, won, limit)) for p in rows]
    near = sorted(near, key=lambda p: (p is not won, p.seconds))[:FINALISTS]
    return Choice(won.plan, topology, (*verdicts, *invalid), tuple(near))


def _plans(work: Workload, ranks: int, topology: Topology) -> list[tuple[Plan, str]]:
    """Exact plans of ``ranks`` ranks; with a reason where one makes no sense for this model.

    A torus is weighed where ranks span several members of a link, between which it then is.
    """
    out: list[tuple[Plan, str]] = []
    for cfg in (1, 2):
        if ranks % cfg:
            continue
        n = ranks // cfg
        guided = [f"cfg={cfg}"] if cfg > 1 else []
        why = ""
        if cfg > 1 and work.batch % cfg:
            why = (
                "no batch of 2 in this call; where guidance runs as separate calls, give cfg=2 yourself"
                if work.batch == 1
                else f"a batch of {work.batch} is not split evenly by 2"
            )
        talking = any(a.split for a in work.attentions)
        for u in (d for d in range(1, n + 1) if n % d == 0):
            r = n // u
            terms = [*([f"ulysses={u}"] if u > 1 else []), *([f"ring={r}"] if r > 1 else []), *guided]
            plan = Plan.parse(",".join(terms or ["ulysses=1"]))
            out.append((plan, why or ("" if talking or r == 1 else "no attention whose keys are split")))
        inner = (math.prod(x.size for x in topology.levels[:i]) for i in range(1, len(topology.levels)))
        for machines in sorted({n // size for size in inner if size < n and n % size == 0} if talking else ()):
            for term in ("ring", "ulysses") if machines < n else ("",):
                inside = [f"{term}={n // machines}"] if term else []
                out.append((Plan.parse(",".join([f"torus={machines}", *inside, *guided])), why))
        if n > 1:
            out.append((Plan.parse(",".join([f"gather={n}", *guided])), why))
    return out


def _paced(plan: Plan, topology: Topology) -> Plan:
    """The plan with rows shared out by the speeds of its ranks' devices, where these differ (STADI's elastic patches).

    Guidance is the outermost axis; of ranks that have the same rows of several batch items the slowest one counts.
    """
    n = plan.token_degree
    speeds = tuple(min(topology.speed(rank) for rank in range(i, plan.degree, n)) for i in range(n))
    return replace(plan, speeds=speeds) if len(set(speeds)) > 1 else plan


def _won(p: Prediction, limit: float) -> str:
    if p.memory > limit:
        return f"needs least memory, but {_gb(p.memory)} of {_gb(limit)} usable: nothing fits"
    return f"fastest: {_ms(p.compute)} computing, {_ms(p.exposed)} exposed"


def _lost(p: Prediction, won: Prediction, limit: float) -> str:
    if p.memory > limit:
        return f"needs {_gb(p.memory)} of {_gb(limit)} usable"
    ratio = p.seconds / won.seconds
    if abs(ratio - 1) <= TIE:
        return f"tie within {TIE:.0%}: {_ms(p.exposed)} exposed"
    if p.exposed - won.exposed > p.compute - won.compute:
        return f"{ratio:.2f}x: {_ms(p.exposed)} of communication exposed, against {_ms(won.exposed)}"
    return f"{ratio:.2f}x: {_ms(p.compute)} computing, against {_ms(won.compute)}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{1e3 * seconds:,.0f} ms"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if math.isfinite(size) else "?"
