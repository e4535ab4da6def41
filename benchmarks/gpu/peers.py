"""What users would run instead, as it is: each a function from (model, ranks) to what takes the same arguments.

They see an initialised process group and nothing else that tells them from a cluster. A peer that is not installed, or
that does not work with the versions at hand, raises, and its row has the error. Another one is one more function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.part import Unavailable

Run = Callable[..., Any]


def _imported(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name.split('.')[0]} cannot be imported ({error}): install it, or give --wheels") from error


def _need_device() -> None:
    if not torch.accelerator.device_count():
        raise Unavailable("places its ranks on accelerators, and torch finds none")


def _diffusers(model: Any, **degrees: int) -> Run:
    _need_device()
    config = _imported("diffusers").ContextParallelConfig(**degrees)
    # Of the kernels that the context-parallel paths take: cuDNN's on a GPU, torch's choice on a CPU.
    model.set_attention_backend("_native_cudnn" if next(model.parameters()).is_cuda else "native")
    model.enable_parallelism(config=config)
    return model


def diffusers_ulysses(model: Any, ranks: int) -> Run:
    return _diffusers(model, ulysses_degree=ranks)


def diffusers_ring(model: Any, ranks: int) -> Run:
    return _diffusers(model, ring_degree=ranks)


def cache_dit(model: Any, ranks: int) -> Run:
    """Its context parallelism, without its cache: the same function."""
    _need_device()
    lib = _imported("cache_dit")
    lib.enable_cache(model, parallelism_config=lib.ParallelismConfig(ulysses_size=ranks))
    return model


def para_attn(model: Any, ranks: int) -> Run:
    """As its examples do, with heads and no ring. Raises ValueError for a model that it has no adapter for."""
    made = _imported("para_attn.context_parallel").init_context_parallel_mesh(
        next(model.parameters()).device.type, max_ring_dim_size=1
    )
    return _imported("para_attn.context_parallel.diffusers_adapters").parallelize_transformer(model, mesh=made)


def yunchang(model: Any, ranks: int) -> Run:
    """yunchang is an attention; around it stands what xDiT's pipelines do: tokens are cut, outputs gathered."""
    lib = _imported("yunchang")
    if type(model).__name__ != "FluxTransformer2DModel":
        raise Unavailable("is an attention alone; here it is put into FLUX only")
    flux = _imported("diffusers.models.transformers.transformer_flux")
    lib.set_seq_parallel_pg(ranks, 1, dist.get_rank(), ranks)
    gpu = next(model.parameters()).is_cuda
    attention = lib.LongContextAttention(
        ring_impl_type="basic", attn_type=lib.kernels.AttnType.TORCH_CUDNN if gpu else lib.kernels.AttnType.TORCH_MATH
    )
    rank, whole = dist.get_rank(), flux.dispatch_attention_fn

    def attend(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
        return attention(q, k, v, dropout_p=0.0, causal=False)

    def call(hidden_states: Any, encoder_hidden_states: Any, img_ids: Any, txt_ids: Any, **others: Any) -> Any:
        parts = {
            "hidden_states": hidden_states.chunk(ranks, 1)[rank],
            "encoder_hidden_states": encoder_hidden_states.chunk(ranks, 1)[rank],
            "img_ids": img_ids.chunk(ranks, 0)[rank],
            "txt_ids": txt_ids.chunk(ranks, 0)[rank],
        }
        flux.dispatch_attention_fn = attend
        try:
            (mine,) = model(**parts, **others)
        finally:
            flux.dispatch_attention_fn = whole
        outs = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(outs, mine.contiguous())
        return (torch.cat(outs, 1),)

    return call


def compiled(peer: Callable[[Any, int], Run], **options: Any) -> Callable[[Any, int], Run]:
    """The peer under torch.compile, as its own documentation does.

    Its shapes are fixed, as they are in a process that has only compiled this: by default Dynamo takes other sizes that
    the same line of code was called with, whoever called it, for a reason to make sizes symbols.
    """
    return lambda model, ranks: torch.compile(peer(model, ranks), dynamic=False, **options)


def arrived(out: torch.Tensor) -> torch.Tensor:
    """``out`` when the last collective has ended: diffusers, uncompiled, returns what is still under way.

    A time that ends before that leaves out what its user waits for next, and a profile may miss the collective.
    """
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return out.wait() if isinstance(out, AsyncCollectiveTensor) else out


PEERS: dict[str, Callable[[Any, int], Run]] = {
    "diffusers ulysses": diffusers_ulysses,
    "diffusers ulysses, compiled": compiled(diffusers_ulysses),
    "diffusers ulysses, CUDA graphs": compiled(diffusers_ulysses, mode="reduce-overhead"),
    "cache-dit ulysses, compiled": compiled(cache_dit),
    "ParaAttention ulysses, compiled": compiled(para_attn),
    "diffusers ring, compiled": compiled(diffusers_ring),
    "yunchang ulysses": yunchang,
    "cache-dit ulysses": cache_dit,
    "ParaAttention ulysses": para_attn,
    "diffusers ring": diffusers_ring,
}
"""Name -> function; the most telling first."""
