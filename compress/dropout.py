"""Scheduled dropout: the probability of every dropout of the backbone moves linearly with the optimizer steps.

Wang et al. 2022, Deep Compression of Pre-trained Transformer Models, NeurIPS, section 2.3.3 (ALGORITHMS E.2, J 16).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from .backbone import backbone
from .objective import TrainingError
from .stages import Dropout

# Attributes with "drop" in their name that are no probability of zeroing a single value.
_OTHER = ("layer", "path", "depth", "patch")


def dropout_at(schedule: Dropout, step: int) -> float:
    """p(t) = start + (end - start) * min(t, steps) / steps, t optimizer steps being done."""
    return schedule.start + (schedule.end - schedule.start) * min(step, schedule.steps) / schedule.steps


@dataclass(frozen=True)
class _Place:
    module: nn.Module
    attribute: str
    original: float


def _places(model: nn.Module) -> list[_Place]:
    found = []
    for module in backbone(model).modules():
        if isinstance(module, _DropoutNd) or (type(module).__name__.endswith("Dropout") and "p" in vars(module)):
            found.append(_Place(module, "p", float(vars(module)["p"])))  # fairseq has a dropout class of its own
            continue
        # transformers' attention modules hold a float and hand it to F.dropout or to the attention function.
        for name, value in vars(module).items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if "drop" in name and is_number and 0 <= value <= 1 and not any(word in name for word in _OTHER):
                found.append(_Place(module, name, value))
    return found


class ScheduledDropout:
    """All dropouts of a model's backbone: dropout modules, and probabilities that modules keep as numbers. Dropouts of
    the head keep theirs, where the library tells the backbone from the head; so do layer drop and stochastic depth.

    Raises:
        TrainingError: there is no dropout.
    """

    def __init__(self, model: nn.Module, schedule: Dropout) -> None:
        self.schedule = schedule
        self._places = _places(model)
        if not self._places:
            raise TrainingError(f"{type(model).__name__} has no dropout to schedule: leave `dropout` out of the stage")

    def set_(self, step: int) -> None:
        """To be called before each step, ``step`` optimizer steps being done."""
        p = dropout_at(self.schedule, step)
        for place in self._places:
            setattr(place.module, place.attribute, p)

    def restore_(self) -> None:
        """The probabilities from before the schedule."""
        for place in self._places:
            setattr(place.module, place.attribute, place.original)
