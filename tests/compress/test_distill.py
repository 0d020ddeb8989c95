"""The mixed distillation loss of GPUSQ-TLM against `distillation.json` (torch functional losses in float64), and its
rules for tokens, spans, frames and padding against plain loops."""

import json
from pathlib import Path

import pytest
import torch
from squeezoo.compress.distill import Pair, feature_loss, hard_loss, mixed_terms, soft_loss
from squeezoo.compress.heads import DistillError, Supervision
from squeezoo.compress.stages import Distill
from torch.nn import functional as F

VECTOR = json.loads((Path(__file__).parents[1] / "vectors" / "distillation.json").read_text())
# "produced by torch in float64, printed with 8 digits" (README of the vectors)
EXACT = 1e-6


def tensor(name: str) -> torch.Tensor:
    return torch.tensor(VECTOR[name], dtype=torch.float64)


STUDENT, TEACHER = tensor("student_logits"), tensor("teacher_logits")
LABELS = torch.tensor(VECTOR["labels"])
CLASSES = Supervision("classification", LABELS, None)
UNLABELLED = Supervision("classification", None, None)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hard_loss_with_labels_and_with_the_teachers_prediction():
    """`hard_ce`, `hard_ce_teacher_argmax`."""
    assert hard_loss(STUDENT, CLASSES).item() == pytest.approx(VECTOR["hard_ce"], rel=EXACT)
    expected = pytest.approx(VECTOR["hard_ce_teacher_argmax"], rel=EXACT)
    assert hard_loss(STUDENT, UNLABELLED, TEACHER).item() == expected
    assert hard_loss(STUDENT, CLASSES, TEACHER, use_labels=False).item() == expected
    with pytest.raises(DistillError, match="teacher's logits"):
        hard_loss(STUDENT, UNLABELLED)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_soft_loss(temperature):
    """`kl_teacher_student`, summed over classes, mean over samples; t^2 only on request (not printed in the paper).

    `soft_cross_entropy_batchmean` is the same loss plus the entropy of the teacher, so its gradient is the same.
    """
    expected = VECTOR["kl_teacher_student"][str(temperature)]
    z = STUDENT.clone().requires_grad_()
    loss = soft_loss(z, TEACHER, CLASSES, temperature)
    assert loss.item() == pytest.approx(expected["batchmean"], rel=EXACT)
    squared = soft_loss(STUDENT, TEACHER, CLASSES, temperature, True).item()
    assert squared == pytest.approx(expected["batchmean"] * temperature**2, rel=EXACT)
    p, log_q = F.softmax(TEACHER / temperature, -1), F.log_softmax(z / temperature, -1)
    cross = -(p * log_q).sum() / len(z)
    assert cross.item() == pytest.approx(expected["soft_cross_entropy_batchmean"], rel=EXACT)
    gradients = [torch.autograd.grad(value, z)[0] for value in (loss, cross)]
    torch.testing.assert_close(*gradients)


def test_feature_loss():
    """`mse_blocks`: one mean over all elements per block."""
    for student, teacher, expected in zip(tensor("feat_student"), tensor("feat_teacher"), VECTOR["mse_blocks"]):
        assert feature_loss(student, teacher).item() == pytest.approx(expected, rel=EXACT)


def test_padding_of_features_does_not_count():
    """A padded batch has the loss of its real tokens alone, whatever stands in the padding, NaN included."""
    student, teacher = tensor("feat_student")[0], tensor("feat_teacher")[0]
    mask = torch.ones(student.shape[:2], dtype=torch.bool)
    mask[1, 2:] = False
    real = F.mse_loss(student[mask], teacher[mask]).item()
    for junk in (0.0, 1e6, float("nan")):
        filled = student.masked_fill(~mask.unsqueeze(-1), junk)
        assert feature_loss(filled, teacher, mask).item() == pytest.approx(real, rel=1e-12)
    with pytest.raises(DistillError, match=r"do not go with a mask \(2, 3\)"):
        feature_loss(student, teacher, mask[:, :3])


