"""Decompositions and tidying: exact, the replaced operators gone, metadata right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastpar.graph.capture import capture
from fastpar.ops.attention import attention
from fastpar.ops.resample import output_size, resample
from tests.capturing import checked, targets, tensor

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def rotate(x):  # the interleaved rotary embedding of several models: writes into strided slices
    out = torch.empty_like(x)
    out[..., 0::2] = -x[..., 1::2]
    out[..., 1::2] = x[..., 0::2]
    return out


def written(x):
    y = x.clone()
    y[:, 1] = 2.0
    y[:, 2:4] = x[:, :2]
    y[0] = x[1]
    y[..., -1].fill_(3)
    return y


def conv(*args, **kwargs):
    def fn(x, w, b):
        dims = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
        return dims(x, w, b, *args, **kwargs)

    return fn


DECOMPOSITIONS = {
    "split": (lambda x: x.split(3, dim=-1), [(2, 8)], "aten.split"),
    "split_with_sizes": (lambda x: x.split([1, 0, 7], dim=1), [(2, 8)], "aten.split"),
    "chunk": (lambda x: torch.add(*x.chunk(2, dim=1)), [(2, 8)], "aten.split"),
    "unbind": (lambda x: x.unbind(1), [(2, 3, 4)], "aten.unbind"),
    "stack": (lambda x, y: torch.stack([x, y], -1).flatten(-2), [(2, 3), (2, 3)], "aten.stack"),
    "stack of one": (lambda x: torch.stack([x], 1), [(2, 3)], "aten.stack"),
    "t": (lambda x: x.t() + 1, [(2, 3)], "aten.t."),
    "transpose": (lambda x: x.transpose(-1, 0) * 2, [(2, 3, 4)], "aten.transpose"),
    "reshape of strided": (lambda x: x.transpose(1, 2).reshape(2, 12), [(2, 3, 4)], "aten._unsafe_view"),
    "matmul": (lambda x, y: x @ y, [(2, 3, 4), (4, 5)], "aten._unsafe_view"),
    "repeat": (lambda x: x.repeat(2, 1, 3), [(2, 3)], "aten.repeat"),
    "repeat none": (lambda x: x.repeat(1, 1), [(2, 3)], "aten.repeat"),
    "repeat zero": (lambda x: x.repeat(0, 1), [(2, 3)], "aten.repeat"),
    "repeat scalar": (lambda x: x[0].repeat(3), [(2,)], "aten.repeat"),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, dim=1), [(2, 3)], "aten.repeat"),
    "tile": (lambda x: x.tile(1, 2), [(2, 3)], "aten.repeat"),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), [(2, 8, 3, 5)], "aten.pixel"),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), [(2, 3, 4, 6)], "aten.pixel"),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), [(2, 6, 3, 5)], "shuffle"),
    "strided writes": (rotate, [(2, 3, 8)], "scatter"),
    "writes": (written, [(4, 6, 5)], "scatter"),
    "creation": (
        lambda x: (torch.zeros_like(x), x.new_ones(3), torch.full_like(x, 2), x.new_full((2,), 3)),
        [(2, 3)],
        "_like",
    ),
    "ranges": (lambda x: x + torch.arange(3) + torch.arange(1, 4, dtype=x.dtype), [(2, 3)], "aten.arange.default"),
    "constants": (lambda x: x * torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype), [(2, 3)], "lift_fresh"),
    "detach": (lambda x: x.detach() + 1, [(2, 3)], "aten.detach"),
    "patches": (conv(stride=2), [(2, 3, 4, 6), (5, 3, 2, 2), (5,)], "aten.convolution"),
    "patches with a rest": (conv(stride=2), [(2, 3, 5, 7), (5, 3, 2, 2), (5,)], "aten.convolution"),
    "patches 1-D": (conv(stride=3), [(2, 3, 9), (5, 3, 3), (5,)], "aten.convolution"),
    "patches 3-D": (conv(stride=(1, 2, 2)), [(2, 3, 2, 4, 6), (5, 3, 1, 2, 2), (5,)], "aten.convolution"),
    "1x1": (conv(), [(2, 3, 4, 6), (5, 3, 1, 1), (5,)], "aten.convolution"),
    "patches flattened at once": (
        lambda x, w: F.conv2d(x, w, None, 2).view(2, -1),
        [(2, 3, 4, 6), (5, 3, 2, 2)],
        "aten.convolution",
    ),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2.0), [(2, 3, 4, 5)], "_unsafe_index"),
    "nearest to a size": (lambda x: F.interpolate(x, size=(7, 3)), [(2, 3, 4, 5)], "_unsafe_index"),
    "bilinear": (
        lambda x: F.interpolate(x, size=(7, 8), mode="bilinear", align_corners=True),
        [(2, 3, 4, 5)],
        "_unsafe_index",
    ),
    "area": (lambda x: F.interpolate(x, scale_factor=0.5, mode="area"), [(2, 3, 4, 6)], "pool"),
    "upsample function": (lambda x: torch._C._nn.upsample_nearest2d(x, (8, 10)), [(2, 3, 4, 5)], "_unsafe_index"),
    "upsample operator": (
        lambda x: aten.upsample_bicubic2d.default(x, [8, 10], False, 2.0, 2.0),
        [(2, 3, 4, 5)],
        "_unsafe_index",
    ),
    "upsample by scales": (
        lambda x: aten.upsample_bilinear2d.vec(x, None, False, [1.5, 2.0]),
        [(2, 3, 4, 5)],
        "_unsafe_index",
    ),
    "weight norm": (lambda v, g: torch._weight_norm(v, g, 0), [(4, 3, 2), (4, 1, 1)], "aten._weight_norm"),
}


@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_decompositions_equal_eager(name):
    fn, shapes, gone = DECOMPOSITIONS[name]
    found = checked(fn, tuple(tensor(*shape) for shape in shapes))
    assert not [op for op in targets(found) if gone in op]


@pytest.mark.parametrize(
    "shapes, options",
    [
        ([(2, 3, 6, 6), (5, 3, 3, 3), (5,)], {"stride": 2}),  # overlapping
        ([(2, 3, 6, 6), (5, 3, 2, 2), (5,)], {"stride": 2, "padding": 1}),
        ([(2, 4, 6, 6), (4, 2, 2, 2), (4,)], {"stride": 2, "groups": 2}),
    ],
)
def test_other_convolutions_stay(shapes, options):
    found = checked(conv(**options), tuple(tensor(*shape) for shape in shapes))
    assert targets(found)["aten.convolution.default"] == 1


def test_interleaved_writes_become_one_concatenation():
    found = checked(rotate, (tensor(2, 3, 8),))
    count = targets(found)
    assert count["aten.cat.default"] == 1 and not count["aten.full.default"]


def test_slices_are_spelled_one_way():
    program = capture(lambda x: (x[:, 1:] + 1, x[:, -2:] + 1, x[..., ::2] + 1), (tensor(2, 5),)).programs[0].program
    found = [n.args[1:] for n in program.graph.nodes if n.target is aten.slice.Tensor]
    assert found == [(1, 1, 5, 1), (1, 3, 5, 1), (1, 0, 5, 2)]


def test_a_returned_copy_stays_a_copy():
    x = tensor(2, 3)
    outputs = capture(lambda x: (x.clone(), x.clone().view(6), x[:1]), (x,)).outputs
    assert [o.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for o in outputs] == [False, False, True]


def test_attention_keyword_and_positional():
    q = tensor(2, 3, 5, 8)

    def fn(q):
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        a = F.scaled_dot_product_attention(query=q, key=q, value=q, attn_mask=mask, dropout_p=0.0, scale=0.2)
        return a + F.scaled_dot_product_attention(q, q, q, None, 0.0, True)

    assert targets(checked(fn, (q,)))[str(attention)] == 2


def test_resample_is_registered_well():
    x = torch.randn(2, 3, 4, 5)
    torch.library.opcheck(resample, (x, None, [2.0, 2.0], "nearest"))
    torch.library.opcheck(resample, (x.to(memory_format=torch.channels_last), [3, 3], None, "bilinear", True))
    torch.library.opcheck(resample, (x[:0], [3, 3], None, "nearest"))
    assert output_size((4, 5), None, (1.5, 0.5)) == [6, 2]
    with pytest.raises(ValueError, match="exactly one"):
        output_size((4, 5), [1, 1], [1.0, 1.0])
