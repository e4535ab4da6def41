"""U-Nets for images: Stable Diffusion's and its relatives. Sizes are pixels of the latent image."""

from __future__ import annotations

from typing import Any

import torch

from .registry import Draw, Knobs, Spec, entry

ENDS = dict(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
)
SMALL = dict(in_channels=4, out_channels=4, block_out_channels=(24, 36), layers_per_block=1, norm_num_groups=4)


@entry("UNet2DModel", "image", (14, 10), prompt="sample", fixed=("size",))
def unconditional(k: Knobs) -> Spec:
    """DDPM's. Sizes must be even: what is up-sampled is added to what was before down-sampling."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(sample=d.randn(k.batch, 3, *k.size), timestep=d.steps(k.batch), return_dict=False)

    config = dict(
        block_out_channels=(12, 24),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return config, inputs


@entry("UNet2DModel/score", "image", (12, 20), prompt="sample", fixed=("size",))
def score(k: Knobs) -> Spec:
    """NCSN++: random Fourier times, filters before sampling, skips of the image at every scale. 32 norm groups."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(sample=d.randn(k.batch, 3, *k.size), timestep=d.times(k.batch, 50.0), return_dict=False)

    config = dict(
        block_out_channels=(32, 96, 32),
        layers_per_block=1,
        time_embedding_type="fourier",
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
        norm_eps=1e-6,
        center_input_sample=False,
        downsample_padding=None,
        mid_block_scale_factor=2**0.5,
        attention_head_dim=32,
    )
    return config, inputs


def conditional(k: Knobs, more: dict[str, Any] | None = None, **extra: Any) -> Spec:
    """Stable Diffusion's; `more` is of the configuration, the rest of the inputs (functions of a `Draw`)."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            sample=d.randn(k.batch, 4, *k.size),
            timestep=d.steps(k.batch),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            **{name: draw(d) for name, draw in extra.items()},
            return_dict=False,
        )

    return SMALL | ENDS | dict(cross_attention_dim=20, attention_head_dim=3) | (more or {}), inputs


@entry("UNet2DConditionModel", "image", (14, 10))
def stable_diffusion(k: Knobs) -> Spec:
    """The number of heads is `attention_head_dim`, here and in most U-Nets."""
    return conditional(k)


@entry("UNet2DConditionModel/odd", "image", (11, 7))
def stable_diffusion_odd(k: Knobs) -> Spec:
    """Up-sampled to a size that is not twice as large. The prompt is masked."""
    return conditional(k, encoder_attention_mask=lambda d: d.mask(k.batch, k.text))


@entry("UNet2DConditionModel/xl", "image", (14, 10))
def stable_diffusion_xl(k: Knobs) -> Spec:
    """SDXL: linear layers around attention, two blocks of it in the middle, sizes and pooled prompt embedded."""
    more = dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 12,
    )

    def embedded(d: Draw) -> dict[str, torch.Tensor]:
        return dict(text_embeds=d.randn(k.batch, 12), time_ids=d.times(6 * k.batch, 64.0).reshape(k.batch, 6))

    return conditional(k, more, added_cond_kwargs=embedded)


@entry("UNet2DConditionModel/controlled", "image", (14, 10))
def stable_diffusion_controlled(k: Knobs) -> Spec:
    """With what a ControlNet returns: a residual for every skip connection and the middle."""
    h, w = k.size
    low = (36, h // 2, w // 2)

    def skips(d: Draw) -> tuple[torch.Tensor, ...]:
        return tuple(d.randn(k.batch, *shape) for shape in ((24, h, w), (24, h, w), (24, *low[1:]), low))

    return conditional(
        k, down_block_additional_residuals=skips, mid_block_additional_residual=lambda d: d.randn(k.batch, *low)
    )


@entry("UNet2DConditionModel/deepfloyd", "image", (14, 10), fixed=("size",))
def deepfloyd(k: Knobs) -> Spec:
    """IF: the prompt's keys join the image's, residual blocks down- and up-sample, the time scales and shifts."""
    more = dict(
        down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        attention_head_dim=12,
        resnet_time_scale_shift="scale_shift",
        cross_attention_norm="group_norm",
        encoder_hid_dim=16,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        act_fn="gelu",
        cross_attention_dim=32,
    )
    config, draw = conditional(k, more)

    def inputs(d: Draw) -> dict[str, Any]:
        return draw(d) | dict(encoder_hidden_states=d.randn(k.batch, k.text, 16))

    return config, inputs


@entry("UNet2DConditionModel/kandinsky", "image", (14, 10), prompt="sample", fixed=("size",))
def kandinsky(k: Knobs) -> Spec:
    """Kandinsky 2.2's: an image embedding is projected to the prompt's tokens."""
    more = dict(
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=12,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="image",
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
    )
    config, draw = conditional(k, more, added_cond_kwargs=lambda d: dict(image_embeds=d.randn(k.batch, 16)))

    def inputs(d: Draw) -> dict[str, Any]:
        return draw(d) | dict(encoder_hidden_states=None)

    return config, inputs


@entry("AudioLDM2UNet2DConditionModel", "audio", (14, 10))
def audioldm2(k: Knobs) -> Spec:
    """Every block attends to itself, to a generated prompt and to T5's, the last masked. Frames and mel bands."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            sample=d.randn(k.batch, 4, *k.size),
            timestep=d.steps(k.batch),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_hidden_states_1=d.randn(k.batch, 9, 16),
            encoder_attention_mask_1=d.mask(k.batch, 9),
            return_dict=False,
        )

    return SMALL | ENDS | dict(cross_attention_dim=([None, 20, 16],) * 2, attention_head_dim=3), inputs


