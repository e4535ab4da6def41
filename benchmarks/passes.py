"""Step time and exposed communication with each pass switched on in turn, on machines that nobody here has.

``python -m benchmarks.passes``: FLUX.1, CogVideoX and Wan at their real size on fake tensors, under the plan that the
planner chooses for each machine. Every row is the program that a pipeline makes, played on two streams with the
topology's costs: a call of the second step on, so that what runs once per generation is left out where ``hoist`` is
on, and the check of what it was made of comes before the step. Writes JSON, and the table and the figure of
docs/passes.md (``--page``: only these). Times are predictions.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import fastpar
from benchmarks.models import full_size
from fastpar.core.plan import Plan
from fastpar.core.record import write
from fastpar.graph.program import Program
from fastpar.graph.prologue import bytes_on_ranks, checked, split
from fastpar.graph.schedule import parts, play
from fastpar.ops.collectives import COLLECTIVES
from fastpar.plan.durations import durations
from fastpar.plan.expand import pipeline_text
from fastpar.plan.planner import choose
from fastpar.plan.topology import load
from fastpar.plan.workload import workload
from fastpar.run.build import build

MODELS = ("FLUX.1 1024 px", "CogVideoX-5B 20 s", "Wan2.1-14B 720p")
MACHINES = {"h100-8": 8, "l40-8": 8, "a100-4x8": 32}
STEPS = (
    ("as written", "lower"),
    ("split-weights", "lower,split-weights"),
    ("hoist", "lower,split-weights,hoist"),
    ("pack", "lower,split-weights,hoist,pack"),
    ("overlap", "lower,split-weights,hoist,overlap"),
)
"""Name of a row, and the end of its pipeline; fp8(qvo) follows with the last of them."""
OTHERS = {"h100-8": ("ulysses=8",), "l40-8": ("ulysses=8",)}
"""Plans beside the one that the planner chooses: what peers run on a machine of eight."""
RESULTS, PAGE, FIGURE = Path("benchmarks/results/passes.json"), Path("docs/passes.md"), Path("docs/passes.svg")


def measure(program: Program, plan: str, end: str, order: tuple[str, ...], machine: str) -> dict[str, Any]:
    """What a call takes under the plan with a pipeline that ends so."""
    begin = time.perf_counter()
    text = pipeline_text(Plan.parse(plan))
    passes = text[: text.index("lower")] + end
    built = build(program, plan, passes=passes, topology=machine, order=order, verify_structure=False)
    took = time.perf_counter() - begin
    costs = durations(built.mesh, machine)
    step = parts(built.lowered.graph)[1]
    found = play(step, costs.tasks(built.lowered.graph))
    cut = split(built.lowered)
    read = [part for several in checked(cut.prologue).values() for part in several] if cut is not None else []
    sizes = [max(bytes_on_ranks(built.lowered, part)) for part in read]
    check = costs.checked(sizes) if sizes else 0.0  # of what the prologue read, on every call
    ways = built.lowered.gm.meta.get("schedule")
    return {
        "plan": plan,
        "pipeline": passes,
        "milliseconds": round(1e3 * (check + found.seconds), 3),
        "computing": round(1e3 * (check + found.compute), 3),
        "checking": round(1e3 * check, 3),
        "communicating": round(1e3 * found.communication, 3),
        "exposed": round(1e3 * found.waited, 3),
        "collectives": sum(n.target in COLLECTIVES for n in step),
        "order": ways.ways[0].name if ways is not None else "as written",
        "not_done": [n for n in built.notes if n.startswith(("split-weights", "hoist"))],
        "seconds_to_build": round(took, 2),
    }


def rows(name: str) -> list[dict[str, Any]]:
    loaded = full_size(name)
    torch._dynamo.reset()
    program = fastpar.capture(loaded.model, loaded.inputs).programs[0].program
    work, out = workload(program), []
    for machine, ranks in MACHINES.items():
        verdicts = {v.plan: v.prediction for v in choose(work, ranks, load(machine)).verdicts}
        chosen = next(iter(verdicts))
        for plan in dict.fromkeys((chosen, *OTHERS.get(machine, ()))):
            won = verdicts[plan]
            assert won is not None
            for step, end in (*STEPS, ("fp8(qvo)", STEPS[-1][1])):
                asked = f"{plan},fp8(qvo)" if step == "fp8(qvo)" else plan
                found = {"model": name, "machine": machine, "base": plan, "chosen": plan == chosen, "step": step}
                found |= measure(program, asked, end, won.order, machine)
                out.append(found)
                print(f"{name:18} {machine:9} {asked:26} {step:14}{found['milliseconds']:>11.2f} ms "
                      f"{found['exposed']:>10.2f} exposed {found['collectives']:>5}  {found['order']}",
                      flush=True)  # fmt: skip
    return out


def table(results: list[dict[str, Any]]) -> str:
    """Milliseconds of a call, exposed in brackets: a line per model and machine, a column per pass."""
    names = [name for name, _ in STEPS] + ["fp8(qvo)"]
    lines = ["| model | machine | plan | " + " | ".join(names) + " | order |", "|---" * (len(names) + 4) + "|"]
    for group in groups(results):
        own = {r["step"]: r for r in group}
        model, machine = group[0]["model"], group[0]["machine"]
        cells = [f"{own[n]['milliseconds']:.4g} ({own[n]['exposed']:.3g})" for n in names]
        plan = f"`{group[0]['base']}`" + ("" if group[0]["chosen"] else ", not chosen")
        lines.append(f"| {model} | {machine} | {plan} | " + " | ".join(cells)
                     + f" | {own['overlap']['order']} |")  # fmt: skip
    return "\n".join(lines)


def groups(results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of one model, machine and plan together."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for r in results:
        found.setdefault((r["model"], r["machine"], r["base"]), []).append(r)
    return list(found.values())


def figure(results: list[dict[str, Any]]) -> str:
    """Bars as SVG: computing and, on top of it, exposed communication, each group over its first bar's length."""
    bar, gap, left, width = 14, 26, 300, 520
    per = len(STEPS) + 1
    height = len(groups(results)) * (per * bar + gap) + 50
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 120}" height="{height}" '
           'font-family="sans-serif" font-size="11">',
           f'<rect width="{left + width + 120}" height="{height}" fill="white"/>']  # fmt: skip
    for x, colour, what in ((left, "#4878a8", "computing"), (left + 110, "#d1603d", "exposed communication")):
        out.append(f'<rect x="{x}" y="12" width="10" height="10" fill="{colour}"/>'
                   f'<text x="{x + 15}" y="21">{what}</text>')  # fmt: skip
    y = 44
    for own in groups(results):
        longest = max(r["milliseconds"] for r in own)
        out.append(f'<text x="8" y="{y - 4}" font-weight="bold">'
                   f'{own[0]["model"]}, {own[0]["machine"]}, {own[0]["base"]}</text>')  # fmt: skip
        for r in own:
            busy = width * (r["milliseconds"] - r["exposed"]) / longest
            held = width * r["exposed"] / longest
            out.append(f'<text x="{left - 8}" y="{y + bar - 4}" text-anchor="end">{r["step"]}</text>'
                       f'<rect x="{left}" y="{y}" width="{busy:.1f}" height="{bar - 3}" fill="#4878a8"/>'
                       f'<rect x="{left + busy:.1f}" y="{y}" width="{held:.1f}" height="{bar - 3}" fill="#d1603d"/>'
                       f'<text x="{left + busy + held + 6:.1f}" y="{y + bar - 4}">{r["milliseconds"]:.4g} ms</text>'
                       )  # fmt: skip
            y += bar
        y += gap
    return "\n".join([*out, "</svg>"]) + "\n"


def page(results: list[dict[str, Any]]) -> None:
    """Put the table between the page's marks, and write the figure."""
    text = PAGE.read_text()
    begin, end = "<!-- table -->\n", "<!-- end -->"
    head, rest = text.split(begin)
    PAGE.write_text(head + begin + "\n" + table(results) + "\n\n" + end + rest.split(end)[1])
    FIGURE.write_text(figure(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="write docs/passes.md's table and figure from the results")
    args = parser.parse_args()
    if not args.page:
        write(RESULTS, [row for name in MODELS for row in rows(name)])
    page(json.loads(RESULTS.read_text())["results"])


if __name__ == "__main__":
    main()
