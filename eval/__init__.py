"""What a model is worth: tasks and scores, speed. Importing this costs no torch, transformers or scikit-learn."""

from __future__ import annotations

from .dialogue import DIALOGUES
from .glue import GLUE
from .image import CIFAR10, DIGITS
from .imagenet import IMAGENET
from .language import LANGUAGE
from .ner import NER
from .sentiment import SENTIMENT
from .speech import SPEECH
from .squad import SQUAD
from .summarize import SUMMARIES
from .task import Score, Task, nearest

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *GLUE, DIGITS, CIFAR10, IMAGENET, *LANGUAGE, *NER, *SENTIMENT, *SQUAD, *SUMMARIES, *DIALOGUES, *SPEECH
    )
}  # fmt: skip


def get_task(name: str) -> Task:
    """The task of this name. Raises ValueError with the known names and the nearest one."""
    if name not in TASKS:
        raise ValueError(nearest("task", name, TASKS))
    return TASKS[name]


__all__ = ["TASKS", "Score", "Task", "get_task"]
