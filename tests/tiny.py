"""Tiny random models, one row per architecture and head, and batches for them: same weights and inputs on every call.

``TINY`` holds the three that the whole suite runs on; ``ALL`` holds every row, which the adapter test runs on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from squeezoo.models.dense import logits
from squeezoo.models.torchvision_guard import ensure_torchvision_importable
from torch import Tensor, nn
from torch.nn import functional as F

ensure_torchvision_importable()  # before anything below imports transformers' models or timm

LABELS = 3
HEAD: dict[str, Any] = {"num_labels": LABELS}
TOKENS = 12
VOCABULARY = 128
SAMPLES = 200  # 19 frames of the tiny speech models
PAD, BOS, EOS = 1, 2, 3
# timm's vit_tiny, cut down to 2 blocks of width 32 on 8 x 8 images of one channel.
TIMM_ARGS: dict[str, Any] = dict(
    img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, num_classes=LABELS
)
# transformers: 2 blocks, width 32, 2 heads, FFN 64, under each config's names.
SIZES: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
TEXT: dict[str, Any] = dict(
    SIZES, vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS
)
BERT: dict[str, Any] = dict(SIZES, vocab_size=VOCABULARY, max_position_embeddings=64)
GROUPED: dict[str, Any] = dict(TEXT, num_key_value_heads=1)
DISTIL: dict[str, Any] = dict(
    vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64, pad_token_id=PAD
)
OPT: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64,
    max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
)  # fmt: skip
GPT2: dict[str, Any] = dict(
    vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, n_inner=64, pad_token_id=PAD,
    bos_token_id=BOS, eos_token_id=EOS,
)  # fmt: skip
BART: dict[str, Any] = dict(
    vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, pad_token_id=PAD,
    bos_token_id=BOS, eos_token_id=EOS, decoder_start_token_id=EOS, forced_eos_token_id=None,
)  # fmt: skip
IMAGE: dict[str, Any] = dict(SIZES, image_size=8, patch_size=2, num_channels=1)
DINO: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=8, patch_size=2, num_channels=1
)
SPEECH: dict[str, Any] = dict(
    SIZES, vocab_size=20, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, classifier_proj_size=16, apply_spec_augment=False,
    pad_token_id=0,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One tiny model.

    Args:
        adapter: name of the adapter that must serve it.
        kind: what it is for, as ``load_dense`` says it.
        made: class in transformers, or ``timm/<architecture>``.
        config: arguments of its config, or of ``timm.create_model``.
        final: name of its final projection; ``tied``: whether that is also the input embedding.
        pooler: names of its other linears outside the blocks that a recipe may touch.
    """

    adapter: str
    kind: str
    made: str
    config: dict[str, Any] = field(repr=False)
    final: str
    tied: bool = False
    pooler: tuple[str, ...] = ()


