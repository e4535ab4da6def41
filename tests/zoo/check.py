"""Checks of one case: eager is finite and depends on its prompt, a compiled run agrees and is counted."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch

from .registry import Case


@dataclasses.dataclass
class Result:
    """What `check` saw. `graphs` is 0 when compilation was skipped."""

    name: str
    params: int
    tokens: int
    seconds: float
    graphs: int = 0
    error: float = 0.0
    problems: list[str] = dataclasses.field(default_factory=list)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def changed(value: Any) -> Any:
    """The same structure with other numbers; integers move by one and stay non-negative."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            return 0.5 * value + 0.3
        return torch.where(value > 0, value - 1, value + 1)
    if isinstance(value, (list, tuple)):
        return type(value)(changed(item) for item in value)
    raise TypeError(f"cannot change a {type(value).__name__}")


def difference(a: Any, b: Any) -> float:
    """Largest absolute difference over the largest reference, worst output."""
    worst = 0.0
    for x, y in zip(tensors(a), tensors(b), strict=True):
        x, y = x.double(), y.double()  # flags among them
        scale = max(float(y.abs().max()), 1e-30)
        worst = max(worst, float((x - y).abs().max()) / scale)
    return worst


@torch.no_grad()
def check(case: Case, compiled: bool = True) -> Result:
    """Run the case eagerly, with another prompt and compiled; collect what is wrong."""
    model = case.build()
    start = time.perf_counter()
    reference = model(**case.inputs())
    seconds = time.perf_counter() - start
    result = Result(case.name, sum(p.numel() for p in model.parameters()), case.tokens, seconds)

    outputs = list(tensors(reference))
    if not outputs:
        result.problems.append("no tensor comes out")
    for i, out in enumerate(outputs):
        if not out.isfinite().all():
            result.problems.append(f"output {i} is not finite")
        elif out.is_floating_point() and not 1e-3 <= float(out.std()) <= 1e2:
            result.problems.append(f"output {i} has standard deviation {float(out.std()):.1e}")

    inputs = case.inputs()
    inputs[case.prompt] = changed(inputs[case.prompt])
    if not difference(model(**inputs), reference) > 1e-6:
        result.problems.append(f"{case.prompt} does not change the output")

    if compiled:
        result.graphs, result.error = compare(model, case.inputs(), reference)
        if not result.error < (1e-9 if case.dtype == torch.float64 else 1e-5):
            result.problems.append(f"compiled differs from eager by {result.error:.1e}")
    return result


def compare(model: torch.nn.Module, inputs: dict[str, Any], reference: Any) -> tuple[int, float]:
    """Graphs that Dynamo makes, and the compiled run's difference from `reference`."""
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    found = torch.compile(model, backend=backend, dynamic=False)(**inputs)
    torch._dynamo.reset()
    return graphs, difference(found, reference)
