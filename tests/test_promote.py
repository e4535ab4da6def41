"""promote: float32 inside a model becomes float64, in values, metadata and results."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastpar.graph.capture import capture
from fastpar.graph.promote import promote, promote_args

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Dtypes(torch.fx.Interpreter):
    """Runs a graph and compares every value's shape and dtype with the metadata."""

    def run_node(self, n):
        result, value = super().run_node(n), n.meta.get("val")
        if isinstance(value, torch.Tensor) and n.op != "output":
            assert (result.dtype, result.shape) == (value.dtype, value.shape), n.format_node()
            assert result.dtype not in (torch.float32, torch.bfloat16, torch.complex64), n.format_node()
        return result


def promoted(fn, *inputs):
    """Results of the promoted program, after checking all dtypes in it; and the program."""
    recorded = capture(fn, inputs).programs[0]
    before = recorded.program.hash()
    program = promote(recorded.program)
    assert recorded.program.hash() == before
    return Dtypes(program.gm).run(*promote_args(recorded.args)), program


def test_promote_args():
    args = [torch.ones(2, dtype=d) for d in (torch.float32, torch.bfloat16, torch.complex64, torch.int64)]
    args += [torch.ones(2).to(torch.float8_e4m3fn), 3, None, nn.Parameter(torch.ones(2))]
    dtypes = [a.dtype if isinstance(a, torch.Tensor) else a for a in promote_args(args)]
    f64, c128 = torch.float64, torch.complex128
    assert dtypes == [f64, f64, c128, torch.int64, torch.float8_e4m3fn, 3, None, f64]


def test_casts_inside_are_promoted():
    x = torch.randn(4, 8, dtype=torch.float64)

    def norm(x):
        y = x.to(torch.float32)
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    (out,), program = promoted(norm, x)
    exact = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert (out - exact).abs().max() < 1e-15 < (norm(x) - exact).abs().max()
    assert program.notes[-1].startswith("promoted to float64: 1 casts")


def test_bfloat16_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()).bfloat16()
    x = torch.randn(4, 8).bfloat16()
    (out,), _ = promoted(model, x)
    with torch.no_grad():
        assert torch.equal(out, model.double()(x.double()))


def test_timestep_embedding_from_integers():
    def embed(t):
        freqs = torch.exp(-4.0 * torch.arange(0, 4, dtype=torch.float32) / 4)
        angles = t[:, None].float() * freqs[None]
        return torch.cat([torch.cos(angles), torch.sin(angles)], -1)

    t = torch.tensor([3, 981])
    (out,), _ = promoted(embed, t)
    angles = t[:, None].double() * torch.exp(-4.0 * torch.arange(0, 4, dtype=torch.float64) / 4)[None]
    assert (out - torch.cat([angles.cos(), angles.sin()], -1)).abs().max() < 1e-13


DEFAULTS = {
    "division": lambda i: i / 3,
    "times a number": lambda i: i * 0.1,
    "function": lambda i: torch.sin(i),
    "power": lambda i: torch.pow(0.9, i),
    "where": lambda i: torch.where(i > 1, 0.1, 0.2),
    "arange": lambda i: i + torch.arange(0.0, 3.0, 1.0),
    "linspace": lambda i: i + torch.linspace(0, 1, 3),
    "full": lambda i: i + torch.full((3,), 0.1),
    "tensor": lambda i: i + torch.tensor([0.1, 0.2, 0.3]),
    "mean": lambda i: i.to(torch.float16).mean(dtype=torch.float32),
    "softmax": lambda i: torch.softmax(i.to(torch.bfloat16), 0, dtype=torch.float32),
    "complex": lambda i: torch.view_as_real(
        torch.polar(torch.ones(3), i.float()) * torch.complex(i.float(), i.float())
    ),
    "like": lambda i: torch.ones_like(i, dtype=torch.float32) * i,
    "embedding": lambda i: nn.functional.embedding(i, torch.ones(5, 2)),
    "masked_fill": lambda i: torch.zeros(3).masked_fill(i > 1, -1e9),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_dtype_does_not_come_back(name):
    i = torch.arange(3)
    (out,), _ = promoted(DEFAULTS[name], i)
    assert out.dtype == torch.float64
    # Constants such as 0.1 in a tensor were rounded to float32 before; numbers in operators were not.
    assert torch.allclose(out, DEFAULTS[name](i).double(), rtol=1e-2, atol=1e-6)


def test_constants_are_promoted_and_the_original_kept():
    program = capture(lambda x: x * torch.tensor([1.5, 2.5]), (torch.ones(2),)).programs[0].program
    new = promote(program)
    (constant,) = [n for n in new.graph.nodes if n.op == "get_attr"]
    assert getattr(new.gm, constant.target).dtype == torch.float64
    (constant,) = [n for n in program.graph.nodes if n.op == "get_attr"]
    assert getattr(program.gm, constant.target).dtype == torch.float32


def test_bits_are_not_promoted():
    def fn(x):
        return x.float().view(torch.int32) + 1

    recorded = capture(fn, (torch.ones(2),)).programs[0]
    program = promote(recorded.program)
    assert "reads the bits" in program.notes[-1]
    assert torch.equal(program.gm(*promote_args(recorded.args))[0], fn(torch.ones(2)))


def test_transformer_is_float64_throughout():
    from tests.zoo import CASES

    case = CASES["FluxTransformer2DModel"]
    recorded = capture(case.build(), case.inputs()).programs[0]
    program = promote(recorded.program)
    out = Dtypes(program.gm).run(*promote_args(recorded.args))
    assert (out[0] - recorded.outputs[0]).abs().max() < 1e-2
