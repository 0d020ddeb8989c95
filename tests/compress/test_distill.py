"""The mixed distillation loss of GPUSQ-TLM against `distillation.json` (torch functional losses in float64)."""

import json
from pathlib import Path

import pytest
import torch
from squeezoo.compress.distill import DistillError, feature_loss, hard_loss, mixed_loss, soft_loss
from squeezoo.compress.stages import Distill

VECTOR = json.loads((Path(__file__).parents[1] / "vectors" / "distillation.json").read_text())


def tensor(name: str) -> torch.Tensor:
    return torch.tensor(VECTOR[name], dtype=torch.float64)


STUDENT, TEACHER = tensor("student_logits"), tensor("teacher_logits")
LABELS = torch.tensor(VECTOR["labels"])


def test_hard_loss_with_labels_and_with_the_teachers_prediction():
    """`hard_ce`, `hard_ce_teacher_argmax`."""
    assert hard_loss(STUDENT, LABELS).item() == pytest.approx(VECTOR["hard_ce"], rel=1e-6)
    assert hard_loss(STUDENT, None, TEACHER).item() == pytest.approx(VECTOR["hard_ce_teacher_argmax"], rel=1e-6)
    with pytest.raises(DistillError, match="teacher's logits"):
        hard_loss(STUDENT, None)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_soft_loss(temperature):
    """`kl_teacher_student`, summed over classes, mean over samples; t^2 only on request (not printed in the paper)."""
    expected = VECTOR["kl_teacher_student"][str(temperature)]["batchmean"]
    assert soft_loss(STUDENT, TEACHER, temperature).item() == pytest.approx(expected, rel=1e-6)
    assert soft_loss(STUDENT, TEACHER, temperature, True).item() == pytest.approx(expected * temperature**2, rel=1e-6)


def test_feature_loss():
    """`mse_blocks`: one mean over all elements per block."""
    for student, teacher, expected in zip(tensor("feat_student"), tensor("feat_teacher"), VECTOR["mse_blocks"]):
        assert feature_loss(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_padding_does_not_count():
    """A padded batch has the loss of its real tokens alone, whatever stands in the padding."""
    student, teacher = tensor("feat_student")[0], tensor("feat_teacher")[0]
    mask = torch.ones(student.shape[:2], dtype=torch.long)
    mask[1, 2:] = 0
    real = torch.cat([student[0], student[1, :2]]), torch.cat([teacher[0], teacher[1, :2]])
    padded = feature_loss(student, teacher, mask)
    assert padded.item() == pytest.approx(torch.nn.functional.mse_loss(*real).item(), rel=1e-9)
    student = student.clone()
    student[1, 2:] = 1e6
    assert feature_loss(student, teacher, mask).item() == pytest.approx(padded.item(), rel=1e-9)


def test_total():
    """`gpusq_total_alpha1_beta10_gamma1_T2`: the classification terms of one pair, the features of another.

    The vector's final projection belongs to a second batch, so the total is put together from the three public terms.
    """
    features = sum(feature_loss(s, t) for s, t in zip(tensor("feat_student"), tensor("feat_teacher")))
    final = feature_loss(tensor("final_student")[None], tensor("final_teacher")[None])
    assert final.item() == pytest.approx(VECTOR["mse_final"], rel=1e-6)
    total = hard_loss(STUDENT, LABELS) + 10 * soft_loss(STUDENT, TEACHER, 2.0) + features + final
    assert total.item() == pytest.approx(VECTOR["gpusq_total_alpha1_beta10_gamma1_T2"], rel=1e-6)


def test_mixed_loss_is_the_sum_of_its_terms():
    """Equation 8 with factors 1, 10, 1: CE + 10 KL + block MSEs + final MSE, each term checked above."""
    config = Distill(teacher="dense")
    student, teacher = list(tensor("feat_student")), list(tensor("feat_teacher"))
    expected = (
        VECTOR["hard_ce"]
        + 10 * VECTOR["kl_teacher_student"]["2.0"]["batchmean"]
        + sum(VECTOR["mse_blocks"])
        + torch.nn.functional.mse_loss(STUDENT, TEACHER).item()
    )
    assert mixed_loss(config, STUDENT, TEACHER, LABELS, student, teacher).item() == pytest.approx(expected, rel=1e-6)
    unlabelled = mixed_loss(config, STUDENT, TEACHER, None, student, teacher).item()
    assert unlabelled - expected == pytest.approx(VECTOR["hard_ce_teacher_argmax"] - VECTOR["hard_ce"], rel=1e-5)


def test_regression_has_squared_error_and_no_soft_loss():
    """STS-B: L_hard = MSE, L_soft = 0 for one output."""
    z, y = torch.tensor([[1.0], [2.0]]), torch.tensor([1.5, 4.0])
    assert hard_loss(z, y).item() == pytest.approx((0.25 + 4.0) / 2)
    assert soft_loss(z, z + 1, 2.0).item() == 0.0


def test_features_of_different_width_are_refused():
    with pytest.raises(DistillError, match=r"teacher \(2, 5, 8\), student \(2, 5, 6\).*feature: 0"):
        feature_loss(torch.zeros(2, 5, 6), torch.zeros(2, 5, 8))