@entry("DreamLiteUNetModel", "image", (14, 10))
def dreamlite(k: Knobs) -> Spec:
    """Separable convolutions, one key head for three query heads; outer blocks attend to the prompt only."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            sample=d.randn(k.batch, 4, *k.size),
            timestep=d.steps(k.batch),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_attention_mask=d.mask(k.batch, k.text),
            return_dict=False,
        )

    config = SMALL | dict(
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteCrossAttnNoSelfAttnUpBlock2D"),
        cross_attention_dim=20,
        attention_head_dim=3,
        use_linear_projection=True,
        ff_mult=2,
    )
    return config, inputs


@entry("Kandinsky3UNet", "image", (24, 40), fixed=("size",))
def kandinsky3(k: Knobs) -> Spec:
    """Four levels of two layers at least, so sizes are multiples of 8. A masked prompt is pooled into the time."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            sample=d.randn(k.batch, 4, *k.size),
            timestep=d.steps(k.batch),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_attention_mask=d.mask(k.batch, k.text),
            return_dict=False,
        )

    config = dict(
        time_embedding_dim=24,
        groups=2,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=(12, 24, 24, 48),
        cross_attention_dim=24,
        encoder_hid_dim=20,
    )
    return config, inputs


@entry("StableCascadeUNet", "image", (14, 10), prompt="clip_text_pooled")
def cascade(k: Knobs) -> Spec:
    """Stage C: down- and up-sampling by interpolation, keys of prompt and image beside the latent's own."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            sample=d.randn(k.batch, 8, *k.size),
            timestep_ratio=d.times(k.batch),
            clip_text_pooled=d.randn(k.batch, 1, 12),
            clip_text=d.randn(k.batch, k.text, 20),
            clip_img=d.randn(k.batch, 1, 16),
            return_dict=False,
        )

    config = dict(
        in_channels=8,
        out_channels=8,
        timestep_ratio_embedding_dim=16,
        conditioning_dim=24,
        block_out_channels=(24, 36),
        num_attention_heads=(3, 3),
        down_num_layers_per_block=(1, 2),
        up_num_layers_per_block=(2, 1),
        clip_text_in_channels=20,
        clip_text_pooled_in_channels=12,
        clip_image_in_channels=16,
        switch_level=(False,),
    )
    return config, inputs


@entry("StableCascadeUNet/decoder", "image", (14, 10), prompt="effnet", fixed=("size",))
def cascade_decoder(k: Knobs) -> Spec:
    """Stage B: patches of 2, stage C's latent and a small picture are up-sampled bilinearly and added."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            sample=d.randn(k.batch, 4, 2 * k.size[0], 2 * k.size[1]),
            timestep_ratio=d.times(k.batch),
            clip_text_pooled=d.randn(k.batch, 1, 12),
            effnet=d.randn(k.batch, 8, 5, 3),
            return_dict=False,
        )

    config = dict(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=16,
        patch_size=2,
        conditioning_dim=24,
        block_out_channels=(12, 24),
        num_attention_heads=(0, 3),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 2),
        up_blocks_repeat_mappers=(2, 1),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        clip_text_pooled_in_channels=12,
        effnet_in_channels=8,
        pixel_mapper_in_channels=3,
        timestep_conditioning_type=("sca",),
    )
    return config, inputs


