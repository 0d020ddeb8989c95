"""What distillation sees of a model for one batch: its scores, and its feature maps at the points to compare."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from ..models import AdapterError, adapter_for, find_sites
from ..models.dense import logits
from .heads import DistillError, Supervision, aligned, side_masks, supervision, unwrapped
from .patient import one_state
from .stages import Distill, Patient
from .taps import FeatureTap, Point, check_widths, pair_points, points_of

SAMPLE_ID = "sample_id"  # of a batch: the place of each sample in the training data [B]


@dataclass(frozen=True)
class Observed:
    """Scores as ``models.dense.logits`` gives them, their labels and mask, a feature map [B, L, D] per point (None: the
    block was left out at this step) and its real positions [B, L] (None: all)."""

    scores: Tensor
    given: Supervision
    features: tuple[Tensor | None, ...] = ()
    masks: tuple[Tensor | None, ...] = ()


class Observer:
    """Calls one model and collects its feature maps. Inputs that the model does not take are left out of the call:
    two architectures with one vocabulary can differ in ``token_type_ids``.

    Args:
        points: of this model; with none it needs no adapter.
        only_first: keep the one state that stands for each sequence alone, see `patient.one_state`.
    """

    def __init__(self, model: nn.Module, points: Sequence[Point] = (), only_first: bool = False) -> None:
        self.model, self.points, self.only_first = model, tuple(points), only_first
        self._tap, self._causal = None, set[int]()  # 1-based blocks whose tokens see only those before them
        if points:
            sites = find_sites(unwrapped(model), adapter_for(unwrapped(model)))
            self._tap = FeatureTap(sites, points)
            own = (found for found in sites.attention if found.kind == "self")
            self._causal = {found.block + 1 for found in own if getattr(found.module, "is_causal", False)}
        known = inspect.signature(unwrapped(model).forward).parameters
        self._not_taken = {SAMPLE_ID} | ({"token_type_ids"} - set(known))

    def __call__(self, batch: Mapping[str, Tensor]) -> Observed:
        inputs = {name: tensor for name, tensor in batch.items() if name not in self._not_taken}
        with self._tap or nullcontext():
            scores = logits(self.model, inputs)
        given = supervision(self.model, batch, scores)
        if self._tap is None:
            return Observed(scores, given)
        sides = side_masks(self.model, batch)
        features, masks = [], []
        for point, feature in zip(self.points, self._tap.features, strict=True):
            mask = None
            if feature is not None:
                if feature.dim() == 2:  # some blocks flatten batch and tokens
                    feature = feature.view(scores.shape[0], -1, feature.shape[-1])
                mask = aligned(self.model, sides[point.side], feature.shape[1])
                if self.only_first:
                    feature, mask = one_state(feature, mask, point.block in self._causal), None
            features.append(feature)
            masks.append(mask)
        return Observed(scores, given, tuple(features), tuple(masks))


def available_points(model: nn.Module, config: Distill | Patient) -> tuple[Point, ...]:
    """Every point of a model that this distillation could compare; none where it compares scores alone.

    Raises:
        DistillError: no adapter serves the model.
    """
    weight = config.beta if isinstance(config, Patient) else config.feature
    features = ("block_out",) if isinstance(config, Patient) else config.features
    if not weight or not features:
        return ()
    model = unwrapped(model)
    try:
        return points_of(find_sites(model, adapter_for(model)), features)
    except AdapterError as error:
        instead = "beta: 0" if isinstance(config, Patient) else "feature: 0"
        raise DistillError(f"feature maps are found by an adapter; without one set {instead}. {error}") from error


def compared_points(
    student: Sequence[Point], teacher: Sequence[Point], config: Distill | Patient
) -> list[tuple[Point, Point]]:
    """Pairs of points (student, teacher) of one distillation.

    Raises:
        DistillError: depths or widths that differ and are not allowed to, or nothing to compare.
    """
    if not student:
        return []
    pairs = pair_points(student, teacher, config.blocks)
    if isinstance(config, Patient):
        check_widths(pairs, "set beta: 0, or use method: mixed with project: true, a learned projection")
        if not pairs:
            raise DistillError("patient distillation compares no block of this student: set beta: 0 or list blocks")
    elif not config.project:
        check_widths(pairs, "choose other blocks, a learned projection (project: true), or feature: 0")
    return pairs
