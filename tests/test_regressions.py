"""One test for each bug that another parallel runtime for diffusion models shipped.

The comment above each says what went wrong and where it was reported. All are held against eager in float64.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastpar
from fastpar.run.build import build
from tests.zoo import CASES

torch.set_num_threads(1)
pytestmark = pytest.mark.zoo


@lru_cache(maxsize=1)
def case(name: str, **knobs: Any) -> fastpar.Captured:
    """A tiny diffusers model with 7 x 11 image tokens (video: 5 x 5 x 7), captured."""
    torch._dynamo.reset()
    chosen = CASES[name].at(**knobs)
    return fastpar.capture(chosen.build(torch.float64), lambda: chosen.inputs(torch.float64))


def exact(captured: fastpar.Captured, *plans: str) -> None:
    for plan in plans:
        report = fastpar.verify(captured, plan=plan)
        assert report.ok, (plan, report.max_rel_err, report.diverged_at)


class Block(torch.nn.Module):
    """Self-attention with ``heads`` heads, and cross-attention to a context when there is one."""

    def __init__(self, heads: int, head: int = 4) -> None:
        super().__init__()
        width = heads * head
        self.heads = heads
        self.qkv, self.kv, self.out = (torch.nn.Linear(width, n * width) for n in (3, 2, 1))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.out(self.attend(*self.qkv(x).chunk(3, -1)))
        return x if context is None else x + self.out(self.attend(x, *self.kv(context).chunk(2, -1)))


def hand(heads: int, *inputs: torch.Tensor) -> fastpar.Captured:
    torch.manual_seed(0)
    return fastpar.capture(Block(heads).double().eval().requires_grad_(False), inputs)


# 1. Replicated text rotated in the ring as if it were sharded, so that every rank counted it (sglang 33327).
def test_text_on_every_rank_is_counted_once() -> None:
    degrees = [(1, 2), (2, 2), (1, 4), (3, 2), (2, 4)]  # small programs go through all of them in test_ring.py
    exact(case("FluxTransformer2DModel", text=1), *(f"ulysses={u},ring={r}" for u, r in degrees))


# 2. Text and image interleave per rank after the all-to-all, and the mask did not (diffusers 13756).
# 3. Padding tokens became keys where ranks do not divide the tokens (xDiT, vllm-omni).
def test_the_mask_follows_its_tokens_and_nothing_is_padded() -> None:
    captured = case("QwenImageTransformer2DModel", text=13, batch=2)
    exact(captured, "ulysses=2", "ulysses=3", "ring=3", "ulysses=2,ring=2", "gather=4", "cfg=2,ulysses=2")
    lowered = build(captured.programs[0].program, "ulysses=4").lowered.graph
    pads = [n for g in (captured.programs[0].program.graph, lowered) for n in g.nodes if "pad" in str(n.target)]
    assert pads == []


# 4. An index per token that picks its modulation was not cut with the tokens (xDiT, Qwen-Image-Edit-2511).
def test_modulation_is_picked_per_token() -> None:
    exact(case("QwenImageTransformer2DModel/edit"), "ulysses=3", "gather=4", "ulysses=2,ring=2")


# 5. One time step per token was taken for one per sample (Wan 2.2 TI2V, diffusers 12562).
def test_one_time_per_token() -> None:
    exact(case("WanTransformer3DModel/ti2v"), "ulysses=3", "gather=4", "ring=2")


# 6. Patches over a latent whose height no rank count divides (CogVideoX at 640 x 720, xDiT 265).
def test_patches_of_odd_grids() -> None:
    exact(case("CogVideoXTransformer3DModel", size=(2, 5, 9)), "ulysses=4", "gather=4", "ulysses=2,ring=3")


# 7. 30 and 18 heads on 4 ranks were refused or padded (Z-Image, Ideogram; xDiT 746).
@pytest.mark.parametrize("heads", [30, 18])
def test_heads_that_ranks_do_not_divide(heads: int) -> None:
    captured = hand(heads, torch.randn(1, 16, 4 * heads, dtype=torch.float64))
    exact(captured, "ulysses=4")
    share = fastpar.explain(captured, plan="ulysses=4").flops_share
    assert share < 1.05 / 4  # and no rank does more than its part


# 8. Cross-attention's whole keys and values went through the all-to-all as well (sglang 19419).
def test_whole_keys_are_not_exchanged() -> None:
    x, context = (torch.randn(2, n, 16, dtype=torch.float64) for n in (11, 5))
    captured = hand(4, x, context)
    exact(captured, "ulysses=4", "ring=3", "gather=2")
    for passes, count in (("", 4), (",pack", 2)):
        report = fastpar.explain(captured, plan="ulysses=4", passes="shard,attention-ulysses,cancel,lower" + passes)
        assert sum(c.count for c in report.collectives if c.why == "attention") == count


# 9. ControlNet's residuals, a list of whole tensors, met split tokens (diffusers 12603 asks for it).
def test_residuals_of_a_controlnet() -> None:
    chosen = CASES["FluxTransformer2DModel"]
    inputs = chosen.inputs(torch.float64)
    tokens, width = inputs["hidden_states"].shape[1], 36
    model = chosen.build(torch.float64)
    width = model.inner_dim
    residuals = [torch.randn(inputs["hidden_states"].shape[0], tokens, width, dtype=torch.float64) for _ in range(2)]
    inputs |= {"controlnet_block_samples": residuals, "controlnet_single_block_samples": residuals[:1]}
    exact(fastpar.capture(model, inputs), "ulysses=3", "ulysses=2,ring=2", "gather=4")


# 10. SD3 with two attentions per block and skipped layers (xDiT 163); SDXL's group norms and halos.
def test_skipped_layers() -> None:
    chosen = CASES["SD3Transformer2DModel/dual"]
    inputs = {**chosen.inputs(torch.float64), "skip_layers": [1]}
    exact(fastpar.capture(chosen.build(torch.float64), inputs), "ulysses=3", "gather=4")


def sdxl() -> tuple[torch.nn.Module, dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=12,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
        use_linear_projection=True,
    )
    inputs = dict(
        sample=torch.randn(2, 4, 18, 10, dtype=torch.float64),
        timestep=500,
        encoder_hidden_states=torch.randn(2, 7, 12, dtype=torch.float64),
        added_cond_kwargs={
            "text_embeds": torch.randn(2, 8, dtype=torch.float64),
            "time_ids": torch.randn(2, 6, dtype=torch.float64),
        },
        return_dict=False,
    )
    return model.double().eval().requires_grad_(False), inputs


def test_the_unet_of_sdxl_splits_one_image() -> None:
    captured = fastpar.capture(*sdxl())
    exact(captured, "ulysses=3", "cfg=2,gather=2")
    assert fastpar.explain(captured, plan="gather=4").fallbacks == []


# 11. Other world sizes than powers of two (distrifuser asserts them; HunyuanDiT was wrong on 4, xDiT 167).
def test_any_number_of_ranks() -> None:
    exact(case("HunyuanDiT2DModel"), "ulysses=6", "gather=1", "ulysses=3", "gather=8")


# 12. Ranks decided differently whether a cached step is near enough (cache-dit 1094, sglang 19955).
# 13. A graph break gave a piece of the model that was split where the next one took it for whole.
class Cached(Block):
    """Skips its second half, as a first-block cache does, where the first changed the tokens little."""

    def forward(self, x: torch.Tensor, threshold: float) -> torch.Tensor:  # type: ignore[override]
        y = super().forward(x)
        if float((y - x).abs().mean() / x.abs().mean()) < threshold:  # a graph break: a value decides
            return y
        return super().forward(y)


@pytest.mark.parametrize("threshold", [0.0, 1e9])
def test_all_ranks_skip_alike_and_a_graph_break_is_exact(threshold: float) -> None:
    torch.manual_seed(0)
    model, x = Cached(3).double().eval().requires_grad_(False), torch.randn(1, 11, 12, dtype=torch.float64)
    expected = model(x, threshold)
    outputs = fastpar.simulate(model, (x, threshold), plan="ulysses=3")
    for out in outputs:
        assert torch.equal(out, outputs[0])
        assert float((out - expected).abs().max() / expected.abs().max()) < 1e-9
