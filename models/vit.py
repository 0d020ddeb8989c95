"""Vision Transformers: ViT (Dosovitskiy et al. 2021) and DeiT (Touvron et al. 2021) in transformers and in timm, DINOv2
(Oquab et al. 2023) in transformers. DeiT's second head, of its distillation token, stays dense."""

from __future__ import annotations

from dataclasses import replace

from .adapter import Adapter, AttentionSite, GemmSite
from .record import FFN, FUSED_HEADS, HEADS, BlockForm

VIT = Adapter(
    name="vit",
    model_types=("vit", "deit"),
    library="transformers>=5.10,<6",
    block=r"(?:(?:vit|deit)\.)?layers\.(\d+)",
    gemms=(
        GemmSite(r"attention\.q_proj", "q"),
        GemmSite(r"attention\.k_proj", "k"),
        GemmSite(r"attention\.v_proj", "v"),
        GemmSite(r"attention\.o_proj", "attn_out"),
        GemmSite(r"mlp\.fc1", "ffn_up"),
        GemmSite(r"mlp\.fc2", "ffn_down"),
    ),
    attention=(AttentionSite(r"attention"),),
    final_projection=r"(?:cls_)?classifier",
    per_block=6,
    activation=r"mlp\.activation_fn",
    pooler=r"(?:(?:vit|deit)\.)?pooler\.dense",
    permutable=(FFN, HEADS),
    forms=(BlockForm("layernorm_before", "layernorm_after", norm_first=True),),
)

# transformers renamed the modules of DINOv2 between 5.17 and 5.23: each pattern holds the older name, then the newer
# one. The giant's SwiGLU FFN is not described.
DINOV2 = Adapter(
    name="dinov2",
    model_types=("dinov2",),
    library="transformers>=5.10,<6",
    block=r"(?:dinov2\.)?encoder\.layer\.(\d+)",
    gemms=(
        GemmSite(r"attention\.(?:attention\.query|q_proj)", "q"),
        GemmSite(r"attention\.(?:attention\.key|k_proj)", "k"),
        GemmSite(r"attention\.(?:attention\.value|v_proj)", "v"),
        GemmSite(r"attention\.(?:output\.dense|o_proj)", "attn_out"),
        GemmSite(r"mlp\.fc1", "ffn_up"),
        GemmSite(r"mlp\.fc2", "ffn_down"),
    ),
    attention=(AttentionSite(r"attention(?:\.attention)?"),),
    final_projection=r"classifier",
    per_block=6,
    activation=r"mlp\.activation(?:_fn)?",
    permutable=(FFN, HEADS),
)

# Between `act` and `fc2` timm's Mlp also has `drop1`, nothing in evaluation mode, and `norm`, an Identity except with
# scale_mlp_norm; find_sites then reports no activation and no permutation. The same holds of `attn.norm`.
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
    permutable=(replace(FFN, unless=r"mlp\.norm"), replace(FUSED_HEADS, unless=r"attn\.norm")),
    forms=(BlockForm("norm1", "norm2", norm_first=True, mask="attn_mask"),),
)
