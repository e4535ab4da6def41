"""Classes of the U-Net's days, a prior and a protein model: no video, no long prompt."""

from __future__ import annotations

from typing import Any

import torch

from .registry import Draw, Knobs, Spec, entry


def spatial(k: Knobs, **more: Any) -> Spec:
    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 24, *k.size),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            encoder_attention_mask=d.mask(k.batch, k.text),
            return_dict=False,
        )

    config = dict(
        num_attention_heads=3,
        attention_head_dim=12,
        in_channels=24,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=20,
        **more,
    )
    return config, inputs


@entry("Transformer2DModel", "image", (7, 11))
def transformer_2d(k: Knobs) -> Spec:
    """The block of Stable Diffusion's U-Net, with convolutions around."""
    return spatial(k)


@entry("Transformer2DModel/linear", "image", (7, 11))
def transformer_2d_linear(k: Knobs) -> Spec:
    """SDXL's: linear layers around."""
    return spatial(k, use_linear_projection=True)


@entry("Transformer2DModel/discrete", "image", (7, 7), prompt="class_labels", fixed=("size",))
def transformer_2d_discrete(k: Knobs) -> Spec:
    """VQ-Diffusion: token ids of a square in, log-probabilities of the unmasked ids out."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.integers(16, k.batch, k.tokens),
            timestep=d.steps(k.batch) % 10,
            class_labels=d.integers(10, k.batch),
            return_dict=False,
        )

    config = dict(
        num_attention_heads=3,
        attention_head_dim=12,
        num_layers=2,
        sample_size=k.size[0],
        num_vector_embeds=17,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return config, inputs


@entry("DreamLiteTransformer2DModel", "image", (7, 11))
def dreamlite(k: Knobs) -> Spec:
    """Normalised queries and keys. (Grouped queries need the processor that DreamLite's U-Net installs.)"""
    return spatial(k, qk_norm="rms_norm", ff_mult=2, use_linear_projection=True)


@entry("TransformerTemporalModel", "video", (5, 5, 7), prompt="hidden_states")
def temporal(k: Knobs) -> Spec:
    """AnimateDiff's motion module: attention over frames at every pixel."""
    f, h, w = k.size

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(hidden_states=d.randn(k.batch * f, 24, h, w), num_frames=f, return_dict=False)

    config = dict(
        num_attention_heads=3,
        attention_head_dim=12,
        in_channels=24,
        num_layers=2,
        norm_num_groups=4,
        positional_embeddings="sinusoidal",
        num_positional_embeddings=32,
    )
    return config, inputs


@entry("PriorTransformer", "other", (1,))
def prior(k: Knobs) -> Spec:
    """From prompt to image embedding: a causal sequence of prompt, embeddings, time and one learned token."""

    def inputs(d: Draw) -> dict[str, Any]:
        return dict(
            hidden_states=d.randn(k.batch, 20),
            timestep=d.steps(k.batch),
            proj_embedding=d.randn(k.batch, 20),
            encoder_hidden_states=d.randn(k.batch, k.text, 20),
            attention_mask=d.mask(k.batch, k.text, torch.bool),
            return_dict=False,
        )

    config = dict(
        num_attention_heads=3,
        attention_head_dim=12,
        num_layers=2,
        embedding_dim=20,
        num_embeddings=k.text,
    )
    return config, inputs


@entry("RFD4ProteinaTransformer", "other", (31,), prompt="token_type")
def proteina(k: Knobs) -> Spec:
    """Protein design: token attention biased by pairs, triangle multiplication on pairs, two recycles."""
    n = k.tokens

    def inputs(d: Draw) -> dict[str, Any]:
        orders = d.integers(5, k.batch, n, n)
        chains = torch.arange(n).expand(k.batch, -1)
        return dict(
            bb_ca=d.randn(k.batch, n, 3),
            local_latents=d.randn(k.batch, n, 4),
            bb_ca_time=d.times(k.batch),
            local_latents_time=d.times(k.batch, 0.5),
            padding_mask=d.mask(k.batch, n, torch.bool),
            token_type=d.integers(7, k.batch, n),
            conditioning=dict(
                is_in_context_conditioning=torch.arange(n).expand(k.batch, -1) % 5 == 1,
                supports_local_latent=torch.arange(n).expand(k.batch, -1) % 3 != 2,
                molecule_iid=chains // 8,
                bond_order=(orders + orders.transpose(1, 2)) // 2,
                token_bond_path_length=(chains[:, :, None] - chains[:, None]).abs(),
            ),
            recycle_depth=2,
            return_dict=False,
        )

    config = dict(
        nlayers=3,
        token_dim=36,
        nheads=3,
        dim_cond=16,
        pair_repr_dim=24,
        latent_dim=4,
        token_type_emb_dim=8,
        t_emb_dim=16,
        seq_sep_dim=8,
        xt_pair_dist_dim=8,
        feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining"),
        feats_pair_repr=("xt_bb_ca_pair_dists", "bond_order", "molecule_idx_pair", "token_bond_path_length"),
        tri_mult_c=12,
        num_sequence_classes=20,
    )
    return config, inputs
