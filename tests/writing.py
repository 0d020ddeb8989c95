"""Tiny models that write text, and a tokenizer of single characters for them: everything that they say can be read."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from squeezoo.eval.data import collator
from squeezoo.models.dense import logits
from tiny import BART, BOS, EOS, GPT2
from torch import nn
from torch.nn import functional as F

CHARACTERS = "\n " + string.ascii_letters + string.digits + ".,:;!?'|-_&#$%"
_NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
HEADS = ("causal-lm", "seq2seq-lm")


def character_tokenizer(encoder_decoder: bool) -> Any:
    """<unk> 0, <pad> 1, <s> 2, </s> 3, then `CHARACTERS`; texts become ``<s> text </s>`` for encoder-decoders."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<unk>", "<pad>", "<s>", "</s>", *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    if encoder_decoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def writer(head: str, positions: int = 512, spread: float = 0.3) -> tuple[nn.Module, Any]:
    """A tiny random GPT-2 or BART with so many positions, and its tokenizer.

    Args:
        spread: standard deviation of the weights; with the usual 0.02 BART writes the same whatever it reads.
    """
    import transformers

    torch.manual_seed(0)
    if head == "causal-lm":
        config = transformers.GPT2Config(
            **{**GPT2, "n_positions": positions, "initializer_range": spread, **_NO_DROPOUT}
        )
        return transformers.GPT2LMHeadModel(config).eval(), character_tokenizer(False)
    sizes = {"max_position_embeddings": positions, "forced_bos_token_id": None, "dropout": 0.0, "init_std": spread}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**{**BART, **sizes}))
    return model.eval(), character_tokenizer(True)


def learn_(model: Any, tokenizer: Any, features: Sequence[Any], steps: int) -> float:
    """Train on all features at once, with the labels alone as targets; the last loss."""
    batch = collator(tokenizer)(features)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        scores, labels = logits(model, batch), batch["labels"]
        if not model.config.is_encoder_decoder:
            scores, labels = scores[:, :-1], labels[:, 1:]
        loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()
