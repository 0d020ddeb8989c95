"""megatron-core's GPT with local modules (``get_gpt_layer_local_spec``), also split over tensor-parallel processes.

A `ColumnParallelLinear` holds some of the rows of its matrix, a `RowParallelLinear` some of its columns. N:M groups lie
along the columns: see ``compress/tensor_parallel.py`` for what must be checked and kept equal between processes.
"""

from __future__ import annotations

from .adapter import Adapter, AttentionSite, GemmSite
from .record import FFN

MEGATRON_GPT = Adapter(
    name="megatron_gpt",
    model_types=("megatron.GPTModel",),
    library="megatron-core>=0.16.1,<0.17",
    block=r"decoder\.layers\.(\d+)",
    gemms=(
        # parts=1: the rows lie as q, k, v of the first query group, q, k, v of the second, ...: not in three slices.
        # Masks and per-channel scales do not care; a per-tensor quantizer takes the whole matrix as one tensor.
        GemmSite(r"self_attention\.linear_qkv", "qkv"),
        GemmSite(r"self_attention\.linear_proj", "attn_out"),
        GemmSite(r"mlp\.linear_fc1", "ffn_up"),  # with a gated activation the rows of the gate too
        GemmSite(r"mlp\.linear_fc2", "ffn_down"),
    ),
    attention=(AttentionSite(r"self_attention\.core_attention", head_dim=("hidden_size_per_attention_head",)),),
    final_projection=r"output_layer",
    per_block=4,
    permutable=(FFN,),
)
