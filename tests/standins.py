"""Modules with the names and the arithmetic of fairseq and Megatron, written from the papers, to test without them.

tests/extras holds the same checks on the libraries themselves. ``__module__`` says whose class a stand-in is for, since
adapters and doors go by it. Legend: B batch, T time, D width.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EOS, PAD, SPECIAL = 2, 1, 4
SYMBOLS = ("<s>", "<pad>", "</s>", "<unk>", "|", "E", "T", "A", "O", "N")
BART_ARGS: dict[str, Any] = dict(
    arch="bart_base", task="denoising", encoder_layers=2, decoder_layers=1, encoder_embed_dim=16,
    encoder_ffn_embed_dim=32, decoder_ffn_embed_dim=24, encoder_attention_heads=2, decoder_attention_heads=4,
    max_source_positions=20, max_target_positions=20, activation_fn="gelu", no_scale_embedding=True, dropout=0.1,
)  # fmt: skip
W2V_ARGS: dict[str, Any] = dict(
    extractor_mode="default", layer_norm_first=False, encoder_layers=2, encoder_embed_dim=24,
    encoder_ffn_embed_dim=32, encoder_attention_heads=2, conv_feature_layers="[(16, 10, 5)] + [(16, 3, 2)] * 2",
    conv_bias=True, conv_pos=6, conv_pos_groups=2, activation_fn="gelu",
)  # fmt: skip


class MultiheadAttention(nn.Module):
    __module__ = "fairseq.modules.multihead_attention"

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.dropout_module = nn.Dropout(0.0)
        self.skip_embed_dim_check = False

    def _project(self, name: str, x: Tensor) -> Tensor:
        """fairseq hands the weights to a function unless told otherwise: hooks of the linears are not called then."""
        linear = getattr(self, name)
        return linear(x) if self.skip_embed_dim_check else F.linear(x, linear.weight, linear.bias)

    def forward(self, query_BTD: Tensor, memory_BTD: Tensor, blocked: Tensor) -> Tensor:
        projected = (self._project(f"{n}_proj", x) for n, x in (("q", query_BTD), ("k", memory_BTD), ("v", memory_BTD)))
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in projected)
        scores = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).masked_fill(blocked, float("-inf"))
        out = self.dropout_module(scores.softmax(-1)) @ v
        return self._project("out_proj", out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Encoder or, with ``cross``, decoder block; ``norm_first`` as Wav2Vec2's large models."""

    def __init__(self, width: int, heads: int, ffn: int, cross: bool = False, norm_first: bool = False) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.self_attn, self.self_attn_layer_norm = MultiheadAttention(width, heads), nn.LayerNorm(width)
        if cross:
            self.encoder_attn, self.encoder_attn_layer_norm = MultiheadAttention(width, heads), nn.LayerNorm(width)
        self.fc1, self.fc2, self.final_layer_norm = nn.Linear(width, ffn), nn.Linear(ffn, width), nn.LayerNorm(width)

    def forward(self, x: Tensor, blocked: Tensor, memory: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        parts = [(self.self_attn_layer_norm, lambda y: self.self_attn(y, y, blocked))]
        if memory is not None:
            parts.append((self.encoder_attn_layer_norm, lambda y: self.encoder_attn(y, memory, hidden)))
        parts.append((self.final_layer_norm, lambda y: self.fc2(F.gelu(self.fc1(y)))))
        for norm, part in parts:
            x = x + part(norm(x)) if self.norm_first else norm(x + part(x))
        return x


class Side(nn.Module):
    """Encoder or decoder: tokens and positions, then blocks."""

    def __init__(self, embedding: nn.Embedding, positions: int, layers: int, heads: int, ffn: int, cross: bool) -> None:
        super().__init__()
        width = embedding.embedding_dim
        self.register_buffer("version", torch.tensor([3.0]))
        self.embed_tokens, self.embed_positions = embedding, nn.Embedding(positions + PAD + 1, width, PAD)
        self.layernorm_embedding = nn.LayerNorm(width)
        self.layers = nn.ModuleList(Layer(width, heads, ffn, cross) for _ in range(layers))
        if cross:
            self.output_projection = nn.Linear(width, embedding.num_embeddings, bias=False)
            self.output_projection.weight = embedding.weight

    def embed(self, ids_BT: Tensor) -> Tensor:
        real = ids_BT.ne(PAD)
        positions = torch.where(real, real.cumsum(1) + PAD, PAD)  # counted from the first token that is no padding
        return self.layernorm_embedding(self.embed_tokens(ids_BT) + self.embed_positions(positions))


class BARTModel(nn.Module):
    __module__ = "fairseq.models.bart.model"

    def __init__(self, args: dict[str, Any], vocabulary: int = 40, head: tuple[str, int] | None = None) -> None:
        super().__init__()
        width = args["encoder_embed_dim"]
        embedding = nn.Embedding(vocabulary, width, PAD)
        for side in ("encoder", "decoder"):
            sizes = (args[f"{side}_layers"], args[f"{side}_attention_heads"], args[f"{side}_ffn_embed_dim"])
            setattr(self, side, Side(embedding, args["max_source_positions"], *sizes, side == "decoder"))
        self.classification_heads = nn.ModuleDict()
        if head is not None:
            dense, out = nn.Linear(width, width), nn.Linear(width, head[1])
            self.classification_heads[head[0]] = nn.ModuleDict({"dense": dense, "out_proj": out})

    def forward(self, source_BT: Tensor, target_BT: Tensor) -> Tensor:
        """Logits [B, T, vocabulary]; with a head [B, labels], of the last EOS in the source."""
        hidden = source_BT.eq(PAD)[:, None, None]
        later = torch.ones(target_BT.shape[1], target_BT.shape[1]).triu(1).bool()
        x, y = self.encoder.embed(source_BT), self.decoder.embed(target_BT)
        for layer in self.encoder.layers:
            x = layer(x, hidden)
        for layer in self.decoder.layers:
            y = layer(y, later | target_BT.eq(PAD)[:, None, None], x, hidden)
        for head in self.classification_heads.values():
            last = torch.arange(source_BT.shape[1]).mul(source_BT.eq(EOS)).argmax(1)
            return head["out_proj"](torch.tanh(head["dense"](y[torch.arange(len(y)), last])))
        return self.decoder.output_projection(y)


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(-1, -2)


class Wav2Vec2Model(nn.Module):
    __module__ = "fairseq.models.wav2vec.wav2vec2"

    def __init__(self, args: dict[str, Any], convolutions: tuple[tuple[int, int, int], ...]) -> None:
        super().__init__()
        width, layers, channels = args["encoder_embed_dim"], nn.ModuleList(), 1
        for i, (out, kernel, stride) in enumerate(convolutions):
            parts = [nn.Conv1d(channels, out, kernel, stride, bias=args["conv_bias"]), nn.Dropout(0.0)]
            if args["extractor_mode"] == "layer_norm":
                parts.append(nn.Sequential(Transpose(), nn.LayerNorm(out), Transpose()))
            elif i == 0:
                parts.append(nn.GroupNorm(out, out))
            layers.append(nn.Sequential(*parts, nn.GELU()))
            channels = out
        self.feature_extractor = nn.ModuleDict({"conv_layers": layers})
        self.layer_norm = nn.LayerNorm(channels)
        self.post_extract_proj = nn.Linear(channels, width) if channels != width else None
        self.mask_emb = nn.Parameter(torch.rand(width))
        self.final_proj = nn.Linear(width, width)  # pre-training only
        kernel, sizes = args["conv_pos"], (args["encoder_attention_heads"], args["encoder_ffn_embed_dim"])
        position = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=args["conv_pos_groups"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the form of weight_norm that fairseq uses is deprecated
            position = nn.utils.weight_norm(position, dim=2)
        blocks = (Layer(width, *sizes, norm_first=args["layer_norm_first"]) for _ in range(args["encoder_layers"]))
        self.encoder = nn.ModuleDict(
            {"pos_conv": nn.Sequential(position), "layers": nn.ModuleList(blocks), "layer_norm": nn.LayerNorm(width)}
        )
        self.norm_first, self.cut = args["layer_norm_first"], 1 - kernel % 2

    def forward(self, audio_BT: Tensor) -> Tensor:
        x = audio_BT[:, None]
        for layer in self.feature_extractor["conv_layers"]:
            x = layer(x)
        x = self.layer_norm(x.transpose(1, 2))
        x = x if self.post_extract_proj is None else self.post_extract_proj(x)
        position = self.encoder["pos_conv"](x.transpose(1, 2))
        x = x + F.gelu(position[..., : position.shape[-1] - self.cut]).transpose(1, 2)
        x = x if self.norm_first else self.encoder["layer_norm"](x)
        for layer in self.encoder["layers"]:
            x = layer(x, torch.zeros(1, dtype=torch.bool))
        return self.encoder["layer_norm"](x) if self.norm_first else x


class Wav2VecCtc(nn.Module):
    __module__ = "fairseq.models.wav2vec.wav2vec2_asr"

    def __init__(self, inner: Wav2Vec2Model, symbols: int) -> None:
        super().__init__()
        del inner.final_proj
        width = inner.mask_emb.shape[0]
        self.w2v_encoder = nn.ModuleDict({"w2v_model": inner, "proj": nn.Linear(width, symbols)})

    def forward(self, audio_BT: Tensor) -> Tensor:
        return self.w2v_encoder["proj"](self.w2v_encoder["w2v_model"](audio_BT))


class ColumnParallelLinear(nn.Module):
    """The rows of one of ``world_size`` processes; returns (output, bias) as Megatron's do."""

    __module__ = "megatron.core.tensor_parallel.layers"

    def __init__(self, input_size: int, output_size: int, world_size: int = 1) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        self.output_size_per_partition = output_size // world_size
        self.weight = nn.Parameter(torch.randn(self.output_size_per_partition, input_size) / input_size**0.5)
        self.sequence_parallel = self.gradient_accumulation_fusion = False

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


class RowParallelLinear(nn.Module):
    __module__ = "megatron.core.tensor_parallel.layers"

    def __init__(self, input_size: int, output_size: int, world_size: int = 1) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        self.input_size_per_partition = input_size // world_size
        self.weight = nn.Parameter(torch.randn(output_size, self.input_size_per_partition) / input_size**0.5)
        self.sequence_parallel = self.gradient_accumulation_fusion = False

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


class GPTModel(nn.Module):
    """Megatron's names, no forward pass."""

    __module__ = "megatron.core.models.gpt.gpt_model"

    def __init__(
        self, world_size: int = 1, tied: bool = False, width: int = 16, ffn: int = 64, layers: int = 2
    ) -> None:
        super().__init__()
        self.config = Namespace(hidden_size=width)  # Megatron's config has no model_type
        self.output_layer = ColumnParallelLinear(width, 40, world_size)
        if tied:
            del self.output_layer.weight
            self.output_layer.weight = None
        blocks = []
        for _ in range(layers):
            core = nn.Module()
            core.hidden_size_per_attention_head = width // 2
            attention = nn.ModuleDict(
                {
                    "core_attention": core,
                    "linear_proj": RowParallelLinear(width, width, world_size),
                    "linear_qkv": ColumnParallelLinear(width, 3 * width, world_size),
                }
            )
            fc1, fc2 = ColumnParallelLinear(width, ffn, world_size), RowParallelLinear(ffn, width, world_size)
            blocks.append(
                nn.ModuleDict(
                    {"self_attention": attention, "mlp": nn.ModuleDict({"linear_fc1": fc1, "linear_fc2": fc2})}
                )
            )
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})