@entry("UNetControlNetXSModel", "image", (14, 10))
def controlnet_xs(k: Knobs) -> Spec:
    """A U-Net and a smaller one that controls it, connected in both directions at every layer."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            sample=d.randn(k.batch, 4, *k.size),
            timestep=d.steps(k.batch),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            controlnet_cond=d.randn(k.batch, 3, 8 * k.size[0], 8 * k.size[1]),
            conditioning_scale=0.7,
            return_dict=False,
        )

    config = ENDS | dict(
        sample_size=16,
        block_out_channels=(24, 48),
        norm_num_groups=4,
        cross_attention_dim=20,
        num_attention_heads=3,
        time_embedding_mix=0.95,
        ctrl_conditioning_embedding_out_channels=(4, 4, 4, 4),
        ctrl_learn_time_embedding=True,
        ctrl_block_out_channels=(12, 24),
        ctrl_num_attention_heads=3,
        ctrl_max_norm_num_groups=4,
    )
    return config, inputs


@entry("UVit2DModel", "image", (14, 10))
def amused(k: Knobs) -> Spec:
    """aMUSEd: image token ids in, logits of a code book out; convolutions, then a transformer at half the size."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            input_ids=d.integers(19, k.batch, *k.size),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            pooled_text_emb=d.randn(k.batch, 12),
            micro_conds=d.times(5 * k.batch, 8.0).reshape(k.batch, 5),
        )

    config = dict(
        hidden_size=36,
        cond_embed_dim=12,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=20,
        vocab_size=19,
        codebook_size=17,
        in_channels=12,
        block_out_channels=24,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=3,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=40,
        sample_size=16,
    )
    return config, inputs


@entry("UniDiffuserModel", "image", (7, 7), prompt="prompt_embeds", fixed=("size", "text"))
def unidiffuser(k: Knobs) -> Spec:
    """A U-ViT over times, prompt, image embedding and a square of latents: noise of all three comes out."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            latent_image_embeds=d.randn(k.batch, 4, 2 * k.size[0], 2 * k.size[1]),
            image_embeds=d.randn(k.batch, 1, 12),
            prompt_embeds=d.randn(k.batch, k.text, 20),
            timestep_img=d.steps(k.batch),
            timestep_text=d.steps(k.batch),
            data_type=torch.arange(k.batch) % 2,
        )

    config = dict(
        text_dim=20,
        clip_img_dim=12,
        num_text_tokens=k.text,
        num_attention_heads=3,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        norm_num_groups=4,
        sample_size=2 * k.size[0],
        patch_size=2,
        activation_fn="gelu",
        num_embeds_ada_norm=1000,
        norm_type="layer_norm",
        block_type="unidiffuser",
        use_timestep_embedding=True,
        use_patch_pos_embed=False,
        ff_final_dropout=True,
        use_data_type_embedding=True,
    )
    return config, inputs
