"""What a report says, as facts and tables, for whoever shows them: the terminal, or a page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastpar.report.words import legend, ms, once, predicted, sampling, size

if TYPE_CHECKING:
    from fastpar.run.report import Report


@dataclass(frozen=True)
class Section:
    """A table, or only a title where there is nothing to list. A heading that ends in > is of numbers. ``below`` are
    sentences that follow it. ``long``: it may have more rows than one reads."""

    title: str
    headings: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    below: tuple[str, ...] = ()
    long: bool = False


def what(report: Report) -> list[tuple[str, str]]:
    """Which plan this is about, as names and texts."""
    return [
        ("plan", report.plan),
        ("pipeline", report.pipeline),
        ("ranks", f"{report.ranks}, {report.graphs} graph{'s' * (report.graphs > 1)}"),
    ]


def verdict(report: Report) -> list[tuple[str, str]]:
    """What ``verify`` has found."""
    errors = f"{report.max_rel_err:.1e} relative, {report.max_abs_err:.1e} absolute"
    found = [("error", f"{errors}: the worst output of any rank"), ("tolerance", f"{report.tolerance:.1e} relative")]
    return [*found, *([("diverged at", report.diverged_at)] if report.diverged_at else [])]


def facts(report: Report) -> list[tuple[str, str]]:
    """Work, bytes and time of a rank, beside what could be attained and the closed form."""
    n = report.ranks
    against = f", {report.bytes_per_rank / report.bytes_formula:.3f} times" if report.bytes_formula else ""
    found = [
        (
            "FLOPs",
            f"{report.flops_share:.4f} of one device's on the busiest rank (1/{n} is {1 / n:.4f}, attainable "
            f"{report.attainable_share:.4f})",
        ),
        ("time", f"{report.time_share:.4f} of one device's, computing only, on a roofline"),
        ("bytes", f"{report.bytes_per_rank:,} ({size(report.bytes_per_rank)}) leave the busiest rank per call"),
        ("formula", f"{report.bytes_formula:,}{against}: {report.formula}"),
        *(("", legend(values)) for values in report.symbols),
    ]
    if report.hoisted.values:
        found.append(("hoisted", once(report)))
    if report.carried_bytes:
        found.append(("carried", f"{report.carried_bytes:,} bytes of the others' activations, from step to step"))
    if report.predicted:
        found.append(("predicted", predicted(report)))
    if report.generation:
        found.append(("generation", sampling(report.generation)))
    return found


def sections(report: Report) -> list[Section]:
    """The tables, in the order in which one reads them."""
    found = [plans(report), links(report), orders(report), exposed(report), collectives(report), replicated(report),
             fallbacks(report)]  # fmt: skip
    return [section for section in found if section is not None]


def took(report: Report) -> str:
    """Seconds of the passes."""
    each = ", ".join(f"{name} {seconds:.2f}" for name, seconds in report.seconds.items())
    return f"seconds: {each}; {sum(report.seconds.values()):.2f} in all"


def plans(report: Report) -> Section | None:
    """Every plan that was weighed; those that are none for this call by the reason that they share."""
    if not report.plans:
        return None
    outer = _outermost(report)
    invalid: dict[str, list[str]] = {}
    rows = []
    for row in report.plans:
        if row.milliseconds is None or row.exposed is None or row.bytes is None or row.gigabytes is None:
            invalid.setdefault(row.reason, []).append(row.plan)
            continue
        cells = [ms(row.milliseconds), ms(row.exposed), size(row.bytes), size(row.gigabytes * 1e9)]
        if outer:
            cells.append(", ".join(axis for axis, link in row.links.items() if link == outer) or "nothing")
        rows.append((row.plan, *cells, row.reason))
    across = (f"over {outer}",) if outer else ()
    return Section(
        f"Plans for {report.topology}, predicted per call and rank",
        ("plan", "ms>", "of it exposed>", "sent>", "memory>", *across, "why"),
        tuple(rows),
        tuple(f"not for this call: {'; '.join(plans)}: {reason}" for reason, plans in invalid.items()),
    )


def links(report: Report) -> Section | None:
    """What crosses each class of links, where there are several."""
    if len(report.links) < 2:
        return None
    rows = tuple(
        (x.name, "device" if x.ranks == 1 else f"{x.ranks} devices", ", ".join(x.axes) or "none", f"{x.bytes:,}",
         f"{x.formula:,}", f"{x.bytes / x.formula:.3f}" if x.formula else "-")
        for x in report.links
    )  # fmt: skip
    return Section("What leaves one end", ("link", "of each", "axes", "bytes>", "by the formula>", "times>"), rows)


def orders(report: Report) -> Section | None:
    """What ``overlap`` weighed."""
    if not report.orders:
        return None
    rows = tuple((o.order, ms(o.milliseconds), ms(o.exposed), str(o.collectives)) for o in report.orders)
    return Section("Orders weighed, the first is taken", ("order", "ms>", "of it exposed>", "collectives>"), rows)


def exposed(report: Report) -> Section | None:
    """What stays exposed in the order that was taken."""
    if not report.orders or not report.exposed:
        return None
    rows = tuple((ms(e.milliseconds), str(e.count), e.reason, e.source or "(an input)") for e in report.exposed)
    title = f"{sum(e.count for e in report.exposed)} exchanges stay exposed"
    return Section(title, ("ms>", "count>", "why", "source line"), rows, long=True)


def collectives(report: Report) -> Section:
    """Every exchange of a call."""
    if not report.collectives:
        return Section("no collectives: nothing is exchanged")
    count = sum(c.count for c in report.collectives)
    title = f"{count} collectives per call; by the formula, before messages are joined, {report.collectives_formula}"
    rows = tuple(
        (c.kind, c.axis, f"{c.bytes:,}", str(c.count), c.why, c.source or "(an input)")
        for c in sorted(report.collectives, key=lambda c: -c.bytes)
    )
    return Section(title, ("kind", "axis", "bytes>", "count>", "for", "source line"), rows)


def replicated(report: Report) -> Section | None:
    """Work that is not split."""
    if not report.replicated:
        return None
    share = sum(r.share for r in report.replicated)
    rows = tuple((r.operator, f"{r.share:.3%}", r.source) for r in report.replicated)
    title = f"work that every rank repeats: {share:.2%} of one device's FLOPs"
    return Section(title, ("operator", "share>", "source line"), rows, long=True)


def fallbacks(report: Report) -> Section:
    """What had to be gathered."""
    if not report.fallbacks:
        return Section("no fallbacks: nothing is gathered that the plan did not ask for")
    rows = tuple(
        (f.operator, f.kind, f"{f.bytes:,}", f.reason, f.source)
        for f in sorted(report.fallbacks, key=lambda f: -f.bytes)
    )
    title = f"{len(report.fallbacks)} fallbacks: exchanges that no plan asked for"
    return Section(title, ("operator", "kind", "bytes>", "reason", "source line"), rows, long=True)


def _outermost(report: Report) -> str:
    """The outermost link that any plan crosses, if some plans' axes cross others."""
    names = {link: None for row in report.plans for link in row.links.values()}
    outer = [x.name for x in report.links if x.name in names]
    return outer[-1] if len(names) > 1 and outer else ""
