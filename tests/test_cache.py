"""Compiled code that is found again: by the same program, in another process too, and by no other one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.utils import fresh_cache
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastpar.backends import cache
from fastpar.backends.cache import kept, key
from fastpar.backends.inductor import compile_inductor
from fastpar.backends.pinned import pin
from fastpar.core import version
from fastpar.core.version import source_hash
from fastpar.graph.program import Program
from fastpar.run.build import build
from fastpar.run.origin import fields, origin
from tests.test_cfg import Block, inputs
from tests.test_pinned import C10D

ROOT = Path(__file__).resolve().parent.parent


def exchanging(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    first = C10D.all_reduce(x @ w, "sum", "g")
    return (C10D.wait_tensor(first) + (x * 2).sin() @ w,)


def program(plan: str = "ulysses=2", passes: str | None = None, topology: str | None = None) -> Any:
    import fastpar

    torch.manual_seed(0)
    captured = fastpar.capture(Block().double().eval(), inputs(1)).programs[0].program
    return build(captured, plan, passes=passes, topology=topology)


@pytest.fixture
def group() -> Iterator[str]:
    """The name of a process group of two ranks in which nothing moves."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def test_a_pinned_program_is_kept_and_found(group: str) -> None:
    """Without help Inductor keeps no graph with pinned edges: every restart would compile it anew."""
    built = program()
    local = built.localise(0, {("ulysses",): group})
    found: list[Sequence[int]] = []
    with fresh_cache():
        for made in ("one", "one", "other"):
            counters.clear()
            compile_inductor(replace(local.copy(), origin=made))
            seen = counters["inductor"]
            found.append([seen[f"fxgraph_cache_{what}"] for what in ("miss", "hit", "bypass")])
    assert found == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]


def test_the_key_sees_what_pinned_operators_do() -> None:
    """A pinned operator is a body beside the graph, whose text is the same whatever it does."""

    def traced(scale: float) -> torch.fx.GraphModule:
        def two(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
            first = C10D.all_reduce(x @ w, "sum", "g")
            second = C10D.all_reduce(x * scale, "sum", "g")
            return C10D.wait_tensor(first), C10D.wait_tensor(second)

        gm = make_fx(two, tracing_mode="fake")(torch.randn(4, 4), torch.randn(4, 4))
        pin(gm.graph)
        return gm

    empty = Program(traced(2.0), (), origin="one")
    assert key(empty, traced(2.0)) == key(empty, traced(2.0))
    assert key(empty, traced(2.0)) != key(empty, traced(3.0))
    assert key(empty, traced(2.0)) != key(replace(empty, origin="other"), traced(2.0))


def test_origins_differ_by_all_that_was_chosen() -> None:
    here = program()
    base = origin(fields(here, "inductor"), here)
    assert base == origin(fields(program(), "inductor"), program())
    text = str(here.pipeline).replace(",overlap,pin", "")
    others = [program("ring=2"), program(passes=text), program(topology="l40-8")]
    found = [origin(fields(here, "eager"), here), *(origin(fields(o, "inductor"), o) for o in others)]
    assert len({base, *found}) == 1 + len(found)


def test_the_source_is_a_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three folders count."""
    seen = source_hash()
    for name in version.PACKAGES:
        (folder := tmp_path / name).mkdir()
        (folder / "one.py").write_text(name)
    monkeypatch.setattr(version, "_folders", lambda name: [str(tmp_path / name)])
    found = {seen, source_hash.__wrapped__()}
    for name in version.PACKAGES:
        (tmp_path / name / "one.py").write_text("changed")
        found.add(source_hash.__wrapped__())
    assert len(found) == 5


def test_another_state_of_the_source_compiles_anew(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without an origin: code of before would call our operators with the arguments that they had then."""
    local = program().localise(0, {("ulysses",): group})
    assert not local.origin
    hits: list[int] = []
    with fresh_cache():
        for source in ("before", "before", "after"):
            monkeypatch.setattr(cache, "source_hash", lambda source=source: source)
            counters.clear()
            compile_inductor(local.copy())
            hits.append(counters["inductor"]["fxgraph_cache_hit"])
    assert hits == [0, 1, 0]


def test_with_several_ranks_no_benchmark_decides() -> None:
    gm = make_fx(exchanging, tracing_mode="fake")(torch.randn(4, 4), torch.randn(4, 4))
    before = config.deterministic
    for ranks, expected in ((2, True), (1, before)):
        built = program(f"ulysses={ranks}")
        with kept(built.lowered, gm):
            assert config.deterministic == expected
    assert config.deterministic == before


@pytest.mark.slow
def test_after_a_restart(tmp_path: Path) -> None:
    def run(plan: str) -> dict[str, int]:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "tests" / "scripts" / "restart.py"), plan]
        out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=True, cwd=ROOT)
        return dict(json.loads(out.stdout.splitlines()[-1]))

    first, second, other = run("ulysses=2"), run("ulysses=2"), run("ring=2")
    assert set(first) == {"fxgraph_cache_miss"} and set(second) == {"fxgraph_cache_hit"}
    assert first["fxgraph_cache_miss"] == second["fxgraph_cache_hit"]
    assert other.get("fxgraph_cache_miss", 0) >= 1 and "fxgraph_cache_bypass" not in other
