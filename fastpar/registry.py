"""Names of passes and backends, each a thunk that imports it when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastpar.graph.pipeline import Pass


def _arrange() -> type[Pass]:
    from fastpar.passes.arrange import Arrange

    return Arrange


def _attention_gather() -> type[Pass]:
    from fastpar.passes.attention_gather import AttentionGather

    return AttentionGather


def _attention_ulysses() -> type[Pass]:
    from fastpar.passes.attention_ulysses import AttentionUlysses

    return AttentionUlysses


def _attention_ring() -> type[Pass]:
    from fastpar.passes.attention_ring import AttentionRing

    return AttentionRing


def _attention_torus() -> type[Pass]:
    from fastpar.passes.attention_torus import AttentionTorus

    return AttentionTorus


def _cancel() -> type[Pass]:
    from fastpar.passes.cancel import Cancel

    return Cancel


def _displace() -> type[Pass]:
    from fastpar.passes.displace import Displace

    return Displace


def _hold() -> type[Pass]:
    from fastpar.passes.hold import Hold

    return Hold


def _hoist() -> type[Pass]:
    from fastpar.passes.hoist import Hoist

    return Hoist


def _localise() -> type[Pass]:
    from fastpar.passes.localise import Localise

    return Localise


def _lower() -> type[Pass]:
    from fastpar.passes.lower import Lower

    return Lower


def _naive() -> type[Pass]:
    from fastpar.passes.naive import Naive

    return Naive


def _overlap() -> type[Pass]:
    from fastpar.passes.overlap import Overlap

    return Overlap


def _pack() -> type[Pass]:
    from fastpar.passes.pack import Pack

    return Pack


def _pin() -> type[Pass]:
    from fastpar.passes.pin import Pin

    return Pin


def _quantize() -> type[Pass]:
    from fastpar.passes.quantize import Quantize

    return Quantize


def _split_weights() -> type[Pass]:
    from fastpar.passes.split_weights import SplitWeights

    return SplitWeights


def _shard() -> type[Pass]:
    from fastpar.passes.shard import Shard

    return Shard


def _stride() -> type[Pass]:
    from fastpar.passes.stride import Stride

    return Stride


PASSES: dict[str, Callable[[], type[Pass]]] = {
    "shard": _shard,
    "attention-gather": _attention_gather,
    "attention-ulysses": _attention_ulysses,
    "attention-torus": _attention_torus,
    "attention-ring": _attention_ring,
    "naive": _naive,
    "cancel": _cancel,
    "quantize": _quantize,
    "lower": _lower,
    "arrange": _arrange,
    "split-weights": _split_weights,
    "hoist": _hoist,
    "displace": _displace,
    "stride": _stride,
    "pack": _pack,
    "overlap": _overlap,
    "pin": _pin,
    "hold": _hold,
    "localise": _localise,
}


def _eager() -> Any:
    from fastpar.backends.eager import compile_eager

    return compile_eager


def _inductor() -> Any:
    from fastpar.backends.inductor import compile_inductor

    return compile_inductor


LOWERINGS: dict[str, Callable[[], Any]] = {"eager": _eager, "inductor": _inductor}
"""How a localised program becomes a callable on its flat inputs."""
