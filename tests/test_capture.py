"""Capture: what the graph holds, what it computes, when it compiles again, and what it refuses."""

from __future__ import annotations

import collections
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from fastpar.core.errors import CaptureError
from fastpar.graph.capture import capture, compile_fx
from fastpar.graph.program import source_line
from fastpar.ops.attention import attention
from fastpar.ops.resample import output_size, resample

aten = torch.ops.aten
F64 = torch.float64


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def leaves(value):
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


def close(a, b, tol=1e-12):
    a, b = leaves(a), leaves(b)
    assert len(a) == len(b) and a
    for x, y in zip(a, b, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if x.is_floating_point() or x.is_complex():
            assert x.numel() == 0 or (x - y).abs().max() <= tol * max(1.0, float(y.abs().max()))
        else:
            assert torch.equal(x, y)


def targets(captured):
    nodes = [n for r in captured.programs for n in r.program.graph.nodes if n.op == "call_function"]
    return collections.Counter(str(n.target) for n in nodes)


def checked(model, inputs, graphs=1, tol=1e-12):
    """Capture, and check results, records, metadata and flatness; gives what was captured."""
    with torch.no_grad():
        expected = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    found = capture(model, inputs)
    close(found.outputs, expected, tol)
    assert len(found.programs) == graphs
    for recorded in found.programs:
        program = recorded.program
        assert len(program.inputs) == len(program.placeholders) == len(recorded.args)
        assert isinstance(program.graph.output_node().args[0], tuple)
        close(program.gm(*recorded.args), recorded.outputs, 0.0)
        assert all("val" in n.meta for n in program.graph.nodes if n.op != "output")
        Strides(program.gm).run(*recorded.args)
    return found


class Strides(torch.fx.Interpreter):
    """Runs a graph and compares every value's shape, dtype and strides with the metadata."""

    def run_node(self, n):
        result, value = super().run_node(n), n.meta.get("val")
        if isinstance(value, torch.Tensor) and n.op != "output":
            assert (result.shape, result.dtype) == (value.shape, value.dtype), n.format_node()
            sizes = zip(value.shape, value.stride(), result.stride(), strict=True)
            assert not value.numel() or all(a == b for size, a, b in sizes if size > 1), n.format_node()
        return result


# Decompositions: exact, and the operators that they replace are gone.


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


def tensor(*shape):
    return torch.randn(shape, dtype=F64)


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


# Shapes of models: breaks, buffers, kinds of inputs and outputs.


class Breaking(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, dtype=F64), nn.Linear(4, 4, dtype=F64)

    def forward(self, x):
        x = self.a(x)
        torch._dynamo.graph_break()
        return self.b(x)


def test_graph_breaks_give_several_programs():
    found = checked(Breaking(), {"x": tensor(3, 4)}, graphs=2)
    first, second = found.programs
    assert [i.kind for i in first.program.inputs].count("parameter") == 2
    close(first.outputs, [a for a, i in zip(second.args, second.program.inputs, strict=True) if i.kind == "user"])


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4, dtype=F64)
        self.register_buffer("steps", torch.zeros((), dtype=F64))
        self.table = torch.ones(4, dtype=F64)

    def forward(self, x, t=2):
        self.steps.add_(1)
        return {"y": self.proj(x) * t + self.steps + self.table, "z": (x, None, "text")}


def test_buffers_are_written_back_and_inputs_tagged():
    model, x = Counting(), tensor(3, 4)
    found = capture(model, {"x": x})
    assert model.steps == 1
    recorded = found.programs[0]
    kinds = {i.name: i.kind for i in recorded.program.inputs}
    assert kinds == {
        "proj.weight": "parameter",
        "proj.bias": "parameter",
        "steps": "buffer",
        "table": "buffer",
        "x": "user",
    }
    close(recorded.program.gm(*recorded.args), recorded.outputs, 0.0)  # the record has the buffer's old value
    assert found.outputs["z"][1:] == (None, "text")
    with torch.no_grad():
        close(found.outputs["y"], model.proj(x) * 2 + 1 + 1)


def test_complex_rotary_and_integers():
    def fn(x, freqs, ids, keep):
        z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(freqs), freqs)
        return torch.view_as_real(z).flatten(-2), ids + 1, keep.logical_not(), z

    inputs = tensor(2, 5, 8), tensor(5, 4), torch.arange(5), torch.ones(5, dtype=torch.bool)
    checked(fn, inputs)


def test_same_tensor_twice_views_and_writes():
    def fn(x, y, z):
        x.mul_(2)
        return x + y, z + 1

    x = tensor(4, 3)
    mine, theirs = x.clone(), x.clone()
    with torch.no_grad():
        expected = fn(theirs, theirs, theirs[1:])
    found = capture(fn, (mine, mine, mine[1:]))
    close(found.outputs, expected)
    close(mine, theirs)