_BERT_POOLER = ("bert.pooler.dense",)
_PROJECTED: dict[str, Any] = dict(OPT, word_embed_proj_dim=16, do_layer_norm_before=False)  # as OPT-350M
_OPT_POOLER = ("model.decoder.project_out", "model.decoder.project_in")
_STABLE: dict[str, Any] = dict(SPEECH, do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True)
ROWS: dict[str, Row] = {
    "bert": Row(
        "bert", "classification", "BertForSequenceClassification", BERT | HEAD, "classifier", False, _BERT_POOLER
    ),
    "vit": Row("vit", "classification", "ViTForImageClassification", IMAGE | HEAD, "classifier"),
    "timm_vit": Row("timm_vit", "classification", "timm/vit_tiny_patch16_224", TIMM_ARGS, "head"),
    "bert_token": Row("bert", "token", "BertForTokenClassification", BERT | HEAD, "classifier"),
    "bert_qa": Row("bert", "question-answering", "BertForQuestionAnswering", BERT, "qa_outputs"),
    "bert_mlm": Row("bert", "masked-lm", "BertForMaskedLM", BERT, "cls.predictions.decoder", True),
    "roberta": Row(
        "roberta", "classification", "RobertaForSequenceClassification", TEXT | HEAD, "classifier.out_proj", False,
        ("classifier.dense",),
    ),
    "roberta_token": Row("roberta", "token", "RobertaForTokenClassification", TEXT | HEAD, "classifier"),
    "roberta_qa": Row("roberta", "question-answering", "RobertaForQuestionAnswering", TEXT, "qa_outputs"),
    "roberta_mlm": Row("roberta", "masked-lm", "RobertaForMaskedLM", TEXT, "lm_head.decoder", True),
    "xlm_roberta": Row(
        "roberta", "classification", "XLMRobertaForSequenceClassification", TEXT | HEAD, "classifier.out_proj", False,
        ("classifier.dense",),
    ),
    "camembert_mlm": Row("roberta", "masked-lm", "CamembertForMaskedLM", TEXT, "lm_head.decoder", True),
    "distilbert": Row(
        "distilbert", "classification", "DistilBertForSequenceClassification", DISTIL | HEAD, "classifier", False,
        ("pre_classifier",),
    ),
    "distilbert_token": Row("distilbert", "token", "DistilBertForTokenClassification", DISTIL | HEAD, "classifier"),
    "distilbert_qa": Row("distilbert", "question-answering", "DistilBertForQuestionAnswering", DISTIL, "qa_outputs"),
    "distilbert_mlm": Row("distilbert", "masked-lm", "DistilBertForMaskedLM", DISTIL, "vocab_projector", True),
    "opt": Row("opt", "causal-lm", "OPTForCausalLM", OPT, "lm_head", True),
    "opt_projected": Row(
        "opt", "classification", "OPTForSequenceClassification", _PROJECTED | HEAD, "score", False, _OPT_POOLER
    ),
    "gpt2": Row("gpt2", "causal-lm", "GPT2LMHeadModel", GPT2, "lm_head", True),
    "gpt2_classification": Row("gpt2", "classification", "GPT2ForSequenceClassification", GPT2 | HEAD, "score"),
    "gpt2_token": Row("gpt2", "token", "GPT2ForTokenClassification", GPT2 | HEAD, "classifier"),
    "llama": Row("llama", "causal-lm", "LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True}, "lm_head", True),
    "llama_classification": Row("llama", "classification", "LlamaForSequenceClassification", GROUPED | HEAD, "score"),
    "llama_qa": Row("llama", "question-answering", "LlamaForQuestionAnswering", GROUPED, "qa_outputs"),
    "mistral": Row("llama", "causal-lm", "MistralForCausalLM", GROUPED | {"tie_word_embeddings": False}, "lm_head"),
    "qwen2": Row("llama", "causal-lm", "Qwen2ForCausalLM", GROUPED | {"tie_word_embeddings": True}, "lm_head", True),
    "bart": Row("bart", "seq2seq-lm", "BartForConditionalGeneration", BART, "lm_head", True),
    "bart_classification": Row(
        "bart", "classification", "BartForSequenceClassification", BART | HEAD, "classification_head.out_proj", False,
        ("classification_head.dense",),
    ),
    "bart_qa": Row("bart", "question-answering", "BartForQuestionAnswering", BART, "qa_outputs"),
    "mbart": Row("bart", "seq2seq-lm", "MBartForConditionalGeneration", BART, "lm_head", True),
    "deit": Row("vit", "classification", "DeiTForImageClassification", IMAGE | HEAD, "classifier"),
    "deit_teacher": Row(
        "vit", "classification", "DeiTForImageClassificationWithTeacher", IMAGE | HEAD, "cls_classifier"
    ),
    "dinov2": Row("dinov2", "classification", "Dinov2ForImageClassification", DINO | HEAD, "classifier"),
    "timm_deit": Row("timm_vit", "classification", "timm/deit_tiny_distilled_patch16_224", TIMM_ARGS, "head"),
    "wav2vec2": Row("wav2vec2", "ctc", "Wav2Vec2ForCTC", SPEECH, "lm_head"),
    "wav2vec2_stable": Row("wav2vec2", "ctc", "Wav2Vec2ForCTC", _STABLE, "lm_head"),
    "wav2vec2_classification": Row(
        "wav2vec2", "classification", "Wav2Vec2ForSequenceClassification", SPEECH | HEAD, "classifier", False,
        ("projector",),
    ),
    "hubert": Row("wav2vec2", "ctc", "HubertForCTC", SPEECH, "lm_head"),
}  # fmt: skip


def make(name: str) -> nn.Module:
    """The model of a row, in evaluation mode, all its vectors (biases, norms) randomized: zeros would hide mistakes."""
    row = ROWS[name]
    if row.made.startswith("timm/"):
        import timm

        model: Any = _seeded(lambda: timm.create_model(row.made.removeprefix("timm/"), **row.config))
        model.squeezoo_model_args = dict(row.config)  # as load_dense does: timm before 1.0.31 does not keep them
        return model
    import transformers

    cls = getattr(transformers, row.made)
    return _seeded(lambda: cls(cls.config_class(**row.config)))


ALL: dict[str, Callable[[], nn.Module]] = {name: (lambda name=name: make(name)) for name in ROWS}
TINY: dict[str, Callable[[], nn.Module]] = {name: ALL[name] for name in ("bert", "vit", "timm_vit")}


def tiny_batch(name: str, n: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """``n`` examples with their targets: text of 12 tokens, the odd rows padded to 8; images [n, 1, 8, 8]; waveforms
    [n, 200]. ``labels`` are [n] for classification, [n, 12] for tokens and language models (-100: no target), [n, 6]
    for seq2seq, [n, 4] for CTC; question answering has start_positions and end_positions [n]."""
    row = ROWS[name]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(LABELS, (n,), generator=generator)
    if row.adapter in ("vit", "timm_vit", "dinov2"):
        return {"pixel_values": torch.randn(n, 1, 8, 8, generator=generator), "labels": labels}
    if row.adapter == "wav2vec2":
        if row.kind == "ctc":
            labels = torch.randint(1, row.config["vocab_size"], (n, 4), generator=generator)
        return {"input_values": torch.randn(n, SAMPLES, generator=generator), "labels": labels}
    # Below PAD, BOS and EOS of the later rows no id is special; BERT's rows, the first, draw from all.
    lowest = 0 if row.adapter == "bert" else EOS + 1
    input_ids = torch.randint(lowest, VOCABULARY, (n, TOKENS), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1::2, 8:] = 0
    if row.adapter != "bert":
        input_ids[attention_mask == 0] = PAD
        input_ids[torch.arange(n), attention_mask.sum(1) - 1] = EOS
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if row.kind == "question-answering":
        return {**batch, "start_positions": labels, "end_positions": labels + 1}
    if row.kind == "token":
        labels = torch.randint(LABELS, (n, TOKENS), generator=generator)
    elif row.kind in ("masked-lm", "causal-lm"):
        labels = input_ids
    elif row.kind == "seq2seq-lm":
        return {**batch, "labels": torch.randint(lowest, VOCABULARY, (n, 6), generator=generator)}
    return {**batch, "labels": labels if labels.dim() == 1 else labels.masked_fill(attention_mask == 0, -100)}


def tiny_loss(model: nn.Module, name: str, batch: dict[str, Tensor]) -> Tensor:
    """The training loss of the row's kind, from `logits` alone."""
    scores = logits(model, batch)
    kind = ROWS[name].kind
    if kind == "question-answering":
        return F.cross_entropy(scores.unbind(-1)[0], batch["start_positions"]) + F.cross_entropy(
            scores.unbind(-1)[1], batch["end_positions"]
        )
    if kind == "ctc":
        n, frames, _ = scores.shape
        lengths = torch.full((n,), frames), torch.full((n,), batch["labels"].shape[1])
        return F.ctc_loss(scores.log_softmax(-1).transpose(0, 1), batch["labels"], *lengths)
    if kind == "causal-lm":
        scores, batch = scores[:, :-1], {"labels": batch["labels"][:, 1:]}
    return F.cross_entropy(scores.flatten(0, -2), batch["labels"].flatten())


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
