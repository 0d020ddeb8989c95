"""Patient knowledge distillation (PKD; Sun et al. 2019, arXiv:1908.09355, section 3).

    L = (1 - alpha) CE + alpha T^2 KL(teacher / T || student / T) + beta L_PT
    L_PT = mean over samples, layers and hidden of (h_t / ||h_t||_2 - h_s / ||h_s||_2)^2

h is the output of a block at one state of the sequence, or at every real token. The paper has BERT's [CLS], the first
token. Where attention is causal the first token has seen no text, so the one state is that of the last real token,
which has seen all of it and which the head of causal classifiers reads; no paper says what PKD compares there. The
paper sums over layers and hidden where L_PT, like the authors' code, takes the mean: a beta for the sum is ours divided
by (layers * hidden).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .distill import Pair, check_scores, full_precision, hard_loss, masked_mean, soft_loss
from .heads import DistillError, Supervision
from .stages import Patient

_ONE_STATE = ("classification", "regression", "span")


def patient_terms(
    config: Patient, student: Tensor, teacher: Tensor, given: Supervision, pairs: Sequence[Pair] = ()
) -> dict[str, Tensor]:
    """The weighted terms ``hard``, ``soft`` and ``patience``, whose sum is the loss.

    Args:
        pairs: states of the compared blocks, one of each sequence [B, 1, D] or of all tokens [B, L, D].

    Raises:
        DistillError: scores or states of different shapes; ``token: first`` in a task of tokens.
    """
    check_scores(student, teacher)
    check_token(config, given)
    if given.kind == "regression" and config.alpha == 1 and not config.beta:
        raise DistillError("the soft loss of a regression task is 0: set alpha below 1, or beta above 0")
    terms = {}
    if config.alpha < 1:
        terms["hard"] = (1 - config.alpha) * hard_loss(student, given, teacher)
    if config.alpha:
        soft = soft_loss(student, teacher, given, config.temperature, t_squared=True)
        if config.kl_reduction == "elementwise":
            soft = soft / student.shape[-1]
        terms["soft"] = config.alpha * soft
    if config.beta and pairs:
        terms["patience"] = config.beta * patience_loss(pairs)
    return terms


def patience_loss(pairs: Sequence[Pair]) -> Tensor:
    """Mean squared distance of normalised states over real tokens, hidden units and blocks."""
    return torch.stack([_distance(pair) for pair in pairs]).mean()


def one_state(state_BLD: Tensor, mask_BL: Tensor | None, causal: bool = False) -> Tensor:
    """The state that stands for each sequence, [B, 1, D]: of its first real token, [CLS], or of the last one where
    attention is ``causal``; padding may stand on either side."""
    if mask_BL is None:
        return state_BLD[:, -1:] if causal else state_BLD[:, :1]
    order_BL = mask_BL.int() * torch.arange(1, mask_BL.shape[1] + 1, device=mask_BL.device) if causal else mask_BL.int()
    at_B = order_BL.argmax(dim=1)
    return state_BLD[torch.arange(len(at_B), device=state_BLD.device), at_B].unsqueeze(1)


def check_token(config: Patient, given: Supervision) -> None:
    """Raises:
    DistillError: one state does not stand for the tokens of this task, or the classes have no fixed number.
    """
    if config.beta and config.token == "first" and given.kind not in _ONE_STATE:
        raise DistillError(f"patient distillation of a {given.kind} task compares every token: write token: all")
    if config.kl_reduction == "elementwise" and given.kind == "span":
        raise DistillError("kl_reduction: elementwise divides by the number of classes, and spans have none: use batch")


def _distance(pair: Pair) -> Tensor:
    if pair.student.shape != pair.teacher.shape:
        raise DistillError(
            f"states differ: teacher {tuple(pair.teacher.shape)}, student {tuple(pair.student.shape)}; patient "
            "distillation needs equal widths: set beta: 0, or use method: mixed with project: true"
        )
    student, teacher = (F.normalize(full_precision(state), dim=-1) for state in (pair.student, pair.teacher))
    return masked_mean(((student - teacher) ** 2).mean(dim=-1), pair.mask)
