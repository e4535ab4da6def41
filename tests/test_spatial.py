"""Operators over rows: convolutions with halos, group norm, pads, causal masks, means."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastpar

torch.set_num_threads(1)


class Conv(nn.Module):
    """Tokens -> rows -> convolution -> tokens -> attention, so that tokens are what is split."""

    def __init__(self, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1,
                 bias: bool = True, norm: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.conv = nn.Conv2d(8, 8, kernel, stride, padding, dilation, groups, bias)
        self.norm = nn.GroupNorm(4, 8) if norm else nn.Identity()
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        b = x.shape[0]
        x = self.proj(x)
        q = x.view(b, -1, 2, 4).transpose(1, 2)
        x = x + torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(b, -1, 8)
        y = x.view(b, height, width, 8).permute(0, 3, 1, 2)
        y = self.norm(self.conv(y))
        return self.out(y.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 3, "padding": 1},
        {"kernel": 3, "padding": 1, "groups": 8, "norm": True},
        {"kernel": 5, "padding": 2, "bias": False},
        {"kernel": 3, "padding": 0},
        {"kernel": 3, "padding": 1, "stride": 2},
        {"kernel": 3, "padding": 2, "dilation": 2},
        {"kernel": 7, "padding": 3, "groups": 2},
    ],
    ids=str,
)
def test_convolutions_over_split_rows(options: dict, ranks: int) -> None:
    torch.manual_seed(0)
    model = Conv(**options).double().eval()
    x = torch.randn(2, 9 * 6, 8, dtype=torch.float64)
    report = fastpar.verify(model, (x, 9, 6), plan=f"gather={ranks}")
    assert report.ok, report.diverged_at
    assert not report.fallbacks, report.fallbacks


class Spatial(nn.Module):
    """Tokens -> attention -> rows -> any operator over rows -> rows."""

    def __init__(self, inner: nn.Module, spatial: int) -> None:
        super().__init__()
        self.proj, self.inner, self.spatial = nn.Linear(8, 8), inner, spatial

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, rows = x.shape[0], x.shape[1 : 1 + self.spatial]
        x = self.proj(x.flatten(1, self.spatial))
        q = x.view(b, -1, 2, 4).transpose(1, 2)
        x = x + torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(b, -1, 8)
        return self.inner(x.view(b, *rows, 8).movedim(-1, 1)).sin()


class OverFrames(nn.Module):
    """Attention inside each frame, a convolution over its rows and columns, one over frames with places merged."""

    def __init__(self) -> None:
        super().__init__()
        self.space, self.time = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, (3, 1), padding=(1, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, h, w, _ = x.shape
        q = x.view(b * t, h * w, 2, 4).transpose(1, 2)
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2)
        y = self.space(y.reshape(b * t, h, w, 8).permute(0, 3, 1, 2))
        return self.time(y.view(b, t, 8, h * w).permute(0, 2, 1, 3))


@pytest.mark.parametrize("plan", ["gather=3", "ulysses=4", "ring=6"])
def test_a_window_of_one_row_looks_at_no_other(plan: str) -> None:
    """Columns are split; behind rows that they are merged with, nothing is exchanged for them."""
    torch.manual_seed(0)
    report = fastpar.verify(OverFrames().double(), (torch.randn(2, 2, 5, 12, 8, dtype=torch.float64),), plan=plan)
    assert report.ok and not report.fallbacks
    assert report.flops_share <= 1.01 * report.attainable_share
    assert not any("self.time" in c.source for c in report.collectives if c.why != "output")


class Codebook(nn.Module):
    """Distances of rows to the entries of a codebook, as vector quantisation has them."""

    def __init__(self) -> None:
        super().__init__()
        self.book = nn.Parameter(torch.randn(30, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x.movedim(1, -1).flatten(0, -2), self.book)


class Smoothed(nn.Module):
    """Fewer rows, each of many."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(x, size=(4, 3), mode="bicubic", antialias=True)


