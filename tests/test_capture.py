"""Capture: what the graph holds, what it computes, when it compiles again, and what it refuses."""

from __future__ import annotations

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
from fastpar.graph.program import Program, source_line
from fastpar.graph.scalars import numbers_as_indices
from fastpar.ops.attention import attention
from tests.capturing import checked, close, targets, tensor

aten = torch.ops.aten
F64 = torch.float64


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


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


class Tokens(nn.Module):
    """torch's own attention, tokens first; its memory is in an order that is neither heads nor tokens first."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def test_attention_of_torch_itself_keeps_its_strides():
    found = checked(Tokens().double().eval().requires_grad_(False), {"x": tensor(5, 2, 12)})
    assert targets(found)[str(attention)] == 1


@pytest.mark.parametrize(("shape", "given"), [((5, 5), {"fill_value": 2.0}), ((3, 5), {"wrap": False, "fill_value": 2}),
                                              ((6, 3), {"fill_value": True})])  # fmt: skip
def test_a_diagonal_is_filled_in_a_part_of_a_tensor(shape, given):
    """As perturbed attention (PAG) makes its masks. Through torch's own view AOT refuses it."""

    def call(x):
        mask = torch.zeros(9, 9, dtype=x.dtype)
        part = mask[2 : 2 + shape[0], 1 : 1 + shape[1]]
        part.fill_(-7.0)
        filled = part.fill_diagonal_(**given)
        return mask + x, filled.clone()

    checked(call, (torch.randn(9, 9).double(),))


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


def test_several_accelerators_are_refused():
    with FakeTensorMode():
        inputs = {"x": torch.empty(2, device="cuda"), "y": torch.empty(2, device="meta")}
    with pytest.raises(CaptureError, match="several devices.*'x' on cuda:0.*'y' on meta"):
        capture(lambda x, y: (x + 1, y + 1), inputs)


def test_dropout_in_attention_is_refused():
    with pytest.raises(CaptureError, match="dropout_p=0.5 at .*test_capture.py"):
        capture(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), (torch.ones(1, 1, 2, 2),))


@pytest.mark.parametrize("option", [False, True])
def test_shapes_that_depend_on_values(option):
    """More of it in test_sizes.py. What the user's own options are makes no difference."""

    def fn(x, lengths):
        return torch.zeros(int(x.sum())) + 1, torch.zeros(int(lengths.max())) + 1

    with torch._dynamo.config.patch(capture_scalar_outputs=option):
        one, other = capture(fn, (torch.ones(3), torch.tensor([2, 5]))).outputs
    assert one.shape == (3,) and other.shape == (5,)


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
    def started(width):
        command = [sys.executable, "-c", SCRIPT.replace("WIDTH", width)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    processes = [started(width) for width in "332"]
    first, again, other = (process.communicate()[0].strip() for process in processes)
    assert first == again != other and len(first) == 64


def test_constants_are_hashed_where_torch_compile_calls_its_backends():
    model = nn.Linear(4, 4)

    def call(x):
        return model(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])

    x = torch.randn(3, 4)
    found = capture(call, (x,)).programs[0].program
    with FakeTensorMode():  # no real tensor may be touched then
        inside = found.hash()
    assert inside == found.hash()
    with torch.no_grad():
        assert torch.equal(torch.compile(call, backend="fastpar", options={"plan": "ulysses=1"})(x), call(x))


def test_hash_leaves_out_the_device_index():
    def build(device, value=0):
        graph = torch.fx.Graph()
        full = graph.call_function(aten.full.default, ([2], value), {"device": device})
        graph.output((full,))
        return Program(torch.fx.GraphModule({}, graph), ()).hash()

    assert build(torch.device("cuda", 0)) == build(torch.device("cuda", 1)) != build(torch.device("cpu"))
    assert build(torch.device("cuda", 0)) != build(torch.device("cuda", 0), 1)


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


# Rows that a tensor's value picks.


@pytest.mark.parametrize("before", [(), (slice(None),)], ids=["row", "column"])
def test_a_step_picks_a_row_of_a_table(before):
    """As schedulers do; torch itself breaks the graph there."""

    def scaled(x, table, step):
        return x * table[(*before, step)]

    for step in (2, -1):
        found = checked(scaled, (torch.randn(2, 5), torch.randn(5, 5), torch.tensor(step)))
        assert len(found.programs) == 1


def test_a_row_that_is_written_to_is_no_copy():
    def bumped(table, step):
        table[step].add_(1.0)
        return table * 2

    def backend(gm, inputs):
        before = gm.print_readable(print_output=False)
        numbers_as_indices(gm)
        assert gm.print_readable(print_output=False) == before
        return gm.forward

    torch._dynamo.reset()
    found = torch.compile(bumped, backend=backend)(torch.zeros(3, 2), torch.tensor(1))
    assert torch.equal(found, bumped(torch.zeros(3, 2), torch.tensor(1)))
