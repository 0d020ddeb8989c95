"""Kinds of task, labels and masks: the supervised loss of every head equals transformers' own."""

import pytest
import torch
from squeezoo.compress.distill import hard_loss
from squeezoo.compress.heads import DistillError, side_masks, supervision, task_kind
from squeezoo.models.dense import logits
from tiny import ROWS, make, tiny_batch

KINDS = {
    "classification": "classification", "token": "token", "question-answering": "span", "masked-lm": "masked",
    "causal-lm": "causal", "seq2seq-lm": "seq2seq", "ctc": "ctc",
}  # fmt: skip
# One row per pair of adapter and kind; transformers computes no loss for timm's models and for DeiT with its teacher.
HAS_LOSS = {name: row for name, row in ROWS.items() if row.adapter != "timm_vit" and name != "deit_teacher"}
CHECKED = {(row.adapter, row.kind): name for name, row in HAS_LOSS.items()}.values()


def masked_speech(n=4):
    """Waveforms with an attention mask, the odd ones padded from 140 values on, for models that read the mask."""
    batch = tiny_batch("wav2vec2_stable", n)
    mask = torch.ones_like(batch["input_values"], dtype=torch.long)
    mask[1::2, 140:] = 0
    return {**batch, "input_values": batch["input_values"] * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", CHECKED)
def test_supervised_loss_is_transformers_own(name):
    """`model(**batch).loss`. Its QA loss is over padding too and its CTC loss a sum by default, so the batch has no
    padding there and the reduction is set to ours."""
    model, batch = make(name), tiny_batch(name)
    if ROWS[name].kind == "ctc":
        batch["labels"][0, 2:] = -100
        model.config.ctc_loss_reduction = "mean"
    if ROWS[name].kind == "question-answering":
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    scores = logits(model, batch)
    assert task_kind(model, batch, scores) == KINDS[ROWS[name].kind]
    ours = hard_loss(scores, supervision(model, batch, scores))
    torch.testing.assert_close(ours, model(**batch).loss, rtol=1e-5, atol=1e-6)


def test_ctc_with_padding_is_transformers_own():
    model, batch = make("wav2vec2_stable"), masked_speech()
    model.config.ctc_loss_reduction = "mean"
    scores = logits(model, batch)
    given = supervision(model, batch, scores)
    lengths = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(1))
    assert given.mask.sum(1).tolist() == lengths.tolist()
    assert len(set(lengths.tolist())) == 2
    torch.testing.assert_close(hard_loss(scores, given), model(**batch).loss, rtol=1e-5, atol=1e-6)


def test_regression_is_one_output_or_says_so():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**{**ROWS["bert"].config, "num_labels": 1})
    model = BertForSequenceClassification(config).eval()
    batch = {**tiny_batch("bert"), "labels": torch.tensor([0.5, 2.0, 4.5, 1.0])}
    scores = logits(model, batch)
    given = supervision(model, batch, scores)
    assert given.kind == "regression"
    torch.testing.assert_close(hard_loss(scores, given), model(**batch).loss)
    three = make("bert")
    three.config.problem_type = "regression"
    assert task_kind(three, batch, logits(three, batch)) == "regression"
    three.config.problem_type = "multi_label_classification"
    with pytest.raises(DistillError, match="one label per sample"):
        task_kind(three, batch, logits(three, batch))


def test_causal_labels_are_shifted_and_leave_padding_out():
    """Position i predicts token i + 1; labels that simply copy the inputs do not train on padding."""
    model, batch = make("opt"), tiny_batch("opt")
    batch["labels"] = batch["input_ids"]
    given = supervision(model, batch, logits(model, batch))
    assert given.labels[0].tolist() == [*batch["input_ids"][0, 1:].tolist(), -100]
    assert given.labels[1].tolist() == [*batch["input_ids"][1, 1:8].tolist(), *[-100] * 5]


def test_masks_of_encoder_and_decoder():
    """The decoder's mask comes from its own, from labels, from its inputs, in this order."""
    model, batch = make("bart"), tiny_batch("bart")
    batch["labels"][1, 4:] = -100
    sides = side_masks(model, batch)
    assert sides["encoder"].sum(1).tolist() == [12, 8, 12, 8]
    assert sides["decoder"].sum(1).tolist() == [6, 4, 6, 6]
    ids = torch.tensor([[1, 5, 6, 1], [1, 5, 1, 1]])  # pad is 1, and also a start token here
    inputs = {"input_ids": batch["input_ids"][:2], "decoder_input_ids": ids}
    assert side_masks(model, inputs)["decoder"].sum(1).tolist() == [3, 2]
    own = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    assert side_masks(model, {**inputs, "decoder_attention_mask": own})["decoder"].sum(1).tolist() == [4, 1]
    classifier = make("bart_classification")
    assert side_masks(classifier, tiny_batch("bart"))["decoder"].sum(1).tolist() == [12, 8, 12, 8]


def test_answers_outside_the_window_count_as_none():
    """Position `length` and beyond, as in transformers; negative ones too."""
    model, batch = make("bert_qa"), tiny_batch("bert_qa")
    batch["start_positions"], batch["end_positions"] = torch.tensor([0, 12, -1, 3]), torch.tensor([1, 40, -1, 11])
    given = supervision(model, batch, logits(model, batch))
    assert given.labels.tolist() == [[0, 1], [-100, -100], [-100, -100], [3, 11]]
    del batch["end_positions"]
    with pytest.raises(DistillError, match="expected both or none"):
        supervision(model, batch, logits(model, batch))


def test_labels_and_masks_of_other_lengths_are_refused():
    model, batch = make("bert_token"), tiny_batch("bert_token")
    scores = logits(model, batch)
    with pytest.raises(DistillError, match=r"labels of shape \(4, 5\) for scores at \(4, 12\)"):
        supervision(model, {**batch, "labels": batch["labels"][:, :5]}, scores)
    with pytest.raises(DistillError, match="mask has 12 positions, the outputs of BertForTokenClassification have 7"):
        supervision(model, batch, scores[:, :7])
