"""diffusers' pipelines draw what they draw in one process, with denoiser and decoder compiled and nothing else."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

import fastpar
from fastpar.core.errors import FastparError, OptionError, PlanError
from tests.scripts import pipelines
from tests.test_replicas import torchrun

OFF = re.compile(r"off by (\S+) on rank")


def off_by(ranks: int, *asked: str) -> list[float]:
    found = OFF.findall(torchrun(*asked, script="tests.scripts.pipelines", ranks=ranks))
    assert len(found) == ranks * len(asked)
    return list(map(float, found))


def drawn(ranks: int, *asked: str) -> None:
    found = off_by(ranks, *asked)
    assert all(off < 2e-5 for off in found), found


@pytest.mark.distributed
def test_guidance_of_every_kind_on_two_processes() -> None:
    """Distilled, as a batch, as separate calls; and the decoder's rows."""
    drawn(2, "flux@ulysses=2", "sd:cfg=2", "wan@cfg=2")


@pytest.mark.distributed
def test_a_step_late_on_two_processes() -> None:
    """A U-Net, and a transformer that is called twice per step: near what one process draws, and not the same."""
    found = off_by(2, "sd@gather=2,displaced(warmup=1)", "wan@gather=2,displaced(warmup=1)")
    assert all(1e-4 < off < 0.3 for off in found), found


@pytest.mark.distributed
def test_unequal_steps_on_two_processes() -> None:
    """The second rank runs the model in every second step behind the first one; both draw the same."""
    plan = "gather=2,displaced(warmup=1),steps(1:2)"
    found = off_by(2, f"flux@{plan}", f"sd@{plan}", f"wan@{plan}")
    assert all(1e-4 < off < 0.3 for off in found), found


@pytest.mark.slow
@pytest.mark.distributed
def test_more_plans_on_three_and_four_processes() -> None:
    drawn(3, "flux:ring=3", "sd:gather=3", "wan:ulysses=3", "flux:gather=3,speeds(1:1:0.5)")
    drawn(4, "flux:tp=2,ulysses=2", "sd:cfg=2,gather=2", "wan:cfg=2,ring=2", "flux:torus=2,ring=2")


# -- what parallelize refuses -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan, options, error, said",
    [("gather=2,steps(1:2)", {}, PlanError, "'steps' needs 'displaced'"),
     ("ulysses=two", {}, FastparError, "ulysses"),
     ("ulysses=2", {"lowerings": "eager"}, OptionError, "unknown option 'lowerings'"),
     ("ulysses=2", {"decoder": "gather=2,gather=2"}, PlanError, "given twice")],
)  # fmt: skip
def test_nothing_is_changed_by_a_bad_option(plan: str, options: Any, error: Any, said: str) -> None:
    pipe, name, _ = pipelines.sd()
    kind, decode = type(pipe), pipe.vae.decode
    with pytest.raises(error, match=said):
        fastpar.parallelize(pipe, plan, **options)
    assert type(pipe) is kind and pipe.vae.decode == decode
    assert getattr(pipe, name)._compiled_call_impl is None


def test_what_is_no_pipeline_or_has_no_denoiser() -> None:
    pipe, name, _ = pipelines.sd()
    with pytest.raises(OptionError, match="takes a diffusers pipeline, not UNet2DConditionModel"):
        fastpar.parallelize(getattr(pipe, name), "ulysses=1")
    pipe.register_modules(**{name: None})
    with pytest.raises(OptionError, match="no denoiser among the components feature_extractor"):
        fastpar.parallelize(pipe, "ulysses=1")


def test_once_is_enough(tmp_path: Any) -> None:
    """It is of its own class still, and is saved as such."""
    pipe, _, draw = pipelines.flux()
    pipe.set_progress_bar_config(disable=True)
    kind = type(pipe)
    assert fastpar.parallelize(pipe, "gather=1,displaced") is pipe
    assert isinstance(pipe, kind) and type(pipe).__name__ == kind.__name__
    assert draw().shape[0] == 1
    with pytest.raises(OptionError, match="parallelized before"):
        fastpar.parallelize(pipe, "ulysses=1")


def test_a_scheduler_that_is_copied_steps_for_itself() -> None:
    """Pipelines with sound beside pictures step a copy; both put together what they have stepped to."""
    from fastpar.diffusers import _put_together
    from fastpar.run.stream import Generation

    class Twice:
        def gather(self, latents: torch.Tensor) -> torch.Tensor:
            return 2 * latents

    pipe, _, _ = pipelines.flux()
    pipe.scheduler.set_timesteps(3, mu=0.5)
    kind, ones = type(pipe.scheduler), torch.ones(1, 4)
    alone = [copy.deepcopy(pipe.scheduler), copy.deepcopy(pipe.scheduler)]
    with Generation() as run, _put_together(pipe, run):
        several = [pipe.scheduler, copy.deepcopy(pipe.scheduler)]
        for i, t in enumerate(pipe.scheduler.timesteps):
            run.stepped(Twice(), due=False)
            for one, same in zip(several, alone, strict=True):
                mine, plain = (s.step(ones, t, ones, return_dict=False)[0] for s in (one, same))
                assert torch.equal(mine, plain * (2 if i == 2 else 1))  # behind the last step
    assert type(pipe.scheduler) is kind and isinstance(several[1], kind)
