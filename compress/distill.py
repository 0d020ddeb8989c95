"""Mixed distillation: hard labels, soft logits and feature maps (GPUSQ-TLM, section 3, equations 4-8; Algorithm 1).

    L = hard * L_hard + soft * L_soft + feature * L_feat
    L_hard = CE(labels, z_s), or CE(argmax z_t, z_s) without labels; CTC for frames; MSE for regression
    L_soft = KL(softmax(z_t / T) || softmax(z_s / T)), summed over classes, mean over samples or real tokens
    L_feat = sum over taps of MSE(F_t, F_s) + MSE(z_t, z_s), means over elements of real positions

Shapes: z [B, C], [B, L, C], [B, L, 2] for spans, [B, T, V] for CTC; F [B, L, D]; masks [B, L], true = a real position.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .heads import IGNORED, DistillError, Supervision
from .stages import Distill

# Scores of padding inside a softmax over positions: exp gives 0, and unlike -inf it leaves no NaN in the KL.
_NEVER = -1e30


@dataclass(frozen=True)
class Pair:
    """A feature map of the student [B, L, D], the teacher's, and their real positions [B, L] (None: all)."""

    student: Tensor
    teacher: Tensor
    mask: Tensor | None = None


def mixed_terms(
    config: Distill, student: Tensor, teacher: Tensor, given: Supervision, pairs: Iterable[Pair] = ()
) -> dict[str, Tensor]:
    """The weighted terms of one stage, ``hard``, ``soft`` and ``feature``, whose sum is the loss.

    Raises:
        DistillError: scores or feature maps of different shapes, or neither labels nor scores to take them from.
    """
    check_scores(student, teacher)
    if not (config.hard or config.feature or (config.soft and given.kind != "regression")):
        raise DistillError(f"nothing to learn from in a {given.kind} task: set hard, soft or feature above 0")
    terms = {}
    if config.hard:
        terms["hard"] = config.hard * hard_loss(student, given, teacher, use_labels=config.labels)
    if config.soft:
        terms["soft"] = config.soft * soft_loss(student, teacher, given, config.temperature, config.kl_t_squared)
    if config.feature:
        maps = [feature_loss(pair.student, pair.teacher, pair.mask) for pair in pairs]
        final = feature_loss(student, teacher, given.mask)
        terms["feature"] = config.feature * torch.stack([*maps, final]).sum()
    return terms


def hard_loss(student: Tensor, given: Supervision, teacher: Tensor | None = None, *, use_labels: bool = True) -> Tensor:
    """The supervised loss of a task: against the labels, or the teacher's prediction at T = 1 where there are none.

    Classes, tokens, start and end: cross-entropy, mean over what has a label. Regression: MSE. CTC: the negative log
    likelihood per label symbol, mean over samples; without labels, cross-entropy per frame.
    """
    student = full_precision(student)
    labels = given.labels if use_labels else None
    if labels is None and teacher is None:
        raise DistillError("the batch has no labels, and without them the hard loss needs the teacher's logits")
    if given.kind == "regression":
        target = teacher if labels is None else labels.reshape(student.shape)
        assert target is not None
        return F.mse_loss(student, target.to(student.dtype))
    if given.kind == "ctc" and labels is not None:
        return _ctc_loss(student, labels, given)
    z = _rows(student, given)
    if labels is None:
        assert teacher is not None
        labels = _rows(teacher, given).argmax(dim=-1)
        if given.mask is not None and given.kind != "span":
            labels = labels.masked_fill(~given.mask, IGNORED)
    if labels.dtype.is_floating_point:  # probabilities, from mixed images
        return F.cross_entropy(z, labels.to(z.dtype))
    losses = F.cross_entropy(z.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.sum() / (labels != IGNORED).sum().clamp(min=1)


def soft_loss(
    student: Tensor, teacher: Tensor, given: Supervision, temperature: float, t_squared: bool = False
) -> Tensor:
    """KL(teacher || student) at a temperature, summed over classes, mean over samples or real tokens; spans: mean over
    start and end of the KL over positions; regression: 0."""
    if given.kind == "regression":
        return student.new_zeros((), dtype=full_precision(student).dtype)
    log_s = F.log_softmax(_rows(full_precision(student), given) / temperature, dim=-1)
    log_t = F.log_softmax(_rows(full_precision(teacher), given) / temperature, dim=-1)
    losses = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(dim=-1)
    loss = masked_mean(losses, None if given.kind == "span" else given.mask)
    return loss * temperature**2 if t_squared else loss


def feature_loss(student: Tensor, teacher: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """Mean squared error over all elements of real positions, [B, L, D], or without a mask of any shape.

    Raises:
        DistillError: the shapes differ, or are not those of the mask.
    """
    if student.shape != teacher.shape:
        raise DistillError(
            f"feature maps differ: teacher {tuple(teacher.shape)}, student {tuple(student.shape)}; "
            "choose blocks of equal width, a learned projection (project: true), or feature: 0"
        )
    squared = (full_precision(student) - full_precision(teacher)) ** 2
    if mask_BL is not None and squared.shape[:2] != mask_BL.shape:
        raise DistillError(f"feature maps {tuple(student.shape)} do not go with a mask {tuple(mask_BL.shape)}")
    return squared.mean() if mask_BL is None else masked_mean(squared.flatten(2).mean(dim=-1), mask_BL)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of the values where the mask is true; 0 where it is nowhere."""
    if mask is None:
        return values.mean()
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def _ctc_loss(student_BTV: Tensor, labels_BS: Tensor, given: Supervision) -> Tensor:
    """Mean over samples of the CTC loss divided by the label's length (Graves et al. 2006; torch's ``mean``)."""
    batch, frames, _ = student_BTV.shape
    everywhere = torch.ones(batch, frames, dtype=torch.bool, device=student_BTV.device)
    frames_B = (everywhere if given.mask is None else given.mask).sum(dim=1)
    symbols_B = (labels_BS >= 0).sum(dim=1)
    if not given.zero_infinity and bool((symbols_B > frames_B).any()):
        row = int((symbols_B > frames_B).nonzero()[0])
        raise DistillError(
            f"sample {row} of the batch has {int(symbols_B[row])} label symbols but only {int(frames_B[row])} frames: "
            "leave such samples out, or set ctc_zero_infinity in the model's config"
        )
    log_probs_TBV = F.log_softmax(student_BTV, dim=-1).transpose(0, 1)
    return F.ctc_loss(
        log_probs_TBV, labels_BS[labels_BS >= 0], frames_B, symbols_B,
        blank=given.blank, reduction="mean", zero_infinity=given.zero_infinity,
    )  # fmt: skip


def _rows(scores: Tensor, given: Supervision) -> Tensor:
    """Scores with the classes last: of spans [B, 2, L], where padding can be no answer."""
    if given.kind != "span":
        return scores
    z_B2L = scores.transpose(1, 2)
    return z_B2L if given.mask is None else z_B2L.masked_fill(~given.mask.unsqueeze(1), _NEVER)


def check_scores(student: Tensor, teacher: Tensor) -> None:
    """Raises:
    DistillError: scores of different label spaces or positions.
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise DistillError(
            f"the teacher scores {teacher.shape[-1]} labels, the student {student.shape[-1]}: expected the same label "
            "space; give both models heads of one size"
        )
    if student.shape != teacher.shape:
        raise DistillError(
            f"the teacher's scores are {tuple(teacher.shape)}, the student's {tuple(student.shape)}: expected the same "
            "positions; both models must read the same tokens, or frames of the same stride"
        )


def full_precision(x: Tensor) -> Tensor:
    """At least float32: under autocast outputs come in bfloat16."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
