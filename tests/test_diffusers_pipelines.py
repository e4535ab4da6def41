"""diffusers' pipelines draw what they draw in one process, with denoiser and decoder compiled and nothing else."""

from __future__ import annotations

import re

import pytest

from tests.test_replicas import torchrun

OFF = re.compile(r"off by (\S+) on rank")


def drawn(ranks: int, *asked: str) -> None:
    found = OFF.findall(torchrun(*asked, script="tests.scripts.pipelines", ranks=ranks))
    assert len(found) == ranks * len(asked)
    assert all(float(off) < 2e-5 for off in found), found


@pytest.mark.distributed
def test_guidance_of_every_kind_on_two_processes() -> None:
    """Distilled, as a batch, as separate calls; and the decoder's rows."""
    drawn(2, "flux:ulysses=2", "sd:cfg=2", "wan:cfg=2")


@pytest.mark.slow
@pytest.mark.distributed
def test_more_plans_on_three_and_four_processes() -> None:
    drawn(3, "flux:ring=3", "sd:gather=3", "wan:ulysses=3", "flux:gather=3,speeds(1:1:0.5)")
    drawn(4, "flux:tp=2,ulysses=2", "sd:cfg=2,gather=2", "wan:cfg=2,ring=2", "flux:torus=2,ring=2")
