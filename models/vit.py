"""Vision Transformer (Dosovitskiy et al. 2021): transformers' own and timm's, DeiT (Touvron et al. 2021) included."""

from __future__ import annotations

from .adapter import Adapter, AttentionSite, GemmSite

VIT = Adapter(
    name="vit",
    model_types=("vit",),
    library="transformers>=5.10,<6",
    block=r"(?:vit\.)?layers\.(\d+)",
    gemms=(
        GemmSite(r"attention\.q_proj", "q"),
        GemmSite(r"attention\.k_proj", "k"),
        GemmSite(r"attention\.v_proj", "v"),
        GemmSite(r"attention\.o_proj", "attn_out"),
        GemmSite(r"mlp\.fc1", "ffn_up"),
        GemmSite(r"mlp\.fc2", "ffn_down"),
    ),
    attention=(AttentionSite(r"attention"),),
    final_projection=r"classifier",
    per_block=6,
    activation=r"mlp\.activation_fn",
)

# Between `act` and `fc2` timm's Mlp also has `drop1`, nothing in evaluation mode, and `norm`, an Identity except with
# scale_mlp_norm; find_sites then reports no activation. DeiT's second head, `head_dist`, stays dense.
TIMM_VIT = Adapter(
    name="timm_vit",
    model_types=("timm.VisionTransformer", "timm.VisionTransformerDistilled"),
    library="timm>=1.0.20",
    block=r"blocks\.(\d+)",
    gemms=(
        GemmSite(r"attn\.qkv", "qkv", parts=3),
        GemmSite(r"attn\.proj", "attn_out"),
        GemmSite(r"mlp\.fc1", "ffn_up"),
        GemmSite(r"mlp\.fc2", "ffn_down"),
    ),
    attention=(AttentionSite(r"attn"),),
    final_projection=r"head",
    per_block=4,
    activation=r"mlp\.act",
)
