"""What a card says about the data behind each task: Hub id, licence, citation, and an input to try the model with."""

from __future__ import annotations

from ..eval import get_task
from .parts import Data

# task: name for people, Hub data set, its configuration, (channels, height, width), licence, example texts
_ABOUT: dict[str, tuple[str, str | None, str | None, tuple[int, int, int] | None, str, tuple[str, ...]]] = {
    "glue/sst2": (
        "SST-2", "nyu-mll/glue", "sst2", None, "no licence stated by its authors, research use",
        ("A quiet, gripping film.",),
    ),
    "glue/mrpc": (
        "MRPC", "nyu-mll/glue", "mrpc", None, "Microsoft Research licence, research use",
        ("The firm sold its London office.", "Its office in London was sold by the firm."),
    ),
    "digits": ("scikit-learn digits", None, None, (1, 8, 8), "CC BY 4.0 (UCI Machine Learning Repository)", ()),
    "cifar10": (
        "CIFAR-10", "uoft-cs/cifar10", None, (3, 32, 32), "no licence stated by its authors, research use", (),
    ),
}  # fmt: skip


def describe_task(task_name: str) -> Data:
    """The data behind a task, for `Card.data`.

    Raises:
        ValueError: unknown task.
    """
    task = get_task(task_name)
    name, hub_id, config, image, licence, example = _ABOUT[task.name]
    return Data(
        task=task.name,
        name=name,
        pipeline=task.kind,
        hub_id=hub_id,
        config=config,
        image=image,
        example=example,
        licence=licence,
        note=task.source,
    )