def test_total():
    """`gpusq_total_alpha1_beta10_gamma1_T2`: the classification terms of one pair, the features of another.

    The vector's final projection belongs to a second batch, so it is given as one more pair of feature maps, and the
    MSE of the first batch's scores, which the vector leaves out, is taken off.
    """
    final = Pair(tensor("final_student"), tensor("final_teacher"))
    assert feature_loss(final.student, final.teacher).item() == pytest.approx(VECTOR["mse_final"], rel=EXACT)
    pairs = [Pair(s, t) for s, t in zip(tensor("feat_student"), tensor("feat_teacher"))]
    terms = mixed_terms(Distill(teacher="dense"), STUDENT, TEACHER, CLASSES, [*pairs, final])
    assert set(terms) == {"hard", "soft", "feature"}
    total = sum(terms.values()) - F.mse_loss(STUDENT, TEACHER)
    assert total.item() == pytest.approx(VECTOR["gpusq_total_alpha1_beta10_gamma1_T2"], rel=EXACT)


def test_factors_of_zero_leave_terms_out():
    """Plain knowledge distillation: hard 0, feature 0; then the feature maps need not even be of one shape."""
    plain = Distill(teacher="dense", hard=0, soft=1, feature=0, temperature=4)
    terms = mixed_terms(plain, STUDENT, TEACHER, UNLABELLED, [Pair(STUDENT, TEACHER[:1])])
    assert set(terms) == {"soft"}
    assert terms["soft"].item() == pytest.approx(VECTOR["kl_teacher_student"]["4.0"]["batchmean"], rel=EXACT)


def test_regression_has_squared_error_and_no_soft_loss():
    """STS-B: L_hard = MSE, L_soft = 0 for one output (ALGORITHMS E.1); without labels the teacher's value."""
    z = torch.tensor([[1.0], [2.0]])
    given = Supervision("regression", torch.tensor([1.5, 4.0]), None)
    assert hard_loss(z, given).item() == pytest.approx((0.25 + 4.0) / 2)
    assert soft_loss(z, z + 1, given, 2.0).item() == 0.0
    assert hard_loss(z, Supervision("regression", None, None), z + 3).item() == pytest.approx(9.0)
    assert set(mixed_terms(Distill(teacher="dense"), z, z + 1, given)) == {"hard", "soft", "feature"}


@pytest.mark.parametrize("kind", ["token", "causal", "masked", "seq2seq", "ctc"])
def test_soft_loss_of_tokens_is_the_mean_over_real_ones(kind):
    """Against KL over the gathered rows, with torch's own batch mean."""
    student, teacher = draw(2, 4, 5), draw(2, 4, 5, seed=1)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]], dtype=torch.bool)
    rows = F.log_softmax(student[mask] / 2, -1), F.log_softmax(teacher[mask] / 2, -1)
    expected = F.kl_div(*rows, reduction="batchmean", log_target=True)
    torch.testing.assert_close(soft_loss(student, teacher, Supervision(kind, None, mask), 2.0), expected)


def test_hard_loss_of_tokens_leaves_out_what_has_no_label():
    """-100 counts neither above nor below the line; a batch without any label gives 0, not NaN."""
    z = draw(2, 3, 4)
    labels = torch.tensor([[1, -100, 2], [-100, -100, 3]])
    expected = F.cross_entropy(z[labels >= 0], labels[labels >= 0])
    torch.testing.assert_close(hard_loss(z, Supervision("token", labels, None)), expected)
    assert hard_loss(z, Supervision("token", torch.full_like(labels, -100), None)).item() == 0.0


def test_hard_loss_of_tokens_without_labels_is_against_the_teacher_at_real_tokens():
    z, teacher = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    expected = F.cross_entropy(z[mask], teacher[mask].argmax(-1))
    torch.testing.assert_close(hard_loss(z, Supervision("masked", None, mask), teacher), expected)


