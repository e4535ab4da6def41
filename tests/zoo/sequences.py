"""Image models that put prompt and image into one sequence, as language models do."""

from __future__ import annotations

from typing import Any

import torch

from .registry import Draw, Knobs, Spec, entry


@entry("ErnieImageTransformer2DModel", "image", (7, 11), prompt="text_bth")
def ernie(k: Knobs) -> Spec:
    """Tokens come before the batch in every activation."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, *k.size),
            timestep=d.times(k.batch, 1000.0),
            text_bth=d.randn(k.batch, k.text, 20),
            text_lens=d.mask(k.batch, k.text).sum(1),
            return_dict=False,
        )

    config = dict(
        hidden_size=48,
        num_attention_heads=3,
        num_layers=2,
        ffn_hidden_size=40,
        in_channels=4,
        out_channels=4,
        text_in_dim=20,
        rope_axes_dim=(4, 6, 6),
    )
    return config, inputs


@entry("Ideogram4Transformer2DModel", "image", (7, 11))
def ideogram(k: Knobs) -> Spec:
    """Prompt and image share one padded sequence; segment ids keep the padding apart."""

    def inputs(d: Draw) -> dict[str, Any]:
        valid = torch.cat([d.mask(k.batch, k.text), torch.ones(k.batch, k.tokens, dtype=torch.int64)], 1)
        kind = torch.cat([torch.full((k.text,), 3), torch.full((k.tokens,), 2)])
        text = torch.arange(k.text)[:, None].expand(-1, 3)
        positions = torch.cat([text, d.ids(k.size, 3).long() + 65536])
        length = k.text + k.tokens
        return dict(
            hidden_states=d.randn(k.batch, length, 8),
            timestep=d.times(k.batch),
            encoder_hidden_states=d.randn(k.batch, length, 20),
            position_ids=positions.expand(k.batch, -1, -1).contiguous(),
            segment_ids=torch.where(valid > 0, 1, -1),
            indicator=torch.where(valid > 0, kind, -1),
            return_dict=False,
        )

    config = dict(
        in_channels=8,
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=16,
        intermediate_size=40,
        adaln_dim=12,
        llm_features_dim=20,
        mrope_section=(4, 2, 2),
    )
    return config, inputs


@entry("Krea2Transformer2DModel", "image", (7, 11))
def krea(k: Knobs) -> Spec:
    """Grouped queries; prompt features of several layers are fused by attention across layers."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, k.tokens, 8),
            encoder_hidden_states=d.randn(k.batch, k.text, 3, 24),
            timestep=d.times(k.batch),
            position_ids=d.ids(k.size, 3, text=k.text),
            encoder_attention_mask=d.mask(k.batch, k.text, torch.bool),
            return_dict=False,
        )

    config = dict(
        in_channels=8,
        num_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        attention_head_dim=12,
        intermediate_size=40,
        timestep_embed_dim=16,
        text_hidden_dim=24,
        num_text_layers=3,
        text_num_attention_heads=3,
        text_num_key_value_heads=3,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 4),
    )
    return config, inputs


@entry("LuminaNextDiT2DModel", "image", (7, 11))
def lumina_next(k: Knobs) -> Spec:
    """Self-attention and gated cross-attention in each block, grouped queries, a complex rotary table."""

    def inputs(d: Draw) -> dict[str, Any]:
        angles = d.randn(k.size[0], k.size[1], 8)
        return dict(
            hidden_states=d.randn(k.batch, 4, 2 * k.size[0], 2 * k.size[1]),
            timestep=d.times(k.batch),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_mask=d.mask(k.batch, k.text),
            image_rotary_emb=torch.polar(torch.ones_like(angles.double()), angles.double()),
            cross_attention_kwargs={},
            return_dict=False,
        )

    config = dict(
        sample_size=16,
        in_channels=4,
        hidden_size=64,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        cross_attention_dim=20,
    )
    return config, inputs


