"""Wav2vec 2.0 (Baevski et al. 2020) and HuBERT (Hsu et al. 2021) in transformers: one module tree, two prefixes.

The convolutional feature extractor, its projection and the positional convolution stay dense. Large models, which
normalize first (``do_stable_layer_norm``), have the same names.
"""

from __future__ import annotations

from .adapter import Adapter, AttentionSite, GemmSite
from .record import FFN, HEADS, BlockForm

WAV2VEC2 = Adapter(
    name="wav2vec2",
    model_types=("wav2vec2", "hubert"),
    library="transformers>=5.10,<6",
    block=r"(?:(?:wav2vec2|hubert)\.)?encoder\.layers\.(\d+)",
    gemms=(
        GemmSite(r"attention\.q_proj", "q"),
        GemmSite(r"attention\.k_proj", "k"),
        GemmSite(r"attention\.v_proj", "v"),
        GemmSite(r"attention\.out_proj", "attn_out"),
        GemmSite(r"feed_forward\.intermediate_dense", "ffn_up"),
        GemmSite(r"feed_forward\.output_dense", "ffn_down"),
    ),
    attention=(AttentionSite(r"attention"),),
    final_projection=r"lm_head|classifier",
    per_block=6,
    activation=r"feed_forward\.intermediate_act_fn",
    left_dense=(r"adapter_layer\.linear_[12]",),  # the language adapters of MMS
    pooler=r"projector",
    permutable=(FFN, HEADS),
    forms=tuple(BlockForm("layer_norm", "final_layer_norm", norm_first=first) for first in (False, True)),
)
