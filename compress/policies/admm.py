"""ADMM: dense training that is pulled towards the nearest sparse weights, and pruned at its end.

Holmes et al. 2021, NxMTransformer, NeurIPS, arXiv:2110.15766, section 3 (ALGORITHMS B.3, B.4). For each matrix

    (1) some optimizer steps on  f(W) + rho / 2 * ||W - Z + U||^2
    (2) Z <- P(W + U)            P: keep the sparsity's share of the largest |x|, zero the rest
    (3) U <- U + W - Z

Z is zero off its support m and U is zero on it: with V = W + U, step (2) gives Z = V * m and step (3) U = V * (1 - m).
So one tensor, the target T = Z - U, and m hold both: Z = T * m, U = -T * (1 - m), and the penalty is rho/2 ||W - T||^2.
That is one copy of the weights instead of two, and one subtraction in each step.

Legend: O out_features, I in_features; m mask, True = kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..objective import TrainingError
from ..stages import Admm
from .base import Policy, Record, gradients_, mask_similarity, rates

SMALL_DATA = 20_000  # samples: below, one iteration is one epoch (section 4.3 of the paper, by ALGORITHMS B.3)
FEWEST_ITERATIONS, FEWEST_STEPS = 10, 80  # that ADMM needs to converge (there too): iterations, and steps of each


def dense(q_OI: Tensor, w_OI: Tensor, mask_OI: Tensor) -> Tensor:
    """The mask is not applied: until its end ADMM trains the dense (quantized) weight."""
    return q_OI


def split_target(target_OI: Tensor, mask_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Z and U of a target T = Z - U with support ``mask_OI``."""
    return target_OI.masked_fill(~mask_OI, 0), -target_OI.masked_fill(mask_OI, 0)


def shifted(w_OI: Tensor, target_OI: Tensor, mask_OI: Tensor) -> Tensor:
    """V = W + U, what steps (2) and (3) look at."""
    return w_OI - target_OI.masked_fill(mask_OI, 0)


def next_target(v_OI: Tensor, mask_OI: Tensor) -> Tensor:
    """The target after steps (2) and (3): V on the new support ``mask_OI`` of |V| (this is Z), -V off it (-U)."""
    return torch.where(mask_OI, v_OI, -v_OI)


