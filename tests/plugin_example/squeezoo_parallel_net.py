"""An architecture that Squeezoo does not know, and the adapter that makes it known: attention and FFN side by side.

Registered with transformers' auto classes, its checkpoints are loaded by name like any other.
"""

from __future__ import annotations

import torch
from squeezoo.models import Adapter, AttentionSite, GemmSite, Permutable
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class ParallelNetConfig(PreTrainedConfig):
    model_type = "parallel_net"

    def __init__(self, vocab_size=64, hidden_size=32, heads=2, depth=2, pad_token_id=0, **kwargs):
        self.vocab_size, self.hidden_size, self.heads, self.depth = vocab_size, hidden_size, heads, depth
        super().__init__(pad_token_id=pad_token_id, **kwargs)


class Mix(nn.Module):
    """Self attention; one matrix holds Q, K and V."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        q, k, v = self.into(x_BLD).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        scores_BHQK = q @ k.transpose(-1, -2) / self.head_dim**0.5
        p_BHQK = scores_BHQK.masked_fill(mask_BL[:, None, None] == 0, float("-inf")).softmax(-1)
        return self.out((p_BHQK @ v).transpose(1, 2).flatten(2))


class ParallelBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), Mix(width, heads)
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        y_BLD = self.norm(x_BLD)
        return x_BLD + self.mix(y_BLD, mask_BL) + self.ffn(y_BLD)


class ParallelNet(PreTrainedModel):
    config_class = ParallelNetConfig
    base_model_prefix = ""

    def __init__(self, config: ParallelNetConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.trunk = nn.ModuleList(ParallelBlock(config.hidden_size, config.heads) for _ in range(config.depth))
        self.readout = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutput:
        mask_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x_BLD = self.words(input_ids)
        for block in self.trunk:
            x_BLD = block(x_BLD, mask_BL)
        mean_BD = (x_BLD * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdim=True)
        return SequenceClassifierOutput(logits=self.readout(mean_BD))


AutoConfig.register("parallel_net", ParallelNetConfig)
AutoModelForSequenceClassification.register(ParallelNetConfig, ParallelNet)

ADAPTER = Adapter(
    name="parallel_net",
    model_types=("parallel_net",),
    library="squeezoo-parallel-net>=0.1",
    block=r"trunk\.(\d+)",
    gemms=(
        GemmSite(r"mix\.into", "qkv", parts=3),
        GemmSite(r"mix\.out", "attn_out"),
        GemmSite(r"ffn\.0", "ffn_up"),
        GemmSite(r"ffn\.2", "ffn_down"),
    ),
    attention=(AttentionSite(r"mix"),),
    final_projection=r"readout",
    per_block=4,
    activation=r"ffn\.1",
    embeddings=r"words",
    permutable=(Permutable("ffn_down", ("ffn_up",)), Permutable("attn_out", ("qkv",), within="head")),
)