def shaken(make: Any, seed: int = 0) -> Any:
    """``make()`` in evaluation mode, from a seed, its vectors randomized: zeros and ones would hide mistakes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def bart(**head: Any) -> Any:
    return shaken(lambda: BARTModel(BART_ARGS, **head))


def wav2vec2(mode: str = "default", norm_first: bool = False, width: int = 16) -> tuple[Any, dict[str, Any]]:
    """(model, its fairseq arguments); ``width`` 24 is that of the transformer: there is no projection then."""
    convolutions = ((16, 10, 5), (width, 3, 2), (width, 3, 2))
    text = f"[(16, 10, 5)] + [({width}, 3, 2)] * 2"
    args = W2V_ARGS | {"extractor_mode": mode, "layer_norm_first": norm_first, "conv_feature_layers": text}
    return shaken(lambda: Wav2Vec2Model(args, convolutions)), args


def wav2vec_ctc(**options: Any) -> tuple[Any, dict[str, Any]]:
    """(model, arguments of the Wav2Vec2 inside it)."""
    inner, args = wav2vec2(**options)
    return shaken(lambda: Wav2VecCtc(inner, len(SYMBOLS)), seed=1), args


def tokens() -> tuple[Tensor, Tensor]:
    """Source and target [2, 9], the second source padded on the right; one EOS in each source, none in the targets."""
    generator = torch.Generator().manual_seed(5)
    source = torch.randint(SPECIAL, 40, (2, 9), generator=generator)
    source[0, 8] = source[1, 6] = EOS
    source[1, 7:] = PAD
    target = torch.cat([torch.full((2, 1), EOS), source[:, :-1]], dim=1)
    return source, target


def save(model: nn.Module, path: Any, *, args: Any = None, cfg: Any = None, **more: Any) -> None:
    """A file as fairseq writes it: the model, and the state of training around it."""
    history = [{"criterion_name": "X", "optimizer_name": "adam", "lr_scheduler_state": {}, "num_updates": 7}]
    file = {"args": args, "cfg": cfg, "model": model.state_dict(), "optimizer_history": history}
    torch.save(file | {"extra_state": {"train_iterator": {"epoch": 1}}, "last_optimizer_state": None} | more, path)
