"""The tables of ``docs/published.md`` and of the terminal, from what ``python -m benchmarks.published`` found."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_INTRO = """# Published latencies, predicted

`python -m benchmarks.published` predicts every latency of `benchmarks/published/rows.csv` with the planner's own model
(`fastpar.plan.predict` on a workload captured at the published size) and writes this page and
`benchmarks/results/published.json`. Nothing here was measured by us.

## Method

- **Workloads.** Each denoiser is captured on fake tensors with one and with two blocks of each kind, and counted on to
  its published depth (`benchmarks/published/workloads.py`). Rows that time a whole pipeline also get the decoder (and
  the encoder of an image), counted operator by operator, and the text encoders, as weights and tokens. None of these
  is split over ranks.
- **Split.** A third of the rows, by a hash of the id (`split.may_fit`), fixed before any fit, is what constants may
  see. All other rows are only predicted.
- **Constants.** Three per device: what products and attention reach of the data sheet's FLOP/s, and seconds that the
  host needs per kernel launched from Python. Two per kind of link: what large messages reach, seconds per collective.
  One per software stack: a factor on its seconds. They are fitted together, least absolute logarithmic error, with a
  pull to common values where few rows know a device (`machines.KINDS`).
- **Shared by all rows, and not fitted**: memory traffic reaches 0.85 of the data sheet; a last-level cache is three
  times as fast as memory (eager's pointwise operators find small tensors there); attention with heads of 64 runs at
  0.85 of that with 128 (FlashAttention-2, section 4.1); FlashAttention-3 at 1.6 times FlashAttention-2 on Hopper
  (its paper: 1.5 to 2.0); convolutions of decoders reach 0.35 of what products reach; prompts of unsaid length have
  128 tokens where the pipeline does not pad them. The factors of the cache and of convolutions are assumptions that
  were kept because they lowered the error of fitted rows left out of the fit (five folds).
- **DistriFusion's rows** are replayed CUDA graphs, its library's default: kernels as eager has them, and no launches
  from Python. Its patches are read as rows of the whole batch; whether guidance was split first is unsaid.
- **fp8** counts products at twice the rate and half the bytes of weights; attention stays bf16.
- **Without the hardware** repeats the fit without a device's rows and predicts them from its data sheet and the other
  devices' mean efficiencies.
- **The baseline** has one constant: all FLOPs over ranks and peak, times one factor.
- **Explained or not** is decided by what a row says, never by its predicted error (`judge.py`). Rows that are not
  explained are predicted too where they can be, and stand in the table with the reason. Where two sources publish one
  configuration more than a fifth apart, neither is explained: no model of this kind can be right about both.

## How far to trust it

- It is not a blind test. Which rows are fitted was fixed first, and constants see no others; but the headline was
  printed at every run while the model was being written.
- Constants are many for so few fitted rows, so these come out much better than the others. Several stacks are known
  by one fitted row alone, which their factor then meets.
- On a device that no fitted row knows, trust the order of plans, not the milliseconds.
- Not modelled, and visible below: work that a stack leaves whole on every rank (ConsisID on six), stacks slowed by
  their host in other places than launches, all-reduce and point-to-point at different shares of one link, kernels
  that get less efficient as ranks get less to do, and rings across machines that do not hide under attention as the
  planner thinks they do: StreamFusion's gain from putting heads across machines is predicted too small.
"""


def headline(results: Mapping[str, Any]) -> str:
    """The figures that the rest of the page is about."""
    s, r = results["summary"], results["ranking"]
    most = s["constants_most_per"]
    return "\n".join([
        f"{s['rows']} rows: {s['fitted']} fitted, {s['test']} of the test, {s['unexplained']} not explained "
        f"({s['not_predicted']} of them not predicted)",
        f"{s['constants']} constants; at most {most['device']} per device, {most['link']} per link, "
        f"{most['stack']} per stack",
        f"median absolute error of fitted rows {s['median_fit']:.1%}",
        f"median absolute error of test rows {s['median_test']:.1%}; with every row that can be predicted "
        f"{s['median_test_all_predicted']:.1%}",
        f"without the hardware {s['median_without_the_hardware']:.1%}; baseline {s['median_baseline']:.1%}",
        *(f"pairs of plans more than 5% apart, {name.replace('_', ' ')}: {r[name]['right']} of {r[name]['pairs']} "
          f"ranked right" for name in ("explained", "all_predicted")),
    ])  # fmt: skip


def table(results: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> str:
    """One line per row: id, plan, seconds published and predicted, error, reason."""
    plans = {r["id"]: r["plan"] or "1 rank" for r in rows}
    lines = ["| row | plan | published s | predicted s | error | |", "|---|---|---|---|---|---|"]
    for r in results["rows"]:
        error = "-" if r["error"] is None else f"{100 * r['error']:+.0f}%"
        predicted = "-" if r["predicted"] is None else f"{r['predicted']:g}"
        note = r["reason"] or ("fitted" if r["fitted"] else "")
        lines.append(f"| {r['id']} | {plans[r['id']]} | {r['published']:g} | {predicted} | {error} | {note} |")
    return "\n".join(lines)


def text(results: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> str:
    """The whole page."""
    parts = [_INTRO, "## Found\n", "- " + headline(results).replace("\n", "\n- ") + "\n", _short(results)]
    apart = ["| device | test rows | median error without its rows |", "|---|---|---|"]
    for device, x in results["without_the_hardware"].items():
        apart.append(f"| {device} | {x['rows']} | {x['median']:.1%} |")
    parts += ["## Without the hardware\n", "\n".join(apart) + "\n", "## Constants\n"]
    lines = ["| of | constant | value |", "|---|---|---|"]
    lines += [f"| {what} {of} | {kind} | {value:g} |" for what, of, kind, value in results["constants"]]
    parts.append("\n".join(lines) + "\n")
    parts += ["## Not explained\n", _reasons(results), "## Plans of one configuration\n", _pairs(results, rows)]
    parts += ["## Every row\n", table(results, rows) + "\n", "## Published ratios\n"]
    lines = ["| ratio | published | predicted | |", "|---|---|---|---|"]
    for r in results["ratios"]:
        predicted = "-" if r["predicted"] is None else f"{r['predicted']:g}"
        lines.append(f"| {r['id']} | {r['published']:g} | {predicted} | {r['reason']} |")
    return "\n".join([*parts, "\n".join(lines) + "\n"])


def _short(results: Mapping[str, Any]) -> str:
    """Where the largest errors of explained test rows are, by the first parts of their ids."""
    groups: dict[str, list[float]] = {}
    for r in results["rows"]:
        if not r["reason"] and not r["fitted"]:
            groups.setdefault("-".join(r["id"].split("-")[:3]), []).append(abs(r["error"]))
    means = sorted(((sum(e) / len(e), name, len(e)) for name, e in groups.items()), reverse=True)
    lines = ["Where explained test rows are furthest off:\n", "| rows | number | mean absolute error |"]
    lines.append("|---|---|---|")
    lines += [f"| {name} | {n} | {mean:.0%} |" for mean, name, n in means[:12]]
    return "\n".join(lines) + "\n"


def _reasons(results: Mapping[str, Any]) -> str:
    """How many rows each reason takes out."""
    kinds = Counter(_kind(r["reason"]) for r in results["rows"] if r["reason"])
    lines = ["| reason | rows |", "|---|---|", *(f"| {reason} | {n} |" for reason, n in kinds.most_common())]
    return "\n".join(lines) + "\n"


def _kind(reason: str) -> str:
    """The reason without the names of plans and rows."""
    if reason.startswith("contradicted"):
        return "another source's time for the same configuration is more than a fifth apart"
    return re.sub("plan '.*' has", "the plan has", reason)


def _pairs(results: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> str:
    """Every pair of plans whose published times differ by over 5 %: where Ulysses, rings and others cross."""
    by = {r["id"]: r for r in rows}
    lines = ["Seconds of the first plan over those of the second, where these differ by over 5 %: where Ulysses, rings",
             "and others cross. Ranked wrong where one ratio is above 1 and the other below.\n",
             "| model, device, ranks | plans | published | predicted | |", "|---|---|---|---|---|"]  # fmt: skip
    for a, b, published, predicted, explained in results["ranking"]["pairs"]:
        row, wrong = by[a], (published > 1) != (predicted > 1)
        what = f"{row['model']} {row['width']}x{row['height']}, {row['device']}, {row['ranks']} ({row['stack']})"
        note = ", ".join(x for x in ("" if explained else "not explained", "wrong" if wrong else "") if x)
        lines.append(f"| {what} | {row['plan']} / {by[b]['plan']} | {published:g} | {predicted:g} | {note} |")
    return "\n".join(lines) + "\n"
