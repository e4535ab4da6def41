"""ControlNets: encoders that return residuals for the blocks of a U-Net or of a transformer, and wrappers of several.

Sizes are as for the models that they control: pixels of the latent for those of U-Nets, tokens for the others.
"""

from __future__ import annotations

from typing import Any

import torch

from .flux import basic
from .images import flux, hunyuan_dit, qwen, sana, sd3
from .registry import Draw, Knobs, Spec, entry
from .sequences import z_image, z_image_config


def wrapped(cls: str, count: int, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a wrapper: `count` new models of the class."""
    import diffusers

    return dict(controlnets=[getattr(diffusers, cls)(**config) for _ in range(count)])


def unet(k: Knobs, scale: int = 2, more: dict[str, Any] | None = None) -> Spec:
    """Of Stable Diffusion. The picture is `scale` times as large as the latent."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            sample=d.randn(k.batch, 4, *k.size),
            timestep=d.steps(k.batch),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            controlnet_cond=d.randn(k.batch, 3, scale * k.size[0], scale * k.size[1]),
            conditioning_scale=0.7,
            return_dict=False,
        )

    config = dict(
        block_out_channels=(24, 36),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=20,
        attention_head_dim=3,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(4, 8),
    )
    return config | (more or {}), inputs


@entry("ControlNetModel", "image", (14, 10), prompt="controlnet_cond")
def controlnet(k: Knobs) -> Spec:
    return unet(k)


@entry("ControlNetModel/guess", "image", (11, 7), prompt="controlnet_cond")
def controlnet_guess(k: Knobs) -> Spec:
    """Residuals are scaled by depth, then averaged over the picture; channels in the order of OpenCV."""
    more = dict(global_pool_conditions=True, controlnet_conditioning_channel_order="bgr")
    config, draw = unet(k, more=more)

    def inputs(d: Draw) -> dict[str, Any]:
        return draw(d) | dict(guess_mode=True)

    return config, inputs


@entry("MultiControlNetModel", "image", (14, 10), prompt="controlnet_cond")
def multi_controlnet(k: Knobs) -> Spec:
    config, draw = unet(k)

    def inputs(d: Draw) -> dict[str, Any]:
        given = draw(d)
        pictures = [given["controlnet_cond"], d.randn(*given["controlnet_cond"].shape)]
        return given | dict(controlnet_cond=pictures, conditioning_scale=[0.7, 0.4])

    return wrapped("ControlNetModel", 2, config), inputs


@entry("ControlNetUnionModel", "image", (14, 10), prompt="controlnet_cond")
def controlnet_union(k: Knobs) -> Spec:
    """Several pictures of known kinds, weighed against the latent by a transformer over their means."""
    config, draw = unet(
        k,
        more=dict(
            num_control_type=4,
            num_trans_channel=24,
            num_trans_head=3,
            num_proj_channel=24,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 12,
        ),
    )

    def inputs(d: Draw) -> dict[str, Any]:
        given = draw(d)
        return given | dict(
            controlnet_cond=[given["controlnet_cond"], d.randn(*given["controlnet_cond"].shape)],
            control_type=torch.tensor([[1, 0, 1, 0]]).expand(k.batch, -1).contiguous(),
            control_type_idx=[0, 2],
            added_cond_kwargs=dict(
                text_embeds=d.randn(k.batch, 12), time_ids=d.times(6 * k.batch, 64.0).reshape(k.batch, 6)
            ),
        )

    return config, inputs


@entry("SparseControlNetModel", "video", (5, 14, 10), prompt="controlnet_cond")
def sparse_controlnet(k: Knobs) -> Spec:
    """SparseCtrl, of AnimateDiff: pictures for some frames, with a mask that says for which."""
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        known = torch.arange(f)[None, None, :, None, None] % 3 == 0
        return dict(
            sample=d.randn(k.batch, 4, f, h, w),
            timestep=d.steps(k.batch),
            encoder_hidden_states=d.randn(k.batch, k.text, 20).repeat_interleave(f, dim=0),
            controlnet_cond=d.randn(k.batch, 3, f, 2 * h, 2 * w) * known,
            conditioning_mask=known.expand(k.batch, 1, f, 2 * h, 2 * w).to(d.dtype),
            conditioning_scale=0.7,
            return_dict=False,
        )

    config = dict(
        conditioning_channels=3,
        block_out_channels=(24, 36),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        cross_attention_dim=20,
        attention_head_dim=3,
        norm_num_groups=4,
        motion_num_attention_heads=3,
        conditioning_embedding_out_channels=(4, 8),
        use_simplified_condition_embedding=False,
    )
    return config, inputs


