"""Grids of images as one PNG, a row of tiles per plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SCALE = 4  # screen pixels per image pixel: 16x16 is too small to see
GAP = 6
MARGIN = 12
BACKGROUND = 255
INK = 0


def write_grid(path: str | Path, rows: Sequence[tuple[str, Tensor]]) -> None:
    """Write a grey PNG: for each ``(title, images)`` the title, then the images with gaps between them.

    ``images`` is ``[B, 1, H, W]`` in -1..1 (values outside are clipped) and all rows share H and W.
    Raises ``ValueError`` for no rows or for images of other shapes.
    """
    if not rows:
        raise ValueError("a picture needs at least one row of images")
    height, width = rows[0][1].shape[-2:]
    for title, images in rows:
        if images.ndim != 4 or images.shape[1:] != (1, height, width):
            shape = list(images.shape)
            raise ValueError(f"row {title!r}: images must be [B, 1, {height}, {width}], not {shape}")

    font = ImageFont.load_default(size=18)
    left = 2 * MARGIN + max(round(font.getlength(title)) for title, _ in rows)
    columns = max(len(images) for _, images in rows)
    across, down = SCALE * width + GAP, SCALE * height + GAP
    size = (left + columns * across - GAP + MARGIN, 2 * MARGIN + len(rows) * down - GAP)
    sheet = Image.new("L", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for r, (title, images) in enumerate(rows):
        top = MARGIN + r * down
        draw.text((MARGIN, top + SCALE * height // 2), title, fill=INK, font=font, anchor="lm")
        for c, image in enumerate(images):
            sheet.paste(_tile(image[0]), (left + c * across, top))
    sheet.save(path, format="PNG")


def _tile(image: Tensor) -> Image.Image:
    grey = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    tile = Image.fromarray(grey.numpy())
    return tile.resize((SCALE * tile.width, SCALE * tile.height), Image.Resampling.NEAREST)
