"""Llama (Touvron et al. 2023) in transformers: gated FFN, grouped K and V heads. SmolLM2 is a Llama; Mistral and Qwen2
have the same module tree."""

from __future__ import annotations

from .adapter import Adapter, AttentionSite, GemmSite
from .record import GATED_FFN, HEADS

LLAMA = Adapter(
    name="llama",
    model_types=("llama", "mistral", "qwen2"),
    library="transformers>=5.10,<6",
    block=r"(?:(?:model|transformer)\.)?layers\.(\d+)",
    gemms=(
        GemmSite(r"self_attn\.q_proj", "q"),
        GemmSite(r"self_attn\.k_proj", "k"),
        GemmSite(r"self_attn\.v_proj", "v"),
        GemmSite(r"self_attn\.o_proj", "attn_out"),
        GemmSite(r"mlp\.gate_proj", "ffn_gate"),
        GemmSite(r"mlp\.up_proj", "ffn_up"),
        GemmSite(r"mlp\.down_proj", "ffn_down"),
    ),
    attention=(AttentionSite(r"self_attn"),),
    final_projection=r"lm_head|score|qa_outputs",
    per_block=7,
    embeddings=r"(?:(?:model|transformer)\.)?embed_tokens",
    permutable=(GATED_FFN, HEADS),
)