@entry("FluxControlNetModel", "image", (7, 11), prompt="controlnet_cond")
def flux_controlnet(k: Knobs) -> Spec:
    config, draw = flux(k)

    def inputs(d: Draw) -> dict[str, Any]:
        return draw(d) | dict(controlnet_cond=d.randn(k.batch, k.tokens, 8), conditioning_scale=0.7)

    return config, inputs


@entry("FluxControlNetModel/union", "image", (7, 11), prompt="controlnet_cond")
def flux_controlnet_union(k: Knobs) -> Spec:
    """The kind of picture is a token before the prompt; the picture comes as pixels, 16 for every token."""
    config, draw = flux(k)

    def inputs(d: Draw) -> dict[str, Any]:
        pixels = d.randn(k.batch, 3, 16 * k.size[0], 16 * k.size[1])
        kinds = torch.arange(k.batch)[:, None] % 4
        return draw(d) | dict(controlnet_cond=pixels, controlnet_mode=kinds, conditioning_scale=0.7)

    return config | dict(num_mode=4, conditioning_embedding_channels=2, patch_size=2), inputs


@entry("FluxMultiControlNetModel", "image", (7, 11), prompt="controlnet_cond")
def flux_multi_controlnet(k: Knobs) -> Spec:
    """One union ControlNet for two pictures, whose residuals are added."""
    config, _ = flux(k)

    def inputs(d: Draw) -> dict[str, Any]:
        return basic(d, k) | dict(
            pooled_projections=d.randn(k.batch, 20),
            guidance=d.full(3.5, k.batch),
            controlnet_cond=[d.randn(k.batch, k.tokens, 8) for _ in range(2)],
            controlnet_mode=[torch.full((k.batch,), kind) for kind in (1, 3)],
            conditioning_scale=[0.7, 0.4],
        )

    return wrapped("FluxControlNetModel", 1, config | dict(num_mode=4)), inputs


@entry("SD3ControlNetModel", "image", (7, 11), prompt="controlnet_cond")
def sd3_controlnet(k: Knobs) -> Spec:
    return sd3_controlled(k)


@entry("SD3ControlNetModel/large", "image", (7, 11), prompt="controlnet_cond")
def sd3_controlnet_large(k: Knobs) -> Spec:
    """Of SD 3.5 large: embedded tokens in, no prompt, blocks that attend to themselves only."""
    config, draw = sd3_controlled(k, joint_attention_dim=None, use_pos_embed=False, extra_conditioning_channels=1)

    def inputs(d: Draw) -> dict[str, Any]:
        given = draw(d)
        del given["encoder_hidden_states"]
        return given | dict(hidden_states=d.randn(k.batch, k.tokens, 36))

    return config, inputs


def sd3_controlled(k: Knobs, **more: Any) -> Spec:
    config, draw = sd3(k)

    def inputs(d: Draw) -> dict[str, Any]:
        channels = 4 + more.get("extra_conditioning_channels", 0)
        picture = d.randn(k.batch, channels, 2 * k.size[0], 2 * k.size[1])
        return draw(d) | dict(controlnet_cond=picture, conditioning_scale=0.7)

    return config | more, inputs


@entry("SD3MultiControlNetModel", "image", (7, 11), prompt="controlnet_cond")
def sd3_multi_controlnet(k: Knobs) -> Spec:
    config, draw = sd3_controlled(k)

    def inputs(d: Draw) -> dict[str, Any]:
        given = draw(d)
        pictures = [given["controlnet_cond"], d.randn(*given["controlnet_cond"].shape)]
        return given | dict(controlnet_cond=pictures, conditioning_scale=[0.7, 0.4])

    return wrapped("SD3ControlNetModel", 2, config), inputs


