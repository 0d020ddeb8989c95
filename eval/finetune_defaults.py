"""How the papers fine-tuned the dense baselines, as each task's record holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .fields import require_count, require_text


@dataclass(frozen=True)
class FinetuneDefaults:
    """How a paper fine-tuned the dense baseline on a task; used where the user says nothing else.

    Args:
        epochs, learning_rate: of the source.
        batch_size: of one device, as the engine takes it; ``devices`` is how many the source had. So as many devices
            here take the source's step, and fewer take smaller steps. 1 device where the source names none.
        max_length: tokens of a training sequence; 0 where nothing is cut.
        source: paper, table or section; what it does not say and was chosen stands here too.
        warmup_steps, optimizer, schedule, max_grad_norm: where the source says them; None: as the recipe has them.
    """

    epochs: float
    learning_rate: float
    batch_size: int
    max_length: int
    source: str
    devices: int = 1
    warmup_steps: int | None = None
    optimizer: Literal["adamw", "sgd"] | None = None
    schedule: Literal["linear", "cosine", "constant"] | None = None
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        require_text(self, "source")
        require_count(self, "batch_size", "devices")

    @property
    def step(self) -> int:
        """Rows of one step of the source, over all its devices."""
        return self.batch_size * self.devices

    def settings(self) -> dict[str, Any]:
        """What a recipe's fine-tuning takes from here (``Recipe.override``): all but the length, where it is said."""
        names = ("epochs", "learning_rate", "batch_size", "warmup_steps", "optimizer", "schedule", "max_grad_norm")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def __str__(self) -> str:
        words = ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                          for name, value in self.settings().items())  # fmt: skip
        shared = f" on each of {self.devices} devices, --batch-size {self.step} on one" if self.devices > 1 else ""
        return f"{words}{shared} ({self.source})"
