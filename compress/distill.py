"""Mixed distillation: hard labels, soft logits and feature maps (GPUSQ-TLM, section 3, equations 4-8; Algorithm 1).

    L = hard * L_hard + soft * L_soft + feature * L_feat
    L_hard = CE(labels, z_s), or CE(argmax z_t, z_s) without labels
    L_soft = KL(softmax(z_t / T) || softmax(z_s / T)), summed over classes, mean over samples
    L_feat = sum over taps of MSE(F_t, F_s) + MSE(z_t, z_s), means over elements

Shapes: z [B, C] or [B, C] with C = 1 for regression; F [B, L, D]; padding_mask [B, L], 1 = a real token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.adapter import Sites
from .stages import Distill


class DistillError(ValueError):
    """Teacher and student that cannot be compared."""


def hard_loss(student_BC: Tensor, labels_B: Tensor | None, teacher_BC: Tensor | None = None) -> Tensor:
    """Cross-entropy against the labels, or against the teacher's argmax without labels; MSE for regression (C = 1)."""
    if labels_B is None:
        if teacher_BC is None:
            raise DistillError("without labels the hard loss needs the teacher's logits")
        labels_B = teacher_BC.argmax(dim=-1)
    if student_BC.shape[-1] == 1:
        return F.mse_loss(student_BC.squeeze(-1), labels_B.to(student_BC.dtype))
    return F.cross_entropy(student_BC, labels_B)


def soft_loss(student_BC: Tensor, teacher_BC: Tensor, temperature: float, t_squared: bool = False) -> Tensor:
    """KL(teacher || student) at a temperature, summed over classes, mean over samples; 0 for regression (C = 1)."""
    if student_BC.shape[-1] == 1:
        return student_BC.new_zeros(())
    loss = F.kl_div(
        F.log_softmax(student_BC / temperature, dim=-1),
        F.log_softmax(teacher_BC / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return loss * temperature**2 if t_squared else loss


def feature_loss(student_BLD: Tensor, teacher_BLD: Tensor, padding_mask_BL: Tensor | None = None) -> Tensor:
    """Mean squared error over all elements of real tokens."""
    if student_BLD.shape != teacher_BLD.shape:
        raise DistillError(
            f"feature maps differ: teacher {tuple(teacher_BLD.shape)}, student {tuple(student_BLD.shape)}; "
            "choose blocks of equal width, or set feature: 0"
        )
    if student_BLD.dtype == torch.bfloat16:  # under autocast
        student_BLD, teacher_BLD = student_BLD.float(), teacher_BLD.float()
    if padding_mask_BL is None or padding_mask_BL.shape != student_BLD.shape[:2]:
        return F.mse_loss(student_BLD, teacher_BLD)
    weight_BL1 = padding_mask_BL.unsqueeze(-1).to(student_BLD.dtype)
    squared = ((student_BLD - teacher_BLD) ** 2 * weight_BL1).sum()
    return squared / (weight_BL1.sum() * student_BLD.shape[-1])


def mixed_loss(
    config: Distill,
    student_BC: Tensor,
    teacher_BC: Tensor,
    labels_B: Tensor | None,
    student_features: Sequence[Tensor] = (),
    teacher_features: Sequence[Tensor] = (),
    padding_mask_BL: Tensor | None = None,
) -> Tensor:
    """The total loss of one stage; the teacher's tensors must not require gradients."""
    loss = config.hard * hard_loss(student_BC, labels_B if config.labels else None, teacher_BC)
    if config.soft:
        loss = loss + config.soft * soft_loss(student_BC, teacher_BC, config.temperature, config.kl_t_squared)
    if config.feature:
        features = F.mse_loss(student_BC, teacher_BC)
        for student, teacher in zip(student_features, teacher_features, strict=True):
            features = features + feature_loss(student, teacher, padding_mask_BL)
        loss = loss + config.feature * features
    return loss


class FeatureTap:
    """Collects the feature maps of one model during a forward pass.

    ``attn_out``: output of the attention's last projection, before the residual. ``block_out``: output of the block.
    Use as a context manager around the forward pass; ``features`` then holds the maps in execution order.
    """

    def __init__(self, sites: Sites, kinds: Sequence[str]) -> None:
        self.modules: list[nn.Module] = []
        if "attn_out" in kinds:
            self.modules += [gemm.module for gemm in sites.gemms if gemm.role in ("attn_out", "cross_out")]
        if "block_out" in kinds:
            self.modules += [block.module for block in sites.blocks]
        self.features: list[Tensor] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def _record(self, module: nn.Module, args: object, output: object) -> None:
        feature = output[0] if isinstance(output, tuple) else output
        assert isinstance(feature, Tensor)
        self.features.append(feature)

    def __enter__(self) -> FeatureTap:
        self.features = []
        self._hooks = [module.register_forward_hook(self._record) for module in self.modules]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
