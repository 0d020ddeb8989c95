"""BART (Lewis et al. 2020) and mBART in transformers: encoder blocks, and decoder blocks with cross attention too."""

from __future__ import annotations

from .adapter import Adapter, AttentionSite, GemmSite
from .record import CROSS_HEADS, FFN, HEADS, BlockForm

BART = Adapter(
    name="bart",
    model_types=("bart", "mbart"),
    library="transformers>=5.10,<6",
    block=r"(?:model\.)?(?P<kind>encoder|decoder)\.layers\.(\d+)",
    gemms=(
        GemmSite(r"self_attn\.q_proj", "q"),
        GemmSite(r"self_attn\.k_proj", "k"),
        GemmSite(r"self_attn\.v_proj", "v"),
        GemmSite(r"self_attn\.out_proj", "attn_out"),
        GemmSite(r"encoder_attn\.q_proj", "cross_q"),
        GemmSite(r"encoder_attn\.k_proj", "cross_k"),
        GemmSite(r"encoder_attn\.v_proj", "cross_v"),
        GemmSite(r"encoder_attn\.out_proj", "cross_out"),
        GemmSite(r"fc1", "ffn_up"),
        GemmSite(r"fc2", "ffn_down"),
    ),
    attention=(AttentionSite(r"self_attn"), AttentionSite(r"encoder_attn", "cross")),
    final_projection=r"lm_head|classification_head\.out_proj|qa_outputs",
    per_block={"encoder": 6, "decoder": 10},
    activation=r"activation_fn",
    beside_activation=(r"self_attn", r"encoder_attn", r".*layer_norm"),
    pooler=r"classification_head\.dense",
    embeddings=r"(?:model\.)?(?:encoder|decoder)\.embed_(?:tokens|positions)",
    permutable=(FFN, HEADS, CROSS_HEADS),
    forms=tuple(BlockForm("self_attn_layer_norm", "final_layer_norm", norm_first=first) for first in (False, True)),
)
