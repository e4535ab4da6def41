"""Options: what is taken, what is refused, and how the environment stands in."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpar.core.errors import OptionError, PlanError, TextError
from fastpar.core.options import OPTIONS, Options, timeout_from_env
from fastpar.core.plan import Plan


def test_defaults():
    options = Options.from_user(env={})
    assert options == Options() == Options.from_user({}, "default", {})
    assert options.plan == Plan(auto=True) and options.lowering is None and options.mesh is None
    assert (options.cudagraphs, options.verify, options.timeout) == (False, False, 60.0)


def test_every_option_is_taken(tmp_path):
    given = {
        "plan": "ulysses=4,ring=2",
        "topology": "dgx-h100",
        "lowering": "inductor",
        "transport": "one-sided",
        "cudagraphs": True,
        "passes": "shard{axis=sp},attention-ulysses",
        "dump": tmp_path,
        "verify": True,
    }
    options = Options.from_user(given, env={})
    assert options.plan == Plan(ulysses=4, ring=2)
    assert options.dump == str(tmp_path) and options.passes == given["passes"]
    assert Options.from_user({"plan": options.plan}, env={}).plan is options.plan
    assert {*given, "mesh"} == set(OPTIONS)
    assert Options.from_user(dict.fromkeys(OPTIONS), env={}) == Options()


def test_a_mesh_is_a_device_mesh_or_a_group():
    import torch.distributed as dist

    group = dist.ProcessGroup(0, 1)
    assert Options.from_user({"mesh": group}, env={}).mesh is group
    with pytest.raises(OptionError, match="option 'mesh': expected a torch DeviceMesh or Proc"):
        Options.from_user({"mesh": (2, 2)}, env={})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"plam": "auto"}, OptionError, "unknown option 'plam' (did you mean 'plan'?); valid: plan, mesh"),
        ({3: 4}, OptionError, "unknown option '3'; valid: plan"),
        ({"timeout": 3}, OptionError, "unknown option 'timeout'"),
        ({"plan": 4}, OptionError, "option 'plan': expected a plan's text or a Plan, got"),
        ({"plan": "ulises=4"}, PlanError, "option 'plan': unknown plan term 'ulises' (did you"),
        ({"plan": "ulysses="}, TextError, "option 'plan': plan: expected a whole number"),
        ({"lowering": "triton"}, OptionError, "option 'lowering': unknown lowering 'triton'; valid: ind"),
        ({"lowering": ["eager"]}, OptionError, "valid: inductor, eager"),
        ({"transport": "one"}, OptionError, "option 'transport': unknown transport 'one'"),
        ({"cudagraphs": 1}, OptionError, "option 'cudagraphs': expected True or False, got 1"),
        ({"verify": "yes"}, OptionError, "option 'verify': expected True or False, got 'yes'"),
        ({"dump": ""}, OptionError, "option 'dump': expected text or a path, not empty, got ''"),
        ({"topology": 8}, OptionError, "option 'topology': expected text or a path"),
        ({"passes": "shard{"}, TextError, "option 'passes': pipeline: expected"),
        ({"passes": 3}, TextError, "option 'passes': pipeline: expected text, got int"),
    ],
)  # fmt: skip
def test_bad_options(options, error, message):
    with pytest.raises(error) as caught:
        Options.from_user(options, env={})
    assert message in str(caught.value)


def test_options_must_be_a_dict():
    with pytest.raises(OptionError, match="options: expected a dict, got list"):
        Options.from_user(["plan"], env={})  # type: ignore[arg-type]


def test_environment_twins_stand_in_and_options_win():
    env = {"FASTPAR_PLAN": "gather=2", "FASTPAR_DUMP": "out", "FASTPAR_VERIFY": "on", "FASTPAR_TIMEOUT": "2"}
    options = Options.from_user(env=env)
    assert options == Options(plan=Plan(gather=2), dump="out", verify=True, timeout=2.0)
    options = Options.from_user({"plan": "ring=2", "verify": False, "dump": None}, env=env)
    assert options == Options(plan=Plan(ring=2), dump="out", timeout=2.0)
    assert Options.from_user({"plan": "ring=2"}, env={"FASTPAR_PLAN": "bad, not read"}).plan == Plan(ring=2)
    assert Options.from_user(env=dict.fromkeys(env, "")) == Options()


def test_the_environment_is_the_process_own_by_default(monkeypatch):
    monkeypatch.setenv("FASTPAR_PLAN", "tp=2")
    monkeypatch.setenv("FASTPAR_TIMEOUT", "7")
    assert Options.from_user().plan == Plan(tp=2)
    assert Options.from_user().timeout == timeout_from_env() == 7.0


@pytest.mark.parametrize(("text", "value"), [("1", True), ("TRUE", True), (" yes ", True), ("0", False)])
def test_verify_from_the_environment(text, value):
    assert Options.from_user(env={"FASTPAR_VERIFY": text}).verify is value


@pytest.mark.parametrize(
    ("variable", "value", "error", "message"),
    [
        ("FASTPAR_PLAN", "rung=2", PlanError, "unknown plan term 'rung' (did you mean 'ring'?)"),
        ("FASTPAR_PLAN", "ring=", TextError, "expected a whole number"),
        ("FASTPAR_VERIFY", "maybe", OptionError, "expected one of 1, true, yes, on, 0, false, no, off, got"),
        ("FASTPAR_TIMEOUT", "soon", OptionError, "expected a number of seconds above 0, got 'soon'"),
        ("FASTPAR_TIMEOUT", "0", OptionError, "above 0, got '0'"),
        ("FASTPAR_TIMEOUT", "-1", OptionError, "above 0, got '-1'"),
        ("FASTPAR_TIMEOUT", "nan", OptionError, "above 0, got 'nan'"),
        ("FASTPAR_TIMEOUT", "inf", OptionError, "above 0, got 'inf'"),
    ],
)
def test_bad_variables_are_named(variable, value, error, message):
    with pytest.raises(error) as caught:
        Options.from_user(env={variable: value})
    assert str(caught.value).startswith(f"environment variable {variable}: ") and message in str(caught.value)


def test_mode_maps_to_cuda_graphs_or_is_refused():
    assert Options.from_user(mode="reduce-overhead", env={}).cudagraphs is True
    assert Options.from_user({"cudagraphs": False}, "reduce-overhead", {}).cudagraphs is False
    with pytest.raises(OptionError, match="unknown mode 'max-autotune'; valid: default, reduce-ov"):
        Options.from_user(mode="max-autotune", env={})


def test_paths_become_text():
    assert Options.from_user({"topology": Path("box.toml")}, env={}).topology == "box.toml"