def iteration_steps(settings: Admm, total: int, steps_per_epoch: int, samples: int) -> int:
    """Optimizer steps of one iteration."""
    if settings.steps is not None:
        return settings.steps
    return steps_per_epoch if samples < SMALL_DATA else max(FEWEST_STEPS, total // 50)


def iteration_ends(settings: Admm, total: int, steps_per_epoch: int, samples: int) -> list[int]:
    """The steps after which Z and U are updated; the last is ``total``, its iteration takes what is left over."""
    steps = iteration_steps(settings, total, steps_per_epoch, samples)
    count = max(1, total // steps)
    return [steps * k for k in range(1, count)] + [total]


def masked_steps(settings: Admm, steps_per_epoch: int) -> int:
    """Steps at the end of the stage that are trained under the final mask."""
    return round(settings.masked_epochs * steps_per_epoch)


def schedule_note(settings: Admm, total: int, steps_per_epoch: int, samples: int) -> str:
    """What is too short about a schedule of ``total`` steps, and what to write instead; "" where it is long enough."""
    masked = masked_steps(settings, steps_per_epoch)
    if masked >= total:
        return ""  # an error of its own
    steps = iteration_steps(settings, total - masked, steps_per_epoch, samples)
    count = max(1, (total - masked) // steps)
    if count >= FEWEST_ITERATIONS and steps >= FEWEST_STEPS:
        return ""
    enough = max(FEWEST_STEPS, steps)
    needed = masked + enough * FEWEST_ITERATIONS
    set_steps = f"`steps: {enough}` in the policy and " if steps < FEWEST_STEPS else ""
    return (
        f"ADMM will have {count} iteration{'s' if count > 1 else ''} of {min(steps, total - masked)} steps, and needs "
        f"at least {FEWEST_ITERATIONS} of at least {FEWEST_STEPS} (NxMTransformer, section 4.3): write {set_steps}"
        f"`epochs: {math.ceil(needed / steps_per_epoch)}` or more (or `steps: {needed}` instead of epochs)"
    )


class AdmmPolicy(Policy):
    """The ``admm`` policy, N:M or without structure.

    While it trains, the masks of the student are the supports of Z and are not applied. After the last iteration they
    become those of |W| (not |W + U|) and stay; ``masked_epochs`` at the end of the stage are trained under them.

    The log has one record per iteration, 0 being the state before training: ``primal`` ||W - Z||, ``dual``
    rho * ||Z - Z_before||, ``penalty`` rho / 2 * ||W - Z + U||^2 with the new Z and U, ``similarity`` of the supports;
    over all matrices, and for each.
    """

    method = "admm"

    def __init__(self, student: nn.Module, settings: Admm, total: int, steps_per_epoch: int, samples: int) -> None:
        super().__init__(student, total)
        self._need_weights()
        self.settings = settings
        masked = masked_steps(settings, steps_per_epoch)
        if masked >= total:
            raise TrainingError(
                f"policy admm: masked_epochs {settings.masked_epochs:g} are {masked} steps, which leaves none of the "
                f"stage's {total} for ADMM: lower masked_epochs, or train longer"
            )
        self.end = total - masked
        self.ends = iteration_ends(settings, self.end, steps_per_epoch, samples)
        self.steps_done = 0
        for i, entry in enumerate(self.weights):
            self.register_buffer(f"target_{i}", torch.zeros_like(entry.weight))

    @property
    def targets(self) -> list[Tensor]:
        """T = Z - U of each weight, in the layout of the stored weight."""
        return [self.get_buffer(f"target_{i}") for i in range(len(self.weights))]

    @torch.no_grad()
    def start_(self, step: int) -> list[Record]:
        self.steps_done = step
        if step >= self.end:
            return []
        for entry in self.weights:
            entry.parametrization.apply_mask = dense
        if step:
            return []
        for entry, target in zip(self.weights, self.targets, strict=True):
            entry.mask_OI.copy_(entry.support(entry.w_OI))
            entry.oriented(target).copy_(entry.w_OI).masked_fill_(~entry.mask_OI, 0)  # Z = P(W), U = 0
        return [self._record(0, [entry.mask_OI for entry in self.weights], self._zs())]

    @torch.no_grad()
    def after_backward_(self) -> None:
        if self.settings.decoupled or self.steps_done >= self.end:
            return
        grads = gradients_(self.weights)
        torch._foreach_add_(grads, [entry.weight for entry in self.weights], alpha=self.settings.rho)
        torch._foreach_add_(grads, self.targets, alpha=-self.settings.rho)

    @torch.no_grad()
    def after_step_(self, step: int, optimizer: torch.optim.Optimizer, epoch_ends: bool) -> list[Record]:
        active = self.steps_done < self.end
        self.steps_done = step
        if not active:
            return []
        if self.settings.decoupled:
            for entry, target, rate in zip(self.weights, self.targets, rates(optimizer, self.weights), strict=True):
                entry.weight.lerp_(target, rate * self.settings.rho)  # W -= lr * rho * (W - T)
        if step not in self.ends:
            return []
        record = self._update_(self.ends.index(step) + 1)
        if step == self.end:
            self._prune_()
        return [record]

    def _update_(self, iteration: int) -> Record:
        before, zs_before = [entry.mask_OI.clone() for entry in self.weights], self._zs()
        for entry, target in zip(self.weights, self.targets, strict=True):
            target_OI = entry.oriented(target)
            v_OI = shifted(entry.w_OI, target_OI, entry.mask_OI)
            entry.mask_OI.copy_(entry.support(v_OI))
            target_OI.copy_(next_target(v_OI, entry.mask_OI))
        return self._record(iteration, before, zs_before)

    def _zs(self) -> list[Tensor]:
        """Z of each weight, [O, I]."""
        pairs = zip(self.weights, self.targets, strict=True)
        return [split_target(entry.oriented(target), entry.mask_OI)[0] for entry, target in pairs]

    def _record(self, iteration: int, masks_before: list[Tensor], zs_before: list[Tensor]) -> Record:
        similarity, similarities = mask_similarity(masks_before, [entry.mask_OI for entry in self.weights])
        sums = {"primal": 0.0, "dual": 0.0, "penalty": 0.0}
        layers: dict[str, dict[str, float]] = {}
        rows = zip(self.weights, self.targets, self._zs(), zs_before, similarities, strict=True)
        for entry, target, z_OI, z_before_OI, share in rows:
            squares = {
                "primal": _square(entry.w_OI - z_OI),
                "dual": _square(z_OI - z_before_OI),
                "penalty": _square(entry.weight - target),
            }
            sums = {key: sums[key] + squares[key] for key in sums}
            layers[entry.name] = self._residuals(squares) | {"similarity": share}
        totals = self._residuals(sums) | {"similarity": similarity}
        return {"kind": "admm", "iteration": iteration, **totals, "layers": layers}

    def _residuals(self, squares: dict[str, float]) -> dict[str, float]:
        rho = self.settings.rho
        return {
            "primal": squares["primal"] ** 0.5,
            "dual": rho * squares["dual"] ** 0.5,
            "penalty": rho / 2 * squares["penalty"],
        }

    def _prune_(self) -> None:
        """The end of ADMM: W <- P(W), by the mask alone. The entries below it stay as they are, since a quantizer's
        statistics are those of the dense weight (ALGORITHMS D.5)."""
        for entry in self.weights:
            entry.mask_OI.copy_(entry.support(entry.w_OI))
        self.release_()

    @contextmanager
    def pruned(self) -> Iterator[None]:
        if self.steps_done >= self.end:
            yield
            return
        supports = [entry.mask_OI.clone() for entry in self.weights]
        self._prune_()
        try:
            yield
        finally:
            for entry, support in zip(self.weights, supports, strict=True):
                entry.mask_OI.copy_(support)
                entry.parametrization.apply_mask = dense


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
