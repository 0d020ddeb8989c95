"""The progress bar of evaluation and of timing."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(show: bool, *, auto_refresh: bool = True) -> Progress:
    """A bar with the time left on the error stream; silent when that is no terminal or ``show`` is False.

    Args:
        auto_refresh: False draws only when ``refresh()`` is called: no thread that would disturb a measurement.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    return Progress(*columns, console=console, disable=not (show and console.is_terminal), auto_refresh=auto_refresh)
