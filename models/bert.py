"""BERT (Devlin et al. 2019) in transformers: MiniLM and every other checkpoint of ``model_type`` "bert"."""

from __future__ import annotations

from .adapter import Adapter, AttentionSite, GemmSite

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
)
