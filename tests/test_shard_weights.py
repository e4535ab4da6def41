"""shard_weights: parameters are shells, and every rank holds the parts that its programs take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fastpar
from fastpar.core.errors import FastparError
from fastpar.core.layout import Layout
from fastpar.core.mesh import Mesh
from fastpar.core.transfer import is_local
from fastpar.ops.redistribute import take
from fastpar.run.build import build
from fastpar.run.weights import Weight, files_of
from tests.programs import Recipe
from tests.programs import build as traced
from tests.prove import Way, prove
from tests.test_replicas import torchrun

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.GELU(), torch.nn.Linear(10, 6)).requires_grad_(False)


@pytest.mark.parametrize("plan", ["tp=2", "tp=3", "ulysses=2,tp=2"])
def test_programs_that_are_given_parts_are_exact(plan: str) -> None:
    steps = (("self_attention", {"fused": True}), ("gated", {}))
    case = traced(Recipe(batch=2, tokens=5, heads=3, width=4, steps=steps))
    way = Way.of(plan, case.program)
    prove(case, Way(way.mesh, way.pipeline.replace("lower", "lower,hold")))
    built = build(case.program, plan, hold=True)
    assert str(built.pipeline).endswith("lower,arrange,split-weights,hold,hoist,overlap,pin")
    cut = [n for n in built.lowered.placeholders if not n.meta["layout"].is_whole]
    assert len(cut) == 6  # weight and bias of the columns, weight of the rows, of both
    for node in cut:
        assert not is_local(node.meta["layout"], Layout.whole(node.meta["val"].shape), way.mesh)


@pytest.mark.parametrize("text", ["[6@tp(4,2), 4]", "[2@tp(1*2)+4@tp(1,3), 4]", "[6, 4@tp(4,0)]", "[6@tp(3*2), 4]"])
def test_a_part_is_read_from_memory_and_from_a_file(tmp_path: Path, text: str) -> None:
    whole, layout, mesh = torch.randn(6, 4), Layout.parse(text), Mesh((("tp", 2),))
    save_file({"w": whole}, tmp_path / "x.safetensors")
    for rank in range(2):
        for file in (None, tmp_path / "x.safetensors"):
            weight = Weight("w", whole, torch.device("cpu"), file)
            assert torch.equal(weight.part(layout, mesh, rank, None), take(whole, layout, mesh, rank))
            assert weight.whole is None and weight.bytes == weight.held.numel() * 4  # type: ignore[union-attr]
            assert file is None or torch.equal(weight.restored(), whole)


def test_one_process_restores_and_runs_as_before(model: torch.nn.Module) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 6)
    expected, weight = model(x), model[0].weight
    values = weight.clone()
    compiled = torch.compile(model, backend="fastpar", options={"plan": "tp=1"})
    with fastpar.shard_weights(compiled) as weights:
        assert weight.isnan().all() and weight.shape == (10, 6)
        assert torch.equal(compiled(x), expected)
        assert weights.bytes == weights.whole_bytes == 4 * (60 + 10 + 60 + 6)
        with pytest.raises(FastparError, match="sharded already"):
            fastpar.shard_weights(model)
        assert model(x).isnan().all()  # not compiled: it shows
    assert torch.equal(weight, values) and torch.equal(compiled(x), expected) and torch.equal(model(x), expected)


def test_a_model_on_the_meta_device_is_read_from_files(model: torch.nn.Module, tmp_path: Path) -> None:
    torch._dynamo.reset()
    state = model.state_dict()
    names = sorted(state)
    for i, half in enumerate((names[:2], names[2:])):
        save_file({n: state[n] for n in half}, tmp_path / f"m-{i}.safetensors")
    index = {"weight_map": {n: f"m-{int(n in names[2:])}.safetensors" for n in names}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    with torch.device("meta"):
        empty = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.GELU(), torch.nn.Linear(10, 6))
    empty.requires_grad_(False)
    with pytest.raises(FastparError, match="which device"):
        fastpar.shard_weights(empty, tmp_path)
    with pytest.raises(FastparError, match="give the files"):
        fastpar.shard_weights(empty, device="cpu")
    weights = fastpar.shard_weights(empty, tmp_path, device="cpu")
    assert weights.bytes == 0
    x = torch.randn(3, 6)
    assert torch.equal(torch.compile(empty, backend="fastpar", options={"plan": "tp=1"})(x), model(x))
    weights.restore()
    assert torch.equal(empty(x), model(x))


def test_bad_files_are_named(model: torch.nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FastparError, match="no safetensors at"):
        files_of(tmp_path)
    save_file({"0.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(FastparError, match=r"no file has the parameter '0.bias'"):
        fastpar.shard_weights(model, tmp_path)
    weight = Weight("0.weight", model[0].weight, torch.device("cpu"), tmp_path / "x.safetensors")
    with pytest.raises(FastparError, match="the model as"):
        weight.restored()


@pytest.mark.distributed
def test_two_processes_hold_half_of_the_cut_weights_and_give_them_back() -> None:
    printed = torchrun("tp=2", script="tests.scripts.parts", ranks=2)
    assert [printed.count(what) for what in ("off by", "recompiled 0", "restored", "read")] == [2] * 4
