"""Published configurations of models and the inputs of one call, as ``fastpar explain`` takes them.

FLUX.1-dev guides itself and CogVideoX runs guidance as a batch of 2, as their pipelines do; Wan calls its model once
per branch, so its batch is 1. CogVideoX: 20 s at its 8 frames per second are 161 frames, 41 latent ones, of 768 x
1360 pixels: 167,280 tokens. Wan 720p: 81 frames of 1280 x 720, 75,600 tokens.
"""

from __future__ import annotations

from pathlib import Path

from fastpar.cli.models import Loaded, load

FOLDER = Path(__file__).parent
CASES = {
    "FLUX.1 1024 px": ("flux.1-dev", "flux-1024"),
    "FLUX.1 4096 px": ("flux.1-dev", "flux-4096"),
    "CogVideoX-5B 20 s": ("cogvideox-5b", "cogvideox-20s"),
    "Wan2.1-14B 720p": ("wan2.1-t2v-14b", "wan-720p"),
}
"""Title: files of configuration and inputs."""


def full_size(name: str, batch: int | None = None) -> Loaded:
    """A model at its published size on fake tensors, and inputs; with ``batch`` prompts instead of the usual number."""
    config, inputs = CASES[name]
    loaded = load(str(FOLDER / f"{config}.json"), str(FOLDER / f"{inputs}.json"), fake=True)
    assert isinstance(loaded.inputs, dict)
    found = dict(loaded.inputs)
    shared = ("img_ids", "txt_ids", "image_rotary_emb", "return_dict")  # positions, the same for all prompts
    for key in found if batch else ():
        if key not in shared:
            found[key] = found[key][:1].expand(batch, *found[key].shape[1:]).clone()
    return Loaded(loaded.model, found)
