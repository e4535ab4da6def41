"""Planning a 12B model on a laptop: default FLUX on fake tensors, 8 virtual ranks.

``python -m benchmarks.real_size``: from process start to the printed plan; shares and bytes
against their formulas; time per pass; and the same with half the depth, to show that the
passes are linear in it.
"""

from __future__ import annotations

import time

START = time.perf_counter()

import argparse  # noqa: E402  (the clock starts before anything is imported)
import resource  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402


def flux(layers: int | None, single: int | None, image: int, text: int) -> tuple[Any, dict[str, Any]]:
    """Default FLUX (or another depth) in bfloat16 on fake tensors, and inputs of ``image`` + ``text`` tokens."""
    from diffusers import FluxTransformer2DModel

    mode = FakeTensorMode()
    depth = {} if layers is None else {"num_layers": layers, "num_single_layers": single}
    torch.set_default_dtype(torch.bfloat16)
    try:
        with mode:
            model = FluxTransformer2DModel(**depth, guidance_embeds=True).eval().requires_grad_(False)
            config = model.config
            inputs = {
                "hidden_states": torch.randn(1, image, config.in_channels),
                "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim),
                "pooled_projections": torch.randn(1, config.pooled_projection_dim),
                "timestep": torch.ones(1),
                "guidance": torch.ones(1),
                "img_ids": torch.zeros(image, 3),
                "txt_ids": torch.zeros(text, 3),
                "return_dict": False,
            }
    finally:
        torch.set_default_dtype(torch.float32)
    return model, inputs


def measure(layers: int | None, single: int | None, plan: str, image: int, text: int) -> dict[str, Any]:
    """Capture and explain once; seconds of each part."""
    import fastpar

    begin = time.perf_counter()
    model, inputs = flux(layers, single, image, text)
    built = time.perf_counter()
    captured = fastpar.capture(model, inputs)
    traced = time.perf_counter()
    report = fastpar.explain(captured, plan=plan, verify_structure=False)
    done = time.perf_counter()
    return {
        "plan": plan,
        "blocks": [model.config.num_layers, model.config.num_single_layers],
        "parameters": sum(p.numel() for p in model.parameters()),
        "nodes": sum(r.program.num_nodes for r in captured.programs),
        "graphs": report.graphs,
        "flops_share_times_ranks": report.flops_share * report.ranks,
        "bytes_per_rank": report.bytes_per_rank,
        "bytes_over_formula": report.bytes_per_rank / max(1, report.bytes_formula),
        "fallbacks": len(report.fallbacks),
        "collectives": sum(c.count for c in report.collectives),
        "seconds": {
            "build_model": built - begin,
            "capture": traced - built,
            "passes": sum(report.seconds.values()),
            "explain_with_counting": done - traced,
        },
        "seconds_per_pass": report.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", default="ulysses=8")
    parser.add_argument("--image", type=int, default=4096)
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--depths", action="store_true", help="also half the depth")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = [measure(None, None, args.plan, args.image, args.text)]
    results[0]["seconds"]["process_start_to_plan"] = time.perf_counter() - START
    results[0]["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    show(results[0])
    if args.depths:
        torch._dynamo.reset()
        results.append(measure(9, 19, args.plan, args.image, args.text))
        show(results[-1])
        nodes, took = ([r[k] if k == "nodes" else r["seconds"][k] for r in results] for k in ("nodes", "passes"))
        print(f"{nodes[0] / nodes[1]:.2f} times the nodes take {took[0] / took[1]:.2f} times the time of the passes")
    if args.out:
        from fastpar.core.record import write

        write(args.out, results)


def show(result: dict[str, Any]) -> None:
    print(f"FLUX {result['blocks']} blocks, {result['nodes']} nodes, plan {result['plan']}")
    for key in ("flops_share_times_ranks", "bytes_per_rank", "bytes_over_formula", "fallbacks", "collectives"):
        print(f"  {key}: {result[key]}")
    for key in ("seconds", "seconds_per_pass"):
        print(f"  {key}: " + ", ".join(f"{k} {v:.2f}" for k, v in result[key].items()))
    if "peak_memory_gb" in result:
        print(f"  peak memory: {result['peak_memory_gb']:.2f} GB")


if __name__ == "__main__":
    main()
