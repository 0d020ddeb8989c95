"""One tiny random model per adapter, and batches for it: same weights and inputs on every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from squeezoo.models.torchvision_guard import ensure_torchvision_importable
from torch import Tensor, nn

ensure_torchvision_importable()  # before anything below imports transformers' models or timm

LABELS = 3
HEAD: dict[str, Any] = {"num_labels": LABELS}
TOKENS = 12
VOCABULARY = 128
# timm's vit_tiny, cut down to 2 blocks of width 32 on 8 x 8 images of one channel.
TIMM_ARGS: dict[str, Any] = dict(
    img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, num_classes=LABELS
)


def tiny_bert() -> nn.Module:
    """2 blocks, width 32, 2 heads, FFN 64, 3 labels."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        **HEAD,
    )
    return _seeded(lambda: BertForSequenceClassification(config))


def tiny_vit() -> nn.Module:
    """transformers' ViT: 2 blocks, width 32, 2 heads, FFN 64, 8 x 8 images of one channel, 2 x 2 patches, 3 labels."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=8,
        patch_size=2,
        num_channels=1,
        **HEAD,
    )
    return _seeded(lambda: ViTForImageClassification(config))


def tiny_timm_vit() -> nn.Module:
    """timm's ViT of the same sizes, its QKV in one matrix."""
    import timm

    model: Any = _seeded(lambda: timm.create_model("vit_tiny_patch16_224", **TIMM_ARGS))
    model.squeezoo_model_args = dict(TIMM_ARGS)  # as load_dense does: timm before 1.0.31 does not keep them
    return model


TINY: dict[str, Callable[[], nn.Module]] = {"bert": tiny_bert, "vit": tiny_vit, "timm_vit": tiny_timm_vit}


def tiny_batch(name: str, n: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """``n`` examples for ``TINY[name]``: bert 12 tokens, the odd rows padded to 8; images [n, 1, 8, 8]; labels [n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(LABELS, (n,), generator=generator)
    if name != "bert":
        return {"pixel_values": torch.randn(n, 1, 8, 8, generator=generator), "labels": labels}
    input_ids = torch.randint(VOCABULARY, (n, TOKENS), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1::2, 8:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """The model in evaluation mode, all its vectors (biases, norms) randomized: zeros and ones would hide mistakes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