WINDOWS = {
    "transposed, kernel 4, stride 2": (nn.ConvTranspose2d(8, 6, 4, 2, 1), 2),
    "transposed, kernel 3, stride 2, output padding": (nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1), 2),
    "transposed, groups, no bias": (nn.ConvTranspose2d(8, 12, (4, 3), (2, 3), groups=2, bias=False), 2),
    "transposed, stride above kernel": (nn.ConvTranspose2d(8, 6, 2, 3, output_padding=2), 2),
    "transposed, stride 1": (nn.ConvTranspose2d(8, 6, 3, 1, 1), 2),
    "transposed, one dimension": (nn.ConvTranspose1d(8, 6, 8, 4, 2), 1),
    "transposed, three dimensions": (nn.ConvTranspose3d(8, 6, (3, 4, 4), (1, 2, 2), 1), 3),
    "average pool": (nn.AvgPool2d(2), 2),
    "average pool, windows that overlap": (nn.AvgPool2d(3, 2), 2),
    "average of all": (nn.AdaptiveAvgPool2d(1), 2),
    "replicated rows": (nn.Sequential(nn.ReplicationPad2d((1, 2, 2, 1)), nn.Conv2d(8, 6, 3)), 2),
    "replicated frames": (nn.Sequential(nn.ReplicationPad3d((1, 1, 1, 1, 2, 0)), nn.Conv3d(8, 6, 3)), 3),
    "repeated to an odd size": (nn.Sequential(nn.Upsample(size=(17, 11)), nn.Conv2d(8, 6, 3, 1, 1)), 2),
    "repeated two or three times": (nn.Upsample(size=(25, 14), mode="nearest-exact"), 2),
    "average pool, the last window cut": (nn.AvgPool2d(2, ceil_mode=True), 2),
    "average pool, padded": (nn.AvgPool2d(3, 2, 1), 2),
    "average pool, padding not counted": (nn.AvgPool2d((3, 2), (2, 1), (1, 0), True, count_include_pad=False), 2),
    "average pool, own divisor": (nn.AvgPool2d(3, 1, 1, divisor_override=7), 2),
    "average pool, one dimension": (nn.AvgPool1d(3, 2, 1, ceil_mode=True), 1),
    "average pool, three dimensions": (nn.AvgPool3d(2, 2, ceil_mode=True), 3),
    "largest, windows that overlap": (nn.MaxPool2d(3, 2, 1), 2),
    "largest, the last window cut": (nn.MaxPool2d((2, 3), ceil_mode=True), 2),
    "largest between frames": (nn.MaxPool3d((2, 1, 1)), 3),
    "averages of four by three": (nn.AdaptiveAvgPool2d((4, 3)), 2),
    "averages of rows": (nn.AdaptiveAvgPool2d((4, 1)), 2),
    "averages of more windows than rows": (nn.AdaptiveAvgPool1d(13), 1),
    "bilinear": (nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 6, 3, 1, 1)), 2),
    "bilinear, corners": (nn.Upsample(size=(20, 5), mode="bilinear", align_corners=True), 2),
    "bilinear, a scale of its own": (nn.Upsample(scale_factor=(1.7, 0.6), mode="bilinear"), 2),
    "trilinear between frames": (nn.Upsample(scale_factor=(2, 1, 1), mode="trilinear"), 3),
    "bicubic": (nn.Upsample(size=(13, 13), mode="bicubic"), 2),
    "linear, fewer rows": (nn.Upsample(size=4, mode="linear"), 1),
    "nearest, fewer rows": (nn.Upsample(size=(4, 7), mode="nearest"), 2),
    "smoothed": (Smoothed(), 2),
    "mirrored rows": (nn.Sequential(nn.ReflectionPad2d((1, 2, 3, 1)), nn.Conv2d(8, 6, 3)), 2),
    "mirrored over several ranks": (nn.Sequential(nn.ReflectionPad1d(8), nn.Conv1d(8, 6, 3)), 1),
    "mirrored frames": (nn.Sequential(nn.ReflectionPad3d((1, 1, 0, 0, 2, 0)), nn.Conv3d(8, 6, 3)), 3),
    "distances": (Codebook(), 2),
}


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_of_all_kinds_over_split_rows(name: str, ranks: int) -> None:
    inner, spatial = WINDOWS[name]
    torch.manual_seed(0)
    model = Spatial(inner, spatial).double().eval().requires_grad_(False)
    x = torch.randn(2, *(9, 6, 4)[:spatial], 8, dtype=torch.float64)
    report = fastpar.verify(model, (x,), plan=f"gather={ranks}")
    assert report.ok, report.diverged_at
    assert not report.fallbacks, report.fallbacks


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(x.shape)
        return y * y.mean(dim=1, keepdim=True) + y.amax(dim=1, keepdim=True)


@pytest.mark.parametrize("plan", ["ulysses=3", "ulysses=4", "gather=2", "gather=5"])
def test_causal_masks_follow_their_rows_and_means_count_all_of_them(plan: str) -> None:
    torch.manual_seed(0)
    report = fastpar.verify(Causal().double().eval(), (torch.randn(2, 11, 12, dtype=torch.float64),), plan=plan)
    assert report.ok, report.diverged_at
    assert report.flops_share < 0.62


class Adapters(nn.Module):
    """Two pictures with a network each, whose features are only added at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 2, 1)) for _ in range(2))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.first(x) + 0.5 * self.second(y)


def test_networks_that_only_meet_at_the_end_are_all_split() -> None:
    torch.manual_seed(0)
    pictures = tuple(torch.randn(1, 3, 24, 10, dtype=torch.float64) for _ in range(2))
    report = fastpar.verify(Adapters().double().eval().requires_grad_(False), pictures, plan="gather=3")
    assert report.ok and not report.fallbacks
    assert report.attainable_share < 0.34
    assert report.flops_share < 1.1 * report.attainable_share


class WrittenAttention(nn.Module):
    """Convolutions at full resolution, a pooling that needs all rows, then an attention that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv1d(4, 32, 5, 1, 2), nn.SiLU(), nn.Conv1d(32, 8, 5, 1, 2))
        self.down = nn.AdaptiveAvgPool1d(23)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(self.wide(x)).transpose(1, 2)
        return y + torch.softmax(y @ y.transpose(1, 2), dim=-1) @ y


def test_what_comes_before_an_attention_that_is_written_out_is_split_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 48, dtype=torch.float64)
    report = fastpar.verify(WrittenAttention().double().eval().requires_grad_(False), (x,), plan="gather=3")
    assert report.ok, report.diverged_at
    assert report.flops_share < 0.5
