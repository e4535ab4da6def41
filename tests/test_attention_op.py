"""fastpar::attention against eager SDPA: masks, groups, causality, size zero, layouts, FLOPs."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils.flop_counter import FlopCounterMode

from fastpar.core.errors import CaptureError
from fastpar.graph.normalise import keep_whole
from fastpar.graph.tidy import tidy
from fastpar.ops.attention import ATTENTION_OPS, attention, attention_adapter, output_shape

aten = torch.ops.aten


def qkv(shape=(2, 3), s=5, t=7, e=8, ev=8, dtype=torch.float64, kv_heads=None):
    gen = torch.Generator().manual_seed(0)
    lead_kv = shape if kv_heads is None else (*shape[:-1], kv_heads)
    sizes = (*shape, s, e), (*lead_kv, t, e), (*lead_kv, t, ev)
    return [torch.randn(size, generator=gen, dtype=torch.float64).to(dtype) for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(3,), (2, 3), (2, 2, 3)])
def test_equals_eager(lead, dtype):
    q, k, v = qkv(lead, dtype=dtype)
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert torch.equal(attention(q, k, v, scale=0.3), F.scaled_dot_product_attention(q, k, v, scale=0.3))


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (5, 1), (1, 1, 5, 7), (2, 1, 1, 7), (1, 3, 5, 7), (2, 3, 5, 7)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_broadcast(shape, kind):
    q, k, v = qkv()
    gen = torch.Generator().manual_seed(1)
    mask = torch.rand(shape, generator=gen, dtype=q.dtype)
    mask = mask > 0.3 if kind == "bool" else mask
    assert torch.equal(attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_without_keys_are_zero(kind):
    q, k, v = qkv()
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[1] = False
    if kind == "float":
        mask = torch.zeros(5, 7, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    out = attention(q, k, v, mask)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, mask))
    assert out[:, :, 1].abs().max() == 0 and out[:, :, 0].abs().min() > 0


def test_groups_and_causal():
    q, k, v = qkv((2, 4), s=6, t=6, kv_heads=2)
    ref = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(attention(q, k, v, None, True, None, True), ref)


@pytest.mark.parametrize("lead, s, t", [((0, 3), 5, 7), ((2, 0), 5, 7), ((2, 3), 0, 7), ((2, 3), 5, 0), ((0,), 5, 7)])
def test_size_zero(lead, s, t):
    q, k, v = qkv(lead, s=s, t=t, ev=4)
    out = attention(q, k, v)
    assert out.shape == (*lead, s, 4) and not out.any()
    masked = attention(q, k, v, torch.ones(s, t, dtype=torch.bool))
    assert masked.shape == out.shape and not masked.any()


def test_size_zero_with_groups():
    q, k, v = qkv((2, 4), s=0, kv_heads=2)
    assert attention(q, k, v, gqa=True).shape == (2, 4, 0, 8)


CASES = {
    "3-D": lambda: (qkv((3,)), {}),
    "4-D": lambda: (qkv(), {}),
    "5-D": lambda: (qkv((2, 2, 3)), {}),
    "values narrower": lambda: (qkv(ev=4), {}),
    "bool mask": lambda: (qkv(), {"mask": torch.ones(1, 1, 5, 7, dtype=torch.bool)}),
    "float mask": lambda: (qkv(), {"mask": torch.ones(5, 7, dtype=torch.float64)}),
    "causal": lambda: (qkv(s=7), {"causal": True, "scale": 0.5}),
    "groups": lambda: (qkv((2, 4), kv_heads=2), {"gqa": True}),
    "no keys": lambda: (qkv(t=0), {}),
    "no heads": lambda: (qkv((2, 0)), {}),
    "bfloat16": lambda: (qkv(dtype=torch.bfloat16), {}),
    "heads last in memory": lambda: ([x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv()], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck_and_layout(name):
    args, kwargs = CASES[name]()
    torch.library.opcheck(attention, tuple(args), kwargs)
    out = attention(*args, **kwargs)
    with FakeTensorMode() as mode:
        fake = attention(*[mode.from_tensor(a) for a in args], **{
            k: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for k, x in kwargs.items()
        })  # fmt: skip
    assert (fake.shape, fake.dtype) == (out.shape, out.dtype)
    real = [(n, s, f) for n, s, f in zip(out.shape, out.stride(), fake.stride(), strict=True) if n > 1]
    assert not out.numel() or all(s == f for _, s, f in real)
    if out.dim() == 4:
        assert out.transpose(1, 2).is_contiguous()
    else:
        assert out.is_contiguous()


def test_autocast_casts_as_for_sdpa():
    q, k, v = qkv(dtype=torch.float32)
    mask = torch.zeros(5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v.bfloat16(), mask)
        assert torch.equal(out, F.scaled_dot_product_attention(q, k, v.bfloat16(), mask))
        assert out.dtype == torch.bfloat16
        assert attention(q.double(), k.double(), v.double()).dtype == torch.float64
    assert attention(q, k, v).dtype == torch.float32


def test_flops():
    q, k, v = qkv((2, 4), kv_heads=2, ev=4)
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v, gqa=True)
    assert counter.get_total_flops() == 2 * (2 * 4) * 5 * 7 * (8 + 4)
    with FlopCounterMode(display=False) as ours, FakeTensorMode():
        attention(*[torch.empty(x.shape) for x in qkv((3,))])
    assert ours.get_total_flops() == 2 * 3 * 5 * 7 * 16


def test_output_shape():
    assert output_shape((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6), None, True) == [2, 4, 5, 6]
    with pytest.raises(RuntimeError):
        output_shape((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6), None, False)
    with pytest.raises(RuntimeError, match="2 dimensions"):
        output_shape((8,), (7, 8), (7, 8), None, False)


def test_known_operators_exist():
    missing = [n for n in ATTENTION_OPS if n.startswith("aten.") and not hasattr(aten, n.removeprefix("aten."))]
    assert not missing
    assert attention_adapter(F.scaled_dot_product_attention) is ATTENTION_OPS["aten.scaled_dot_product_attention"]
    assert attention_adapter(aten.scaled_dot_product_attention.default) is not None
    assert attention_adapter(torch.relu) is None


def traced(fn, *args):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a) for a in args]
        gm = fx.symbolic_trace(fn)
        FakeTensorProp(gm, mode).propagate(*fakes)
    return gm


def targets(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def test_aten_flash_becomes_attention():
    def fn(q, k, v):
        return (operator.getitem(aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, scale=0.5), 0),)

    args = qkv()
    gm = traced(fn, *args)
    tidy(gm)
    gm.recompile()
    assert targets(gm) == [attention, aten.clone.default]  # the old result was contiguous
    out = gm(*args)[0]
    assert torch.equal(out, F.scaled_dot_product_attention(*args, scale=0.5)) and out.is_contiguous()

    args = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in args]  # as models have it
    gm = traced(fn, *args)
    tidy(gm)
    assert targets(gm) == [attention]


def test_aten_flash_stays_where_its_second_result_is_used():
    def fn(q, k, v):
        result = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)
        return (operator.getitem(result, 0), operator.getitem(result, 1))

    gm = traced(fn, *qkv())
    tidy(gm)
    assert attention not in targets(gm)


def test_bshd_layout_is_transposed():
    name = "fastpar_test.bshd"
    with torch.library._scoped_library("fastpar_test", "DEF") as lib:
        lib.define("bshd(Tensor q, Tensor k, Tensor v, float? scale=None, bool causal=False) -> (Tensor, Tensor)")
        lib.impl(
            "bshd",
            lambda q, k, v, scale=None, causal=False: (torch.empty_like(q), q.new_empty(q.shape[:-1])),
            "CompositeExplicitAutograd",
        )
        ATTENTION_OPS[name] = ATTENTION_OPS["_diffusers_flash_attn_3._flash_attn_forward"]
        try:
            op = torch.ops.fastpar_test.bshd.default
            args = [x.transpose(1, 2) for x in qkv(s=7)]
            gm = traced(lambda q, k, v: (operator.getitem(op(q, k, v), 0),), *args)
            tidy(gm)
            gm.recompile()
            assert targets(gm).count(attention) == 1 and op not in targets(gm)
            ref = F.scaled_dot_product_attention(*[x.transpose(1, 2) for x in args]).transpose(1, 2)
            assert torch.equal(gm(*args)[0], ref)
        finally:
            del ATTENTION_OPS[name]


def test_unsupported_options_keep_the_operator():
    adapt = ATTENTION_OPS["_diffusers_flash_attn_3._flash_attn_forward"]
    assert adapt((1, 2, 3), {"softcap": 30.0}).unsupported == "softcap=30.0 has no counterpart"
    call = adapt((1, 2, 3), {"softmax_scale": 0.1, "causal": True})
    assert (call.unsupported, call.scale, call.causal, call.layout) == (None, 0.1, True, "BSHD")


def test_dropout_is_an_error():
    gm = fx.symbolic_trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1))
    with pytest.raises(CaptureError, match="dropout_p=0.1"):
        keep_whole(gm)