def qwen_controlled(k: Knobs) -> Spec:
    config, draw = qwen(k)

    def inputs(d: Draw) -> dict[str, Any]:
        picture = d.randn(k.batch, k.tokens, 18)
        return draw(d) | dict(controlnet_cond=picture, conditioning_scale=0.7)

    return config | dict(extra_condition_channels=2), inputs


@entry("QwenImageControlNetModel", "image", (7, 11), prompt="controlnet_cond")
def qwen_controlnet(k: Knobs) -> Spec:
    """The picture has more channels than the latent."""
    return qwen_controlled(k)


@entry("QwenImageMultiControlNetModel", "image", (7, 11), prompt="controlnet_cond")
def qwen_multi_controlnet(k: Knobs) -> Spec:
    """One ControlNet for two pictures, whose residuals are added."""
    config, draw = qwen_controlled(k)

    def inputs(d: Draw) -> dict[str, Any]:
        pictures = [d.randn(k.batch, k.tokens, 18) for _ in range(2)]
        return draw(d) | dict(controlnet_cond=pictures, conditioning_scale=[0.7, 0.4])

    return wrapped("QwenImageControlNetModel", 1, config), inputs


def hunyuan_controlled(k: Knobs) -> Spec:
    config, draw = hunyuan_dit(k)
    config["transformer_num_layers"] = config.pop("num_layers")

    def inputs(d: Draw) -> dict[str, Any]:
        picture = d.randn(k.batch, 4, 2 * k.size[0], 2 * k.size[1])
        return draw(d) | dict(controlnet_cond=picture, conditioning_scale=0.7)

    return config, inputs


@entry("HunyuanDiT2DControlNetModel", "image", (7, 11), prompt="controlnet_cond")
def hunyuan_controlnet(k: Knobs) -> Spec:
    """The first half of the transformer less one block."""
    return hunyuan_controlled(k)


@entry("HunyuanDiT2DMultiControlNetModel", "image", (7, 11), prompt="controlnet_cond")
def hunyuan_multi_controlnet(k: Knobs) -> Spec:
    config, draw = hunyuan_controlled(k)

    def inputs(d: Draw) -> dict[str, Any]:
        given = draw(d)
        pictures = [given["controlnet_cond"], d.randn(*given["controlnet_cond"].shape)]
        return given | dict(controlnet_cond=pictures, conditioning_scale=[0.7, 0.4])

    return wrapped("HunyuanDiT2DControlNetModel", 2, config), inputs


@entry("SanaControlNetModel", "image", (7, 11), prompt="controlnet_cond")
def sana_controlnet(k: Knobs) -> Spec:
    config, draw = sana(k, guided=False)
    config = {name: value for name, value in config.items() if name not in ("qk_norm", "guidance_embeds")}

    def inputs(d: Draw) -> dict[str, Any]:
        return draw(d) | dict(controlnet_cond=d.randn(k.batch, 4, *k.size), conditioning_scale=0.7)

    return config, inputs


@entry("ZImageControlNetModel", "image", (7, 11), prompt="control_context")
def z_image_controlnet(k: Knobs) -> Spec:
    """Embeddings and refiners are the transformer's own modules; blocks pass on a growing stack of residuals."""
    _, draw = z_image(k)

    def build() -> torch.nn.Module:
        import diffusers

        shape = dict(dim=48, n_refiner_layers=1, n_heads=3, n_kv_heads=3)
        refiner = dict(control_refiner_layers_places=[0], add_control_noise_refiner="control_noise_refiner")
        net = diffusers.ZImageControlNetModel(control_layers_places=[0, 1], control_in_dim=6, **refiner, **shape)
        whole = diffusers.ZImageTransformer2DModel(**z_image_config())
        return diffusers.ZImageControlNetModel.from_transformer(net, whole)

    def inputs(d: Draw) -> dict[str, Any]:
        given = draw(d)
        del given["return_dict"]
        pictures = [d.randn(6, 1, 2 * k.size[0], 2 * k.size[1]) for _ in range(k.batch)]
        return given | dict(control_context=pictures, conditioning_scale=0.7)

    return build, inputs