def test_inputs_may_be_a_callable_and_the_model_compiled():
    model = torch.compile(nn.Linear(4, 4), backend="eager")
    found = capture(model, lambda: (torch.ones(2, 4),))
    assert len(found.programs) == 1
    assert [i.kind for i in found.programs[0].program.inputs].count("parameter") == 2


def test_models_that_compile_in_place():
    model, backend = Breaking(), Backend()
    model.compile(backend=backend)
    assert len(capture(model, (tensor(3, 4),)).programs) == 2
    with torch.no_grad():
        model(tensor(3, 4))
    assert backend.compiled == backend.ran == 2


def test_captures_do_not_mix():
    model = nn.Linear(4, 4)
    a = capture(model, (torch.ones(2, 4),))
    b = capture(model, (torch.ones(2, 4),))
    assert len(a.programs) == len(b.programs) == 1
    assert a.programs[0].program is not b.programs[0].program
    assert a.programs[0].program.hash() == b.programs[0].program.hash()


# Compiling again: once per shape, never for a number, never eager in silence.


class Backend:
    """A backend that counts what it compiles and runs."""

    def __init__(self):
        self.compiled, self.ran, self.programs = 0, 0, []

    def __call__(self, gm, example_inputs):
        def finish(program):
            self.compiled += 1
            self.programs.append(program)
            for node in program.graph.nodes:
                value = node.meta.get("val")
                if isinstance(value, torch.Tensor):
                    assert all(type(n) is int for n in (*value.shape, *value.stride())), node.format_node()

            def run(args):
                self.ran += 1
                return program.gm(*args)

            return run

        return compile_fx(gm, example_inputs, finish)


class Timed(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x, t):
        return self.proj(x) * t + torch.tensor([t], device=x.device)


class Ranged(nn.Module):
    def forward(self, x, t):
        return x + torch.arange(t).sum()


class OnlyTensor(nn.Module):
    def forward(self, x, t):
        return x + torch.tensor([t / 1000, 1.0]).sum()


CALLS = {
    "resolutions": (Timed, [(n, 3) for n in range(2, 22)], 20),
    "int timesteps": (Timed, [(3, t) for t in range(50)], 3),
    "float timesteps": (Timed, [(3, 0.5 + t / 7) for t in range(20)], 3),
    "float timesteps in a tensor only": (OnlyTensor, [(3, 0.5 + t / 7) for t in range(20)], 3),
    "both": (Timed, [(n, n + 100) for n in range(2, 14)], 12),
    "an int that is a size": (Ranged, [(3, t) for t in range(5, 17)], 12),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiles(name):
    model, calls, most = CALLS[name]
    model, backend = model(), Backend()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for n, t in calls:
            x = torch.randn(n, 4)
            close(compiled(x, t), model(x, t), 1e-6)
    assert backend.compiled <= most and backend.ran == len(calls)


@pytest.mark.parametrize("kind", [int, pytest.param(float, marks=pytest.mark.slow)])
def test_unet_with_number_timesteps(kind):
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        block_out_channels=(4,),
        norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=2,
        layers_per_block=1,
        sample_size=8,
    ).eval()
    backend = Backend()
    compiled = torch.compile(model, backend=backend)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8)
    with torch.no_grad():
        for step in range(20):
            t = kind(981 - 49 * step)
            inputs = dict(sample=x, timestep=t, encoder_hidden_states=text)
            close(compiled(**inputs).sample, model(**inputs).sample, 1e-5)
    assert backend.compiled <= 3 and backend.ran == 20
    assert {i.name for i in backend.programs[-1].inputs if i.kind == "user"} == set(inputs)


# Refusals.


def test_gradients_are_refused():
    with pytest.raises(Exception, match="fastpar compiles inference only.*no_grad"):
        torch.compile(nn.Linear(4, 4), backend=Backend())(torch.ones(2, 4))


def test_no_gradients_inside_are_enough():
    model = nn.Linear(4, 4)

    @torch.no_grad()
    def call(x):
        return model(x)

    backend = Backend()
    close(torch.compile(call, backend=backend)(torch.ones(2, 4)), call(torch.ones(2, 4)), 1e-6)
    assert backend.compiled == backend.ran == 1


def test_several_devices_are_refused():
    with pytest.raises(CaptureError, match="several devices.*'x' on cpu.*'y' on meta"):
        capture(lambda x, y: (x + 1, y + 1), {"x": torch.ones(2), "y": torch.ones(2, device="meta")})


def test_dropout_in_attention_is_refused():
    with pytest.raises(CaptureError, match="dropout_p=0.5 at .*test_capture.py"):
        capture(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), (torch.ones(1, 1, 2, 2),))


