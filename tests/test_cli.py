"""The command line: what each verb prints and returns, where models and inputs come from, and every error."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from fastpar.cli.inputs import given_inputs
from fastpar.cli.main import app
from fastpar.core.errors import OptionError, PlanError
from fastpar.graph.pipeline import Pass
from fastpar.sharding.candidates import is_attention

ULYSSES = ("--plan", "ulysses=3")
DIGITS = Path(__file__).parent.parent / "fastpar" / "demo" / "digits.json"
DIGITS_INPUTS = tuple(
    part
    for pair in ("hidden_states=float[1,1,16,16]", "timestep=5", "class_labels=int[1]:3")
    for part in ("--input", pair)
)


class Tiny(nn.Module):
    """One block: attention with 3 heads over 7 tokens, and a feed-forward in a graph of its own if ``broken``."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.broken = broken
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, scale: torch.Tensor, return_dict: bool = True) -> Any:
        q, k, v = (t.unflatten(-1, (3, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) * scale
        if self.broken:
            torch._dynamo.graph_break()
        x = self.out(x)
        return {"x": x} if return_dict else (x,)


def tiny(broken: bool = False, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, Any]]:
    inputs = {"x": torch.randn(2, 7, 6, dtype=dtype), "scale": torch.ones(1, dtype=dtype), "return_dict": False}
    return Tiny(broken).to(dtype), inputs


def two_graphs() -> tuple[nn.Module, dict[str, Any]]:
    return tiny(broken=True)


def single() -> tuple[nn.Module, dict[str, Any]]:
    return tiny(dtype=torch.float32)


def positional() -> tuple[nn.Module, Any]:
    return tiny()[0], (torch.randn(1, 5, 6, dtype=torch.float64), torch.ones(1, dtype=torch.float64))


def fake() -> tuple[nn.Module, dict[str, Any]]:
    with FakeTensorMode():
        return Tiny(), {"x": torch.randn(2, 7, 6), "scale": torch.ones(1)}


def lonely() -> nn.Module:
    return Tiny()


def digits_inputs() -> dict[str, Any]:
    five, three = torch.tensor([5]), torch.tensor([3])
    return {"hidden_states": torch.randn(1, 1, 16, 16), "timestep": five, "class_labels": three}


def inputs_for(model: Tiny) -> dict[str, Any]:
    return {"x": torch.randn(1, 4, model.out.in_features, dtype=torch.float64), "scale": torch.ones(1).double()}


@dataclass(frozen=True)
class Wrong(Pass):
    """A pass with a mistake that no structural check can see: it scales the scores of attention."""

    name: ClassVar[str] = "wrong"
    stage_in: ClassVar[str] = "sharded"

    def apply(self, program: Any, ctx: Any) -> Any:
        for node in program.graph.nodes:
            if is_attention(node):
                node.args = (*node.args, None, False)[:5] + (2.0,)
        program.gm.recompile()
        return program


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file as the importable module ``models``, and the pass ``wrong`` known."""
    module = ModuleType("models")
    module.__dict__.update({k: v for k, v in globals().items() if callable(v)})
    monkeypatch.setitem(sys.modules, "models", module)
    monkeypatch.setitem(__import__("fastpar.registry").registry.PASSES, "wrong", lambda: Wrong)


def run(*args: str, status: int = 0) -> str:
    """What the command prints, on both streams; it must exit with ``status``."""
    result = CliRunner().invoke(app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, f"{result.exit_code}: {result.output}"
    return result.output


def error(*args: str) -> str:
    """The error message of a command that must fail without a traceback."""
    said = run(*args, status=2)
    assert said.startswith("error: ") and "Traceback" not in said
    return said


# -- verbs --------------------------------------------------------------------------------------


def test_verify_says_what_it_held_against_what(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report.json"
    said = run("verify", "models:tiny", *ULYSSES, "--json", str(out))
    assert said.startswith("ok\n") and "3, 1 graph" in said and "1.0e-09" in said
    report = json.loads(out.read_text())
    assert report["ok"] is True and report["plan"] == "ulysses=3" and 0 <= report["max_rel_err"] < 1e-12


def test_verify_of_a_wrong_pass_fails_with_status_1_and_names_the_place() -> None:
    wrong = "shard,attention-ulysses,wrong,cancel,lower"
    said = run("verify", "models:tiny", *ULYSSES, "--passes", wrong, status=1)
    assert said.startswith("FAILED\n") and "diverged at" in said and "scaled_dot_product_attention" in said


def test_verify_in_float32_has_another_tolerance() -> None:
    said = run("verify", "models:single", "--ranks", "2")
    assert "plan auto: " in said and "planned for h100-8" in said and "1.0e-09" not in said


def test_explain_shows_shares_bytes_and_collectives() -> None:
    said = run("explain", "models:tiny", *ULYSSES)
    for part in ("shard,attention-ulysses,cancel,lower,arrange,split-weights,hoist", "1/3 is 0.3333", "attainable",
                 "all_to_all", "ulysses",
                 "collectives per call", "no fallbacks", "seconds: shard"):  # fmt: skip
        assert part in said, part


def test_explain_as_json_prints_nothing_else() -> None:
    report = json.loads(run("explain", "models:tiny", "--plan", "gather=2", "--json", "-"))
    assert report["ok"] is None and report["ranks"] == 2 and {c["kind"] for c in report["collectives"]}


def test_explain_writes_a_trace_and_a_picture(tmp_path: Path) -> None:
    trace, picture = tmp_path / "new" / "trace.json", tmp_path / "line.png"
    files = ("--trace", str(trace), "--picture", str(picture))
    said = run("explain", "models:two_graphs", *ULYSSES, "--topology", "l40-8", *files)
    assert "predicted" in said
    events = json.loads(trace.read_text())["traceEvents"]
    assert {e["pid"] for e in events} == {0, 1, 2} and {"compute", "wait"} <= {e.get("cat") for e in events}
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads(run("explain", "models:tiny", *ULYSSES, "--topology", "l40-8", "--json", "-"))
    assert "timeline" not in report and report["predicted"]["seconds"] > 0


def test_explain_predicts_a_generation(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    said = run("explain", "models:two_graphs", *ULYSSES, "--topology", "l40-8", "--steps", "5", "--streams", "2",
               "--json", str(out), "--picture", str(tmp_path / "steps.png"))  # fmt: skip
    found = json.loads(out.read_text())["generation"]
    assert found["steps"] == 5 and found["seconds"] == pytest.approx(found["first"] + 4 * found["step"])
    assert "in 5 steps of 2 calls" in said
    assert "--steps is about predicted times" in error("explain", "models:tiny", *ULYSSES, "--steps", "5")


def test_a_timeline_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    trace = tmp_path / "trace.json"
    on = ("explain", "models:tiny", *ULYSSES, "--topology", "l40-8")
    assert "--trace is about predicted times" in error(*on[:-2], "--trace", str(trace))
    assert "expected the name of a .png file" in error(*on, "--trace", str(trace), "--picture", "line.jpg")
    assert "it is a folder" in error(*on, "--trace", str(trace), "--picture", str(tmp_path / "folder.png"))
    assert "--trace: cannot write" in error(*on, "--trace", str(tmp_path / "file" / "trace.json"))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder.png"]


def test_opt_prints_the_last_program_unless_asked_otherwise() -> None:
    said = run("opt", "models:tiny", *ULYSSES)
    assert said.startswith("# -----// IR after pin (pin) //-----\n") and said.count("IR after") == 1
    assert "fastpar.all_to_all.default" in said and "3@ulysses(1*3)" in said and "x = self.out(x)" in said
    assert "input('qkv.weight')  # parameter: float64 [18, 6]" in said


def test_opt_prints_between_and_after() -> None:
    passes = "shard,attention-ulysses,cancel,lower,localise{rank=1}"
    said = run("opt", "models:tiny", *ULYSSES, "--passes", passes, "--print-between")
    assert [line for line in said.splitlines() if "//" in line and line.startswith("# --")] == [
        "# -----// IR before shard (captured) //-----",
        "# -----// IR after shard (shard) //-----",
        "# -----// IR after attention-ulysses (attention-ulysses) //-----",
        "# -----// IR after cancel (cancel) //-----",
        "# -----// IR after lower (lower) //-----",
        "# -----// IR after localise (localise{rank=1}) //-----",
    ]
    assert "_c10d_functional.all_to_all_single" in said
    said = run("opt", "models:tiny", *ULYSSES, "--print-after", "shard", "--code")
    assert said.count("-----//") == 1 and "IR after shard" in said and "def forward(self" in said


def test_opt_times_proves_and_dumps(tmp_path: Path) -> None:
    passes = "shard,attention-ulysses,cancel,lower,localise{rank=2}"
    said = run("opt", "models:single", *ULYSSES, "--passes", passes, "--time", "--verify-each", "--dump", str(tmp_path))
    assert "-----//" not in said and "seconds" in said and said.count("ok") == 6 and "ranks agree" in said
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names[0] == "00.captured.py" and "05.localise.txt" in names and len(names) == 12


def test_opt_proves_the_pass_that_is_wrong() -> None:
    passes = "shard,attention-ulysses,wrong,cancel"
    said = run("opt", "models:tiny", *ULYSSES, "--passes", passes, "--verify-each", status=1)
    rows = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    assert "ok" in rows["attention-ulysses"] and "FAILED" in rows["wrong"] and "FAILED" in rows["cancel"]


def test_opt_takes_one_of_several_graphs() -> None:
    assert "self.qkv(x)" not in run("opt", "models:two_graphs", "--ranks", "2", "--graph", "1")
    assert "2 graphs" in error("opt", "models:two_graphs", "--ranks", "2", "--graph", "2")


def test_demo_reports_as_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastpar.demo.main as demo

    def fails(ranks: int, out: Path, steps: int, plan: list[str] | None) -> Any:
        if plan:
            raise PlanError(f"no plan {plan[0]} on {ranks} ranks")
        return demo.DemoResult((), 0.0, out) if steps == 20 else SimpleNamespace(ok=False)

    monkeypatch.setattr(demo, "run_demo", fails)
    run("demo")
    run("demo", "--steps", "3", status=1)
    assert "no plan ring=2 on 4 ranks" in error("demo", "--plan", "ring=2")


def test_the_command_starts_without_torch() -> None:
    code = "import sys, fastpar.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    verbs = {"demo", "verify", "explain", "opt", "run", "bench", "report", "doctor"}
    assert verbs <= set(run("--help").split())
    assert run("--version").strip()[0].isdigit()


# -- models and inputs --------------------------------------------------------------------------


def test_inputs_may_be_positional_or_come_from_a_function_of_the_model() -> None:
    assert run("verify", "models:positional", *ULYSSES).startswith("ok")
    assert run("verify", "models:tiny", *ULYSSES, "--inputs", "models:inputs_for").startswith("ok")
    assert run("verify", "models:tiny", "--plan", "auto", "--ranks", "2", "--topology", "l40-8").startswith("ok")
    assert "positional" in error("verify", "models:positional", *ULYSSES, "--input", "x=float[1,4,6]")


def test_given_inputs_win_over_the_functions_own() -> None:
    said = run("opt", "models:tiny", *ULYSSES, "--passes", "shard", "--input", "x=float[1,11,6]")
    assert "[1, 11@ulysses(4*2,3), 6]" in said


def test_modules_of_the_working_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here_only.py").write_text("from models import tiny\nraise_here = tiny\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert "# program: sharded" in run("opt", "here_only:raise_here", *ULYSSES, "--passes", "shard")


def config(folder: Path) -> Path:
    """A diffusers config of one block."""
    found = json.loads(DIGITS.read_text())
    (folder / "dit.json").write_text(json.dumps({**found, "num_layers": 1}))
    return folder / "dit.json"


def test_a_config_is_planned_on_fake_tensors_in_bfloat16(tmp_path: Path) -> None:
    said = run("opt", str(config(tmp_path)), *ULYSSES, *DIGITS_INPUTS, "--fake", "--passes", "shard")
    assert "bfloat16 [64, 1, 2, 2]" in said and "64@ulysses" in said


def test_masks_of_a_model_on_fake_tensors_have_values(tmp_path: Path) -> None:
    """Mochi attends to the tokens of a prompt that its mask counts; ``bool[...]`` draws one."""
    small = {"_class_name": "MochiTransformer3DModel", "patch_size": 2, "num_attention_heads": 2, "num_layers": 2}
    small |= {"attention_head_dim": 8, "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16}
    file = tmp_path / "mochi.json"
    file.write_text(json.dumps({**small, "time_embed_dim": 4, "max_sequence_length": 16}))
    given = ("hidden_states=float[2,4,5,4,6]", "encoder_hidden_states=float[2,16,16]", "timestep=int[2]:500",
             "encoder_attention_mask=bool[2,16]")  # fmt: skip
    said = run("explain", str(file), *ULYSSES, "--fake", *(part for g in given for part in ("--input", g)))
    assert re.search(r"ranks +3, 1 graph\b", said) and "attentions of 2-byte elements" in said


def test_a_config_has_random_weights_and_a_folder_its_own(tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    file, pipeline = config(tmp_path), tmp_path / "pipe"
    assert "1.0e-09" in run("verify", str(file), *ULYSSES, "--inputs", "models:digits_inputs", "--dtype", "f64")
    DiTTransformer2DModel.from_config(json.loads(file.read_text())).save_pretrained(pipeline / "transformer")
    said = run("opt", str(pipeline), *ULYSSES, *DIGITS_INPUTS, "--passes", "shard")
    assert "float32 [64, 1, 2, 2]" in said
    assert "--component: transformer" in error("explain", str(pipeline), *ULYSSES, "--component", "vae")


@pytest.mark.parametrize(
    ("text", "dtype", "shape"),
    [
        ("float[2,3]", torch.float16, (2, 3)),
        ("bf16[]", torch.bfloat16, ()),
        ("bfloat16[1, 4]", torch.bfloat16, (1, 4)),
        ("int[5]", torch.int64, (5,)),
        ("bool[2,3]", torch.bool, (2, 3)),
        ("int[2]:7", torch.int64, (2,)),
        ("1.5", torch.float16, (1,)),  # the annotation asks for a tensor
        ("3", torch.int64, (1,)),
    ],
)
def test_a_tensor_is_written_as_dtype_and_shape(text: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    found = given_inputs(Tiny(), {}, {}, ["x=float[1]", f"scale={text}"], torch.float16)
    assert found["scale"].dtype == dtype and found["scale"].shape == shape and found["return_dict"] is False
    if ":" in text:
        assert found["scale"].tolist() == [7, 7]


def test_values_that_are_no_tensors_are_json() -> None:
    def forward(x: torch.Tensor, sizes: list[Any], t: float = 0.0, kind: str = "", **more: Any) -> None: ...

    pairs = ['sizes=[[1, "float[2]"], {"a": true}]', "t=2", "kind=abc", "other=null"]
    found = given_inputs(forward, {"x": 1}, {"x": "float[3]"}, pairs, torch.float32)
    assert found["x"].shape == (3,) and found["t"] == 2 and found["kind"] == "abc" and found["other"] is None
    assert found["sizes"][0][1].shape == (2,) and found["sizes"][1] == {"a": True}


@pytest.mark.parametrize("text", ["flot[2]", "float[a]", "float[2]:x", "[2"])
def test_a_bad_tensor_is_a_clear_error(text: str) -> None:
    with pytest.raises(OptionError, match="scale"):
        given_inputs(Tiny(), {}, {}, ["x=float[1]", f"scale={text}"], torch.float32)


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("verify", "models:tiny"), "needs the number of ranks"),
        (("verify", "models:tiny", *ULYSSES, "--topology", "l41-8"), "did you mean 'l40-8'"),
        (("verify", "models:tiny", "--plan", "ulises=2"), "did you mean 'ulysses'"),
        (("verify", "models:tiny", "--plan", "ulysses=2", "--ranks", "3"), "the mesh has 3"),
        (("explain", "models:tiny", "--plan", "gather=2,steps(1:2)"), "'steps' needs 'displaced'"),
        (("explain", "models:tiny", *ULYSSES, "--passes", "shard,lower"), "disagree with plan"),
        (("explain", "models:tiny", *ULYSSES, "--dtype", "int"), "unknown dtype 'int'"),
        (("explain", "models:tiny", *ULYSSES, "--input", "y=1"), "unknown input of Tiny 'y'"),
        (("explain", "models:tiny", *ULYSSES, "--input", "x"), "expected name=value"),
        (("explain", "models:tiny", *ULYSSES, "--input", "x=float[1,4,5]"), "does not run on these inputs"),
        (("explain", "models:tiny", *ULYSSES, "--inputs", "no.json"), "cannot read 'no.json'"),
        (("explain", "models:tiny", *ULYSSES, "--inputs", "models:nothing"), "has no function 'nothing'"),
        (("verify", "models:nothing", *ULYSSES), "has no function 'nothing'"),
        (("verify", "no_such_module:f", *ULYSSES), "No module named 'no_such_module'"),
        (("verify", "models:lonely", *ULYSSES), "must return (model, inputs), not Tiny"),
        (("verify", "models:fake", *ULYSSES), "on fake tensors"),
        (("verify", "no/such.json", *ULYSSES), "there is no such file"),
        (("verify", "no-such-org/no-such-model", *ULYSSES), "downloads nothing"),
        (("verify", "a b", *ULYSSES), "expected a diffusers folder"),
        (("explain", "DiTTransformer3DModel", *ULYSSES), "did you mean 'DiTTransformer2DModel'"),
        (("explain", str(DIGITS), *ULYSSES, "--fake"), "DiTTransformer2DModel needs hidden_states"),
        (("opt", "models:tiny", *ULYSSES, "--passes", "lower,shard"), "takes a program that is captured"),
        (("opt", "models:tiny", *ULYSSES, "--passes", "shart"), "did you mean 'shard'"),
        (("opt", "models:tiny", *ULYSSES, "--print-after", "pack"), "unknown pass of this pipeline 'pack'"),
        (("opt", "models:tiny", *ULYSSES, "--passes", "shard,lower,localise{rank=3}"), "rank 3 is not on the mesh"),
        (("opt", "models:fake", *ULYSSES, "--verify-each"), "on fake tensors"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message_and_status_2(args: tuple[str, ...], said: str) -> None:
    assert said in error(*args)


def test_config_files_without_a_model(tmp_path: Path) -> None:
    for text, said in (("{", "cannot read"), ("[]", "one object"), ("{}", "no _class_name")):
        (tmp_path / "bad.json").write_text(text)
        assert said in error("explain", str(tmp_path / "bad.json"), *ULYSSES)
    assert "holds no config.json" in error("explain", str(tmp_path), *ULYSSES)


def test_debug_lets_the_error_through() -> None:
    result = CliRunner().invoke(app, ["explain", "models:tiny", *ULYSSES, "--dtype", "int", "--debug"])
    assert isinstance(result.exception, OptionError)