def test_spans_are_classes_over_real_positions_mean_of_start_and_end():
    """SQuAD: CE and KL of start and of end, each over the positions that are no padding, then their mean (E.1)."""
    z, teacher = draw(2, 5, 2), draw(2, 5, 2, seed=1)
    lengths, labels = (5, 3), torch.tensor([[1, 4], [0, 2]])
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    hard, soft = [], []
    for row, length in enumerate(lengths):
        for side in (0, 1):
            ours, theirs = z[row, :length, side], teacher[row, :length, side]
            hard.append(F.cross_entropy(ours, labels[row, side]))
            logs = F.log_softmax(ours / 3, -1), F.log_softmax(theirs / 3, -1)
            soft.append(F.kl_div(*logs, reduction="sum", log_target=True))
    given = Supervision("span", labels, mask)
    torch.testing.assert_close(hard_loss(z, given), torch.stack(hard).mean())
    leaf = z.clone().requires_grad_()
    loss = soft_loss(leaf, teacher, given, 3.0)
    torch.testing.assert_close(loss.detach(), torch.stack(soft).mean())
    loss.backward()
    assert torch.isfinite(leaf.grad).all()
    assert not leaf.grad[1, 3:].any()
    argmax = torch.stack([teacher[row, :n].argmax(0) for row, n in enumerate(lengths)])
    unlabelled = hard_loss(z, Supervision("span", None, mask), teacher)
    torch.testing.assert_close(unlabelled, hard_loss(z, Supervision("span", argmax, mask)))


def test_ctc_loss_is_the_sum_over_alignments():
    """Two frames, label "1", blank 0: p(1, 1) + p(0, 1) + p(1, 0) (Graves et al. 2006, equation 3)."""
    z = draw(1, 3, 3)
    p = F.softmax(z[0, :2], -1)
    expected = -torch.log(p[0, 1] * p[1, 1] + p[0, 0] * p[1, 1] + p[0, 1] * p[1, 0])
    given = Supervision("ctc", torch.tensor([[1, -100]]), torch.tensor([[True, True, False]]))
    torch.testing.assert_close(hard_loss(z, given), expected)
    too_long = Supervision("ctc", torch.tensor([[1, 2, 1]]), given.mask)
    with pytest.raises(DistillError, match="3 label symbols but only 2 frames"):
        hard_loss(z, too_long)
    assert hard_loss(z, Supervision("ctc", too_long.labels, given.mask, 0, True)).item() == 0.0


def test_probabilities_as_labels():
    """Mixed images carry the shares of two classes as their label."""
    shares = torch.tensor([[0.3, 0.7, 0.0]], dtype=torch.float64)
    log_p = F.log_softmax(STUDENT[:1], -1)
    loss = hard_loss(STUDENT[:1], Supervision("classification", shares, None))
    torch.testing.assert_close(loss, -(0.3 * log_p[0, 0] + 0.7 * log_p[0, 1]))


def test_losses_of_bfloat16_are_float32():
    z = STUDENT.to(torch.bfloat16)
    terms = mixed_terms(Distill(teacher="dense"), z, TEACHER.to(torch.bfloat16), CLASSES, [Pair(z, z + 1)])
    assert all(term.dtype == torch.float32 for term in terms.values())
    expected = mixed_terms(Distill(teacher="dense"), z.float(), TEACHER.bfloat16().float(), CLASSES)
    assert terms["soft"] == expected["soft"]


def test_models_that_cannot_be_compared_are_refused():
    config = Distill(teacher="dense")
    with pytest.raises(DistillError, match=r"teacher \(2, 5, 8\), student \(2, 5, 6\).*project: true.*feature: 0"):
        feature_loss(torch.zeros(2, 5, 6), torch.zeros(2, 5, 8))
    with pytest.raises(DistillError, match="teacher scores 4 labels, the student 3"):
        mixed_terms(config, STUDENT, draw(4, 4), CLASSES)
    only_soft = Distill(teacher="dense", hard=0, feature=0)
    with pytest.raises(DistillError, match="nothing to learn from in a regression task"):
        mixed_terms(only_soft, STUDENT[:, :1], TEACHER[:, :1], Supervision("regression", None, None))
    with pytest.raises(DistillError, match="same positions"):
        mixed_terms(config, draw(2, 5, 3), draw(2, 6, 3), Supervision("token", None, None))
