"""The demo's own parts, without any rank: weights, sampler, picture, table of plans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastpar.demo.model import NULL_LABEL, load_digits
from fastpar.demo.picture import BACKGROUND, GAP, MARGIN, SCALE, write_grid
from fastpar.demo.plans import available_plans
from fastpar.demo.sampler import guided_inputs, initial_noise, sample


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_digits()


def test_weights_load_for_inference(model: torch.nn.Module) -> None:
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == 392_900
    assert all(p.dtype == torch.float64 for p in load_digits(torch.float64).parameters())


def test_weights_were_trained(model: torch.nn.Module) -> None:
    """The sampled digits are near the data's own class means: an untrained model predicts zero velocity."""
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    means = np.stack([bunch.images[bunch.target == d].mean(0) for d in range(10)]) / 8 - 1
    small = torch.nn.functional.avg_pool2d(sample(model, range(10), seed=1, steps=10), 2)[:, 0].numpy()
    distances = ((small[:, None] - means[None]) ** 2).sum((2, 3))
    # The nearest mean is a poor judge, so not all ten have to be right.
    assert (distances.argmin(1) == np.arange(10)).sum() >= 7


def test_sampler_is_deterministic(model: torch.nn.Module) -> None:
    calls: list[tuple[int, int]] = []
    first = sample(model, [3, 7], seed=5, steps=3, on_step=lambda i, n: calls.append((i, n)))
    again = sample(model, torch.tensor([3, 7]), seed=5, steps=3)
    assert first.shape == (2, 1, 16, 16) and first.dtype == torch.float32
    assert torch.equal(first, again)
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert not torch.equal(first, sample(model, [3, 7], seed=6, steps=3))


def test_guidance_one_is_the_plain_conditional_model(model: torch.nn.Module) -> None:
    guided, plain = (sample(model, [4], seed=0, steps=1, guidance=g) for g in (2.0, 1.0))
    assert not torch.equal(guided, plain)
    # The last training step holds almost no image, so a single step gives minus the velocity.
    noise, labels = initial_noise(1, seed=0), torch.tensor([4])
    (velocity,) = model(**guided_inputs(noise, torch.tensor(999), labels))
    torch.testing.assert_close(plain, -velocity[:1], atol=1e-3, rtol=0)


def test_guided_inputs_are_one_batch_of_two() -> None:
    inputs = guided_inputs(initial_noise(2, seed=0), torch.tensor(999), torch.tensor([1, 2]))
    assert torch.equal(inputs["hidden_states"][:2], inputs["hidden_states"][2:])
    assert inputs["class_labels"].tolist() == [1, 2, NULL_LABEL, NULL_LABEL]
    assert inputs["timestep"].tolist() == [999] * 4


@pytest.mark.parametrize(("labels", "steps"), [([10], 2), ([-1], 2), ([[1]], 2), ([1], 0), ([1], 1001)])
def test_sampler_refuses(model: torch.nn.Module, labels: list[int], steps: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        sample(model, labels, seed=0, steps=steps)


def test_picture_has_tiles_gaps_and_titles(tmp_path: Path) -> None:
    black, white = -torch.ones(2, 1, 16, 16), torch.full((3, 1, 16, 16), 7.0)
    write_grid(tmp_path / "grid.png", [("one process", black), ("gather=4", white)])
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    side = 16 * SCALE
    assert sheet.shape[0] == 2 * MARGIN + 2 * side + GAP
    left = sheet.shape[1] - MARGIN - 3 * side - 2 * GAP
    first = sheet[MARGIN : MARGIN + side]
    assert (first[:, left : left + side] == 0).all()
    assert (first[:, left + side : left + side + GAP] == BACKGROUND).all()
    assert (first[:, left + side + GAP : left + 2 * side + GAP] == 0).all()
    assert (sheet[MARGIN + side : MARGIN + side + GAP] == BACKGROUND).all()
    assert (first[:, :left] < 128).any(), "the title is not drawn"


def test_picture_refuses_odd_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        write_grid(tmp_path / "grid.png", [])
    rows = [("a", torch.zeros(1, 1, 16, 16)), ("b", torch.zeros(1, 1, 8, 8))]
    with pytest.raises(ValueError, match="row 'b'"):
        write_grid(tmp_path / "grid.png", rows)


def test_plans_take_all_ranks() -> None:
    assert "gather=4" in available_plans(4)
    assert "ulysses=3" in available_plans(3)
    assert len(set(available_plans(4))) == len(available_plans(4))
    with pytest.raises(ValueError, match="at least 1"):
        available_plans(0)
