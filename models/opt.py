"""OPT (Zhang et al. 2022) in transformers."""

from __future__ import annotations

from .adapter import Adapter, AttentionSite, GemmSite
from .record import FFN, HEADS

# `project_in` and `project_out` stand between embeddings and blocks where their widths differ (OPT-350M).
OPT = Adapter(
    name="opt",
    model_types=("opt",),
    library="transformers>=5.10,<6",
    block=r"(?:model\.)?decoder\.layers\.(\d+)",
    gemms=(
        GemmSite(r"self_attn\.q_proj", "q"),
        GemmSite(r"self_attn\.k_proj", "k"),
        GemmSite(r"self_attn\.v_proj", "v"),
        GemmSite(r"self_attn\.out_proj", "attn_out"),
        GemmSite(r"fc1", "ffn_up"),
        GemmSite(r"fc2", "ffn_down"),
    ),
    attention=(AttentionSite(r"self_attn"),),
    final_projection=r"lm_head|score|qa_outputs",
    per_block=6,
    activation=r"activation_fn",
    beside_activation=(r"self_attn", r"self_attn_layer_norm", r"final_layer_norm"),
    pooler=r"(?:model\.)?decoder\.project_(?:in|out)",
    embeddings=r"(?:model\.)?decoder\.embed_(?:tokens|positions)",
    permutable=(FFN, HEADS),
)
