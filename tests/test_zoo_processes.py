"""Models of the zoo as ``torch.compile`` runs them, on real processes, beside the virtual ranks that are proved."""

from __future__ import annotations

import pytest

from fastpar.run.launch import LaunchError
from tests import zoo_processes


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.distributed
def test_models_on_processes_are_what_virtual_ranks_are() -> None:
    """One of them has a tensor constant in its forward, one is a U-Net whose rows are factors of one dimension."""
    names = ["ChromaTransformer2DModel", "Kandinsky3UNet"]
    found = dict(zoo_processes.results(names, "ulysses=2", "eager"))
    assert list(found) == names
    assert all(isinstance(off, float) and off <= zoo_processes.SAME for off in found.values()), found


def test_a_case_that_fails_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def launch(work: object, job: zoo_processes.Job, ranks: int) -> dict[str, float]:
        assert ranks == 6 and job.plan == "ulysses=3,ring=2"
        if any(name.startswith("UNet1D") for name in job.names):
            raise LaunchError("rank 1 of 6 failed: out of luck")
        return dict.fromkeys(job.names, 2e-9 if job.names[0].startswith("Chroma") else 0.0)

    monkeypatch.setattr(zoo_processes, "launch", launch)
    only = ["--only", "DiTT", "Chroma", "UNet1DModel/planner", "--plan", "ulysses=3,ring=2"]
    assert zoo_processes.main(only) == 1
    said = capsys.readouterr().out
    assert "DiTTransformer2DModel                       0.0e+00  ok" in said
    assert "ChromaTransformer2DModel                    2.0e-09  WRONG" in said
    assert "UNet1DModel/planner                        rank 1 of 6 failed: out of luck" in said
    assert "1 of 3 cases are what virtual ranks are" in said
    assert zoo_processes.main([*only, "--lowering", "inductor"]) == 1  # the error stays one
    assert zoo_processes.main(["--only", "DiTT", "--plan", "ulysses=3,ring=2"]) == 0