@entry("Lumina2Transformer2DModel", "image", (7, 11))
def lumina2(k: Knobs) -> Spec:
    """Prompts of unequal lengths: the joint sequence is assembled row by row."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, 2 * k.size[0], 2 * k.size[1]),
            timestep=d.times(k.batch),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_attention_mask=d.mask(k.batch, k.text, torch.bool),
            return_dict=False,
        )

    config = dict(
        sample_size=16,
        in_channels=4,
        hidden_size=48,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(512, 32, 32),
        cap_feat_dim=20,
    )
    return config, inputs


def z_image_config(**more: Any) -> dict[str, Any]:
    config = dict(
        in_channels=4,
        dim=48,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=20,
        axes_dims=[4, 6, 6],
        axes_lens=[512, 32, 32],
    )
    return config | more


@entry("ZImageTransformer2DModel", "image", (7, 11), prompt="cap_feats")
def z_image(k: Knobs) -> Spec:
    """Lists of images and prompts, each padded to multiples of 32 tokens with learned tokens."""

    def inputs(d: Draw) -> dict[str, Any]:
        lengths = d.mask(k.batch, k.text).sum(1).tolist()
        return dict(
            x=[d.randn(4, 1, 2 * k.size[0], 2 * k.size[1]) for _ in range(k.batch)],
            t=d.times(k.batch),
            cap_feats=[d.randn(length, 20) for length in lengths],
            return_dict=False,
        )

    return z_image_config(), inputs


@entry("ZImageTransformer2DModel/omni", "image", (7, 11), batch=1, prompt="cap_feats")
def z_image_omni(k: Knobs) -> Spec:
    """Editing: a clean image beside the noisy one, both with SigLIP features and their own modulation."""

    def inputs(d: Draw) -> dict[str, Any]:
        h, w = k.size
        return dict(
            x=[[d.randn(4, 1, 6, 10), d.randn(4, 1, 2 * h, 2 * w)] for _ in range(k.batch)],
            t=d.times(k.batch),
            cap_feats=[[d.randn(k.text, 20), d.randn(5, 20)] for _ in range(k.batch)],
            siglip_feats=[[d.randn(3, 5, 12), None] for _ in range(k.batch)],
            image_noise_mask=[[0, 1]] * k.batch,
            return_dict=False,
        )

    return z_image_config(siglip_feat_dim=12), inputs


@entry("OmniGenTransformer2DModel", "image", (7, 11), prompt="input_ids")
def omnigen(k: Knobs) -> Spec:
    """Prompt token ids (with an input image in row 0), a time token and the latents in one sequence."""

    def inputs(d: Draw) -> dict[str, Any]:
        text = k.text + 15
        length = text + 1 + k.tokens
        causal = torch.ones(length, length).tril()
        causal[text:, text:] = 1
        causal[:15, :15] = 1
        return dict(
            hidden_states=d.randn(k.batch, 4, 2 * k.size[0], 2 * k.size[1]),
            timestep=d.times(k.batch),
            input_ids=d.integers(50, k.batch, text),
            input_img_latents=[d.randn(1, 4, 6, 10)],
            input_image_sizes={0: [[0, 15]]},
            attention_mask=causal.to(d.dtype).expand(k.batch, -1, -1).contiguous(),
            position_ids=torch.arange(length).expand(k.batch, -1).contiguous(),
            return_dict=False,
        )

    config = dict(
        in_channels=4,
        hidden_size=48,
        num_attention_heads=3,
        num_key_value_heads=3,
        intermediate_size=40,
        num_layers=2,
        pad_token_id=0,
        vocab_size=50,
        max_position_embeddings=512,
        original_max_position_embeddings=512,
        rope_scaling=dict(short_factor=[1.0 + i for i in range(8)], long_factor=[2.0] * 8, type="su"),
        pos_embed_max_size=24,
        time_step_dim=16,
    )
    return config, inputs


@entry("NucleusMoEImageTransformer2DModel", "image", (7, 11))
def nucleus(k: Knobs) -> Spec:
    """Experts choose their tokens (top-k over the sequence), results are scattered back."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, k.tokens, 8),
            img_shapes=[(1, *k.size)] * k.batch,
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_hidden_states_mask=d.mask(k.batch, k.text, torch.bool),
            timestep=d.times(k.batch),
            return_dict=False,
        )

    config = dict(
        in_channels=8,
        out_channels=2,
        num_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_head_dim=16,
        joint_attention_dim=20,
        axes_dims_rope=(4, 6, 6),
        dense_moe_strategy="leave_first_block_dense",
        num_experts=3,
        moe_intermediate_dim=20,
        capacity_factors=2.0,
    )
    return config, inputs


@entry("QwenImage21Transformer2DModel", "image", (6, 10), fixed=("size",))
def qwen_image21(k: Knobs) -> Spec:
    """Text, a condition image and the target in one block-causal sequence. Height and width must be even."""

    def inputs(d: Draw) -> dict[str, Any]:
        target, before = k.tokens // 4, k.text // 2
        slots = [False] * before + [True] * 3 + [False] * (k.text - before) + [True] * target
        return dict(
            hidden_states=d.randn(k.batch, 12 + k.tokens, 8),
            encoder_hidden_states=d.randn(k.batch, k.text + 3, 20),
            encoder_hidden_states_mask=d.mask(k.batch, k.text + 3, torch.bool),
            timestep=d.times(k.batch)[:1].expand(k.batch).contiguous(),
            img_shapes=[[(1, 2, 6), (1, *k.size)]] * k.batch,
            img_mask=torch.tensor(slots).expand(k.batch, -1).contiguous(),
            return_dict=False,
        )

    config = dict(
        in_channels=8,
        out_channels=8,
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=16,
        context_in_dim=20,
        mlp_ratio=2,
        axes_dims_rope=(4, 6, 6),
    )
    return config, inputs


@entry("BriaFibo2Transformer2DModel", "image", (7, 11))
def bria_fibo2(k: Knobs) -> Spec:
    """A perceiver turns the prompt into gist tokens, as many as its length asks for; a block injects text."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 4, 2 * k.size[0], 2 * k.size[1]),
            timestep=d.times(k.batch),
            encoder_hidden_states=d.randn(k.batch, 2, k.text, 20),
            encoder_attention_mask=d.mask(k.batch, k.text, torch.bool),
            context_latents=[d.randn(k.batch, 4, 6, 10)],
            return_dict=False,
        )

    config = dict(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        cap_feat_dim=20,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=1,
        gist_min_text_len=1,
        gist_max_text_len=12,
        axes_dims=(4, 6, 6),
        axes_lens=(32, 32, 32),
    )
    return config, inputs
