"""GPT-2 (Radford et al. 2019) in transformers: ``Conv1D`` stores [in, out], and one matrix holds Q, K and V."""

from __future__ import annotations

from .adapter import Adapter, AttentionSite, GemmSite
from .record import FFN, FUSED_HEADS

GPT2 = Adapter(
    name="gpt2",
    model_types=("gpt2",),
    library="transformers>=5.10,<6",
    block=r"(?:transformer\.)?h\.(\d+)",
    gemms=(
        GemmSite(r"attn\.c_attn", "qkv", "in_out", parts=3),
        GemmSite(r"attn\.c_proj", "attn_out", "in_out"),
        GemmSite(r"mlp\.c_fc", "ffn_up", "in_out"),
        GemmSite(r"mlp\.c_proj", "ffn_down", "in_out"),
    ),
    attention=(AttentionSite(r"attn"),),
    final_projection=r"lm_head|score|classifier|qa_outputs",
    per_block=4,
    activation=r"mlp\.act",
    embeddings=r"(?:transformer\.)?w[tp]e",
    permutable=(FFN, FUSED_HEADS),
)
