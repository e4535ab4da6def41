"""What a pipeline runs besides its denoiser: text encoders and the decoder of latents, once per picture or video; of
image to video also the encoder of what is known of the video.

No stack of the rows splits them by default, so every rank runs all of it. Decoders are diffusers' own, run on fake
tensors, every operator counted: products and convolutions as such, all else by the memory that it moves. Where a
pipeline decodes in tiles that overlap, one tile is counted, and scaled by what all tiles cover. Text encoders are
weights and tokens: 2 FLOPs per parameter and token, weights read once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.published.models import UNSAID, Size, fake


@dataclass(frozen=True)
class Decoder:
    """A decoder's class, configuration, latent channels and compression; in ``float32`` where the pipelines keep it
    so (products in TF32, at half of bf16's rate, count twice).

    ``tiles``: size and stride of a tile in latents, for frames, height and width (0: all of them). ``stream``: it
    works on one latent frame after the other, each like the one before: counted on four and on three of them."""

    name: str
    channels: int
    spatial: int
    temporal: int = 1
    video: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    tiles: tuple[tuple[int, int], ...] = ((0, 0), (0, 0), (0, 0))
    stream: bool = False
    float32: bool = False

    def pieces(self, latents: tuple[int, int, int]) -> list[tuple[tuple[int, int, int], float, float]]:
        """Latents to decode once, and how often their work and their launches are needed."""
        shape, work, launches = [], 1.0, 1.0
        for n, (tile, stride) in zip(latents, self.tiles, strict=True):
            size = min(tile or n, n)
            starts = range(0, n, stride) if size < n else range(1)
            work *= sum(min(size, n - i) for i in starts) / size
            launches *= len(starts)
            shape.append(size)
        f, h, w = shape
        if self.stream and f > 4:
            return [((4, h, w), (f - 3) * work, (f - 3) * launches), ((3, h, w), (4 - f) * work, (4 - f) * launches)]
        return [((f, h, w), work, launches)]


_KL = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32}
_KL |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
_DC = {
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
}
_WAN5B = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16, "scale_factor_temporal": 4, "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}  # fmt: skip

DECODERS = {
    "kl": Decoder("AutoencoderKL", 16, 8, config=_KL),
    "flux2": Decoder("AutoencoderKLFlux2", 32, 8),
    "qwen": Decoder("AutoencoderKLQwenImage", 16, 8, 4, video=True),
    "wan": Decoder("AutoencoderKLWan", 16, 8, 4, video=True, stream=True, float32=True),
    "wan5b": Decoder("AutoencoderKLWan", 48, 16, 4, video=True, config=_WAN5B, stream=True, float32=True),
    "hunyuan": Decoder("AutoencoderKLHunyuanVideo", 16, 8, 4, video=True, tiles=((5, 3), (32, 24), (32, 24))),
    "cogvideox": Decoder("AutoencoderKLCogVideoX", 16, 8, 4, video=True, tiles=((2, 2), (30, 25), (45, 36))),
    "mochi": Decoder("AutoencoderKLMochi", 12, 8, 6, video=True, tiles=((0, 0), (32, 24), (32, 24))),
    "ltx2": Decoder("AutoencoderKLLTX2Video", 128, 32, 8, video=True),
    "dc": Decoder("AutoencoderDC", 32, 32, config=_DC, tiles=((0, 0), (16, 14), (16, 14))),
}

# model -> decoder, and its text encoders: parameters and tokens (by the models' cards)
OF: dict[str, tuple[str, tuple[tuple[float, int], ...]]] = {
    "flux-dev": ("kl", ((4.76e9, 512), (0.12e9, 77))),  # T5-XXL's encoder and CLIP-L
    "flux-schnell": ("kl", ((4.76e9, 256), (0.12e9, 77))),
    "flux2-dev": ("flux2", ((24e9, 512),)),  # Mistral Small 3
    "flux2-klein-4b": ("flux2", ((4e9, 512),)),  # Qwen3-4B
    "longcat-image": ("kl", ((7.6e9, 512),)),  # Qwen2.5-VL-7B
    "qwen-image": ("qwen", ((7.6e9, UNSAID),)),
    "z-image": ("kl", ((4e9, 512),)),  # Qwen3-4B
    "hunyuanvideo": ("hunyuan", ((8e9, 351), (0.12e9, 77))),  # Llama-3-8B over its template, CLIP-L
    "opensora2-11b": ("hunyuan", ((4.76e9, 512), (0.12e9, 77))),
    "mochi": ("mochi", ((4.76e9, 256),)),
    "cogvideox-2b": ("cogvideox", ((4.76e9, 226),)),
    "cogvideox-5b": ("cogvideox", ((4.76e9, 226),)),
    "cogvideox1.5-5b": ("cogvideox", ((4.76e9, 224),)),
    "consisid": ("cogvideox", ((4.76e9, 226),)),
    "sana-1.6b": ("dc", ((2.6e9, 300),)),  # Gemma-2-2B
    "wan2.1-14b": ("wan", ((5.68e9, 512),)),  # UMT5-XXL's encoder
    "wan2.2-14b": ("wan", ((5.68e9, 512),)),
    "wan2.2-5b": ("wan5b", ((5.68e9, 512),)),
    "ltx-2": ("ltx2", ((12e9, 1024),)),  # Gemma-3-12B
}


def name(row: Mapping[str, str]) -> str | None:
    """The decoder that the row's seconds contain; None where they are the denoiser's alone."""
    return OF[row["model"]][0] if row["scope"] == "pipeline" and row["model"] in OF else None


def keys(row: Mapping[str, str]) -> list[str]:
    """Which stored workloads the row runs once: its decoder, and its encoder where it makes a video of an image."""
    size = f"{name(row)} {row['width']}x{row['height']}"
    encoded = [f"{size}x{_encoded(row)} encoder"] if _encoded(row) else []
    return [f"{size}x{row['frames']}", *encoded]


def _encoded(row: Mapping[str, str]) -> int:
    """Frames that image to video encodes: Wan 14B a video of the image and blanks, Wan 2.2 5B the image alone."""
    if "image to video" not in row["note"]:
        return 0
    return 1 if row["model"] == "wan2.2-5b" else int(row["frames"])


def capture(row: Mapping[str, str], encoder: bool = False) -> dict[str, Any]:
    """What decoding (or encoding) computes and moves at the row's size, in the form of a stored workload."""
    import diffusers

    kind = DECODERS[str(name(row))]
    size = Size(int(row["width"]), int(row["height"]), _encoded(row) if encoder else int(row["frames"]), 0)
    kinds: Counter[tuple[int, int]] = Counter()
    moved = launches = 0.0
    with fake(torch.float32 if kind.float32 else torch.bfloat16), torch.no_grad():
        model = getattr(diffusers, kind.name)(**kind.config).eval().requires_grad_(False)
        for (f, h, w), work, often in kind.pieces(size.latents(kind.spatial, kind.temporal)):
            frames = ((f - 1) * kind.temporal + 1,) if encoder else (f,)
            scale = kind.spatial if encoder else 1
            channels = 3 if encoder else kind.channels
            given = torch.randn(1, channels, *(frames if kind.video else ()), h * scale, w * scale)
            with _counting() as counted:
                (model.encode if encoder else model.decode)(given, return_dict=False)
            for what, n in counted.products.items():
                kinds[what] += n * work  # type: ignore[assignment]
            moved, launches = moved + counted.moved * work, launches + counted.launches * often
    double = 2 if kind.float32 else 1
    return {
        "launches": int(launches), "outputs": 0, "parameters": 2 * sum(p.numel() for p in model.parameters()),
        "peak": 0, "rows": 1, "batch": 1, "pointwise": 0, "whole": int(moved), "attentions": [],
        "kinds": sorted([flops * double, size, 0, 0, 0, round(n, 3)] for (flops, size), n in kinds.items() if n > 0),
    }  # fmt: skip


class _Count(TorchDispatchMode):
    """Every operator that runs: FLOPs and bytes of products, bytes of the others, launches of both."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[tuple[int, int]] = Counter()
        self.moved = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if any(r.alias_info is not None and not r.alias_info.is_write for r in returns) or "empty" in str(func):
            return out
        moved = sum(x.numel() * x.element_size() for x in _tensors((args, list((kwargs or {}).values()), out)))
        self.launches += bool(moved)
        flops = _flops(func, args, kwargs or {}, out)
        if flops:
            self.products[(flops, moved)] += 1
        else:
            self.moved += moved
        return out


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    if "scaled_dot_product" in str(func):
        q, k = args[0].shape, args[1].shape
        return 4 * math.prod(q) * k[-2]
    formula = flop_registry.get(func.overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from _tensors(v)


@contextmanager
def _counting() -> Iterator[_Count]:
    with _Count() as mode:
        yield mode
