"""A zoo of tiny random models: one case or more for every model class that diffusers exports.

    case = zoo.CASES["FluxTransformer2DModel"]
    model = case.build(dtype=torch.float64, seed=0)
    outputs = model(**case.inputs(dtype=torch.float64, seed=0, text=77))

`case.at(text=77, size=(9, 13), batch=1)` fixes knobs for both. `python -m tests.zoo` checks every case.
"""

from __future__ import annotations

import importlib

from .registry import CASES, UNAVAILABLE, Case, Draw, Knobs, missing, model_classes

_IMAGES = ("images", "flux", "joint", "sequences")
_VIDEOS = ("videos", "wan", "hunyuan", "kandinsky", "multimodal")
_OTHERS = ("audio", "older", "unets", "unets_time", "controlnets", "conditioners")
_CODECS = ("autoencoders", "video_autoencoders", "audio_codecs")
for _family in (*_IMAGES, *_VIDEOS, *_OTHERS, *_CODECS):
    importlib.import_module(f".{_family}", __name__)

__all__ = ["CASES", "UNAVAILABLE", "Case", "Draw", "Knobs", "missing", "model_classes"]
