"""Where a wrong program first goes wrong: the first node whose value differs from eager's."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fastpar.backends.simulate import run_global, with_carried
from fastpar.core.errors import FastparError
from fastpar.core.layout import Layout
from fastpar.graph.program import source_line, target_name
from fastpar.ops.redistribute import assemble
from fastpar.run.build import Built
from fastpar.run.rounded import Rounded


class _Found(Exception):
    pass


def first_difference(built: Built, args: list[Any], tolerance: float, own: Rounded | None = None) -> str:
    """Runs the lowered program beside the captured one; names the node, its operator and source line.

    Of a plan that rounds, ``own`` is what to compare with: the same rounding on one device.
    """
    reference: dict[str, Any] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            reference[n.name] = value
            return value

    if own is not None:
        reference = own.values
    else:
        with torch.no_grad():
            Keep(built.captured.gm).run(*args)
    mesh = built.mesh
    where: list[str] = []

    def watch(node: fx.Node, values: list[Any]) -> None:
        origin = node.meta.get("origin")
        layout = node.meta.get("layout")
        if origin not in reference or not isinstance(layout, Layout) or not isinstance(values[0], torch.Tensor):
            return
        expected = reference[origin]
        if not expected.is_floating_point() or expected.numel() == 0:
            return
        for rank, whole in enumerate(assemble(values, layout, mesh)):
            scale = float(expected.abs().nan_to_num().max()) or 1.0
            difference = float((whole - expected).abs().nan_to_num().max()) / scale
            if difference > max(tolerance, 1e-12) * 0.1:
                where.append(
                    f"{node.name} ({target_name(node.target)}) on rank {rank}, off by {difference:.1e}: "
                    f"{source_line(node)}"
                )
                raise _Found

    try:
        run_global(built.lowered, with_carried(built.lowered, args), watch)
    except _Found:
        return where[0]
    except (FastparError, RuntimeError) as error:
        return f"the lowered program does not run: {error}"
    return "only the outputs differ: the localised programs are not what the lowered one says"
