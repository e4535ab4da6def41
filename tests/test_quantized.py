"""Quantized weights pass through rules: their products are products like any other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastpar

torch.set_num_threads(1)


class Int8Linear(torch.nn.Module):
    """Per-token dynamic int8 activations, per-channel int8 weights, ``torch._int_mm``."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        weight = torch.randn(n_out, n_in)
        scale = weight.abs().amax(1) / 127
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        scale = rows.abs().amax(-1, keepdim=True).clamp_min(1e-6) / 127
        product = torch._int_mm((rows / scale).round().to(torch.int8), self.weight.t())
        return (product * scale * self.scale).unflatten(0, x.shape[:-1])


class Fp8Linear(torch.nn.Module):
    """Row-wise scaled float8, ``torch._scaled_mm``."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(n_out, n_in).to(torch.float8_e4m3fn))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2).to(torch.float8_e4m3fn)
        product = torch._scaled_mm(rows, self.weight.t(), self.scale, self.scale, out_dtype=torch.bfloat16)
        return product.to(x.dtype).unflatten(0, x.shape[:-1])


class Block(torch.nn.Module):
    def __init__(self, linear: type[torch.nn.Module]) -> None:
        super().__init__()
        self.qkv, self.out = linear(32, 96), linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("linear", [Int8Linear, Fp8Linear])
@pytest.mark.parametrize("plan", ["ulysses=3", "gather=2", "ring=2"])
def test_quantized_products_are_sharded(linear: type[torch.nn.Module], plan: str) -> None:
    torch.manual_seed(0)
    report = fastpar.verify(Block(linear).eval(), (torch.randn(1, 37, 32),), plan=plan)
    assert report.ok, report.diverged_at
    assert not report.fallbacks
    assert report.flops_share < 1.1 / report.ranks


def test_torchao_weights_are_sharded() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torch.manual_seed(0)
    model = Block(torch.nn.Linear).eval().requires_grad_(False)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    report = fastpar.verify(model, (torch.randn(1, 37, 32),), plan="ulysses=3")
    assert report.ok and not report.fallbacks and report.flops_share < 1.1 / 3
