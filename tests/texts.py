"""A real, tiny tokenizer for tests: one token per lower-case letter or word of a short list, BERT's template."""

from __future__ import annotations

from typing import Any

from squeezoo.models.torchvision_guard import ensure_torchvision_importable

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


def sentence_tokenizer() -> Any:
    """[PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, then the letters a to z."""
    ensure_torchvision_importable()
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
