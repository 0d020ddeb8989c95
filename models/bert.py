"""BERT (Devlin et al. 2019) and its sisters in transformers: RoBERTa (Liu et al. 2019), DistilBERT (Sanh et al. 2019).

MiniLM (Wang et al. 2020) is a BERT. XLM-R and CamemBERT have RoBERTa's module tree under RoBERTa's names.
"""

from __future__ import annotations

from dataclasses import replace

from .adapter import Adapter, AttentionSite, GemmSite
from .record import FFN, HEADS, BlockForm

BERT = Adapter(
    name="bert",
    model_types=("bert",),
    library="transformers>=5.10,<6",
    block=r"(?:bert\.)?encoder\.layer\.(\d+)",
    gemms=(
        GemmSite(r"attention\.self\.query", "q"),
        GemmSite(r"attention\.self\.key", "k"),
        GemmSite(r"attention\.self\.value", "v"),
        GemmSite(r"attention\.output\.dense", "attn_out"),
        GemmSite(r"intermediate\.dense", "ffn_up"),
        GemmSite(r"output\.dense", "ffn_down"),
    ),
    attention=(AttentionSite(r"attention\.self"),),
    final_projection=r"classifier|qa_outputs|cls\.predictions\.decoder",
    per_block=6,
    activation=r"intermediate\.intermediate_act_fn",
    pooler=r"(?:bert\.)?pooler\.dense",
    embeddings=r"(?:bert\.)?embeddings\.(?:word|position|token_type)_embeddings",
    permutable=(FFN, HEADS),
    forms=(BlockForm("attention.output.LayerNorm", "output.LayerNorm", norm_first=False),),
)

# The classifier of sequences has two layers: `dense`, which stands where BERT has its pooler, and `out_proj`.
ROBERTA = replace(
    BERT,
    name="roberta",
    model_types=("roberta", "xlm-roberta", "camembert"),
    block=r"(?:roberta\.)?encoder\.layer\.(\d+)",
    final_projection=r"classifier(?:\.out_proj)?|qa_outputs|lm_head\.decoder",
    pooler=r"(?:roberta\.)?pooler\.dense|classifier\.dense",
    embeddings=r"(?:roberta\.)?embeddings\.(?:word|position|token_type)_embeddings",
)

DISTILBERT = Adapter(
    name="distilbert",
    model_types=("distilbert",),
    library="transformers>=5.10,<6",
    block=r"(?:distilbert\.)?transformer\.layer\.(\d+)",
    gemms=(
        GemmSite(r"attention\.q_lin", "q"),
        GemmSite(r"attention\.k_lin", "k"),
        GemmSite(r"attention\.v_lin", "v"),
        GemmSite(r"attention\.out_lin", "attn_out"),
        GemmSite(r"ffn\.lin1", "ffn_up"),
        GemmSite(r"ffn\.lin2", "ffn_down"),
    ),
    attention=(AttentionSite(r"attention"),),
    final_projection=r"classifier|qa_outputs|vocab_projector",
    per_block=6,
    activation=r"ffn\.activation",
    pooler=r"pre_classifier",
    embeddings=r"(?:distilbert\.)?embeddings\.(?:word|position)_embeddings",
    permutable=(FFN, HEADS),
    forms=(BlockForm("sa_layer_norm", "output_layer_norm", norm_first=False),),
)
