"""fairseq's own modules: BART and its other encoder-decoder transformers, and Wav2Vec2.

fairseq's activations are functions, so there is no activation module. Its attention reads the weights of its linears
and does not call them: see `fairseq_build.call_projections_`. To convert checkpoints, see ``fairseq_convert.py``.
"""

from __future__ import annotations

from .adapter import Adapter, AttentionSite, GemmSite
from .record import CROSS_HEADS, FFN, HEADS

_VERSION = "fairseq-fixed>=0.12.3,<0.13"
_SELF = (
    GemmSite(r"self_attn\.q_proj", "q"),
    GemmSite(r"self_attn\.k_proj", "k"),
    GemmSite(r"self_attn\.v_proj", "v"),
    GemmSite(r"self_attn\.out_proj", "attn_out"),
)
_FFN = (GemmSite(r"fc1", "ffn_up"), GemmSite(r"fc2", "ffn_down"))

# The output projection is the token embedding, so it counts as tied; classification heads have the role pooler.
FAIRSEQ_BART = Adapter(
    name="fairseq_bart",
    model_types=("fairseq.BARTModel", "fairseq.TransformerModel", "fairseq.TransformerModelBase"),
    library=_VERSION,
    block=r"(?P<kind>encoder|decoder)\.layers\.(\d+)",
    gemms=(
        *_SELF,
        GemmSite(r"encoder_attn\.q_proj", "cross_q"),
        GemmSite(r"encoder_attn\.k_proj", "cross_k"),
        GemmSite(r"encoder_attn\.v_proj", "cross_v"),
        GemmSite(r"encoder_attn\.out_proj", "cross_out"),
        *_FFN,
    ),
    attention=(AttentionSite(r"self_attn"), AttentionSite(r"encoder_attn", "cross")),
    final_projection=r"decoder\.output_projection",
    per_block={"encoder": 6, "decoder": 10},
    pooler=r"classification_heads\.[^.]+\.(?:dense|out_proj)",
    embeddings=r"(?:encoder|decoder)\.embed_tokens",
    permutable=(FFN, HEADS, CROSS_HEADS),
)

# The convolutional front end, its projection and the positional convolution stay dense.
FAIRSEQ_WAV2VEC2 = Adapter(
    name="fairseq_wav2vec2",
    model_types=("fairseq.Wav2Vec2Model", "fairseq.Wav2VecCtc", "fairseq.Wav2VecEncoder"),
    library=_VERSION,
    block=r"(?:(?:w2v_encoder\.)?w2v_model\.)?encoder\.layers\.(\d+)",
    gemms=(*_SELF, *_FFN),
    attention=(AttentionSite(r"self_attn"),),
    final_projection=r"(?:w2v_encoder\.)?proj",
    per_block=6,
    permutable=(FFN, HEADS),
)