def test_shapes_that_depend_on_values_are_refused_or_split():
    def fn(x):
        return torch.zeros(int(x.sum())) + 1

    x = torch.ones(3)
    assert capture(fn, (x,)).outputs.shape == (3,)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        with pytest.raises(CaptureError, match="depends on the values of tensors at .*test_capture.py"):
            capture(fn, (x,))


def test_autocast():
    model = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Flatten(2), nn.Linear(4, 4), nn.LayerNorm(4))

    def call(x):
        y = model(x)
        return F.scaled_dot_product_attention(y.float(), y, y), F.interpolate(y, scale_factor=2.0)

    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        close(capture(call, (x,)).outputs, call(x), 1e-6)


def test_nothing_to_capture_is_an_error():
    with pytest.raises(CaptureError, match="no graph"):
        capture(lambda x: 3, (torch.ones(2),))


# Program.


def test_source_lines_name_the_model():
    program = capture(Counting(), {"x": tensor(3, 4)}).programs[0].program
    linear = next(n for n in program.graph.nodes if n.target is aten.addmm.default)
    assert source_line(linear).startswith("tests/test_capture.py:") or "test_capture.py:" in source_line(linear)
    assert "in forward: return {" in source_line(linear)
    assert source_line(program.placeholders[0]) == ""


def test_copies_are_independent():
    program = capture(Breaking(), {"x": tensor(3, 4)}).programs[0].program
    copy, text, count = program.copy(), program.hash(), program.num_nodes
    copy.notes.append("note")
    node = next(n for n in copy.graph.nodes if n.op == "call_function")
    node.args, node.meta["layout"] = (*node.args[:-1], node.args[0]), "changed"
    copy.graph.erase_node(copy.graph.output_node())
    assert (program.hash(), program.num_nodes, program.notes) == (text, count, [])


SCRIPT = textwrap.dedent("""
    import torch
    from torch import nn
    from fastpar.graph.capture import capture
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    def call(x):
        return model(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    print(capture(call, (torch.ones(WIDTH, 4),)).programs[0].program.hash())
""")


def test_hash_is_equal_across_processes():
    def here(width):
        scope: dict = {}
        exec(SCRIPT.replace("WIDTH", width).replace("print(", "found = ("), scope)
        return scope["found"]

    command = [sys.executable, "-c", SCRIPT.replace("WIDTH", "3")]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert there == here("3") != here("2")


# diffusers' models.


class CountAttention(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel", "PixArtTransformer2DModel"])
def test_transformers_are_one_graph(name):
    from tests.zoo import CASES

    case = CASES[name]
    model = case.build()
    with torch.no_grad(), CountAttention() as counter:
        model(**case.inputs())
    found = checked(model, case.inputs(), tol=1e-9)
    count = targets(found)
    assert count[str(attention)] == counter.calls > 0
    assert not [op for op in count if "scaled_dot_product" in op or "convolution" in op]
    program = found.programs[0].program
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    assert all("models/" in source_line(n) for n in calls if n.target is attention)
    assert all(source_line(n) for n in calls)


def test_fake_models_bring_their_mode():
    from diffusers import FluxTransformer2DModel

    from tests.zoo import CASES

    case = CASES["FluxTransformer2DModel"]
    inputs = case.inputs(torch.float32)
    real = capture(case.build(torch.float32), inputs).programs[0].program
    with FakeTensorMode() as mode:
        model = FluxTransformer2DModel(**case.make(case.knobs)[0]).eval()
        for key, value in inputs.items():
            if isinstance(value, torch.Tensor):
                inputs[key] = mode.from_tensor(value)
    found = capture(model, inputs)
    assert isinstance(found.outputs[0], FakeTensor) and found.outputs[0].fake_mode is mode
    assert found.programs[0].program.hash() == real.hash()
    assert all(isinstance(a, FakeTensor) for a in found.programs[0].args)


@pytest.mark.slow
def test_flux_of_12_billion_parameters_on_fake_tensors():
    from diffusers import FluxTransformer2DModel

    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            model = FluxTransformer2DModel()
            tokens, text = torch.randn(1, 4096, 64), torch.randn(1, 512, 4096)
            pooled, ids = torch.randn(1, 768), torch.zeros(4096 + 512, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    inputs = dict(hidden_states=tokens, encoder_hidden_states=text, pooled_projections=pooled, return_dict=False)
    with tokens.fake_mode:
        inputs |= dict(timestep=torch.ones(1), img_ids=ids[512:], txt_ids=ids[:512])
    found = capture(model, inputs)
    assert len(found.programs) == 1 and targets(found)[str(attention)] == 57
    assert found.outputs[0].shape == (1, 4096, 64)
