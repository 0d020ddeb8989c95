"""Every task has its row of facts for cards, and the same Hub data set as its reader."""

from __future__ import annotations

from pathlib import Path

import pytest
import squeezoo.eval
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from squeezoo.eval import TASKS, get_task
from squeezoo.zoo_cards import datasets
from squeezoo.zoo_cards.datasets import describe_task, hub_split

READERS = "\n".join(path.read_text(encoding="utf-8") for path in Path(squeezoo.eval.__file__).parent.glob("*.py"))
# huggingface_hub's own list of what a model does (huggingface.js, tasks)
PIPELINES = {
    "text-classification", "token-classification", "question-answering", "text-generation", "fill-mask",
    "summarization", "image-classification", "automatic-speech-recognition",
}  # fmt: skip


def test_every_task_has_a_row_and_every_row_a_task() -> None:
    assert set(datasets._ABOUT) == set(TASKS)


@pytest.mark.parametrize("name", list(TASKS))
def test_rows_are_complete(name: str) -> None:
    """A name and a licence for people, the Hub's name for the kind, the Hub data set that the task's reader reads."""
    data, task = describe_task(name), get_task(name)
    assert (data.task, data.note) == (task.name, task.source)
    assert data.name.strip()
    assert data.licence.strip()
    assert data.pipeline in PIPELINES
    assert (data.image is not None) == (task.reads == "images")
    assert bool(data.example) == (task.reads == "text")
    if data.hub_id is not None:
        validate_repo_id(data.hub_id)
        assert f'"{data.hub_id}"' in READERS
    else:
        assert name in ("digits", "speech-folder")


def test_a_name_that_is_no_repository_is_refused() -> None:
    """The check above can fail."""
    with pytest.raises(HFValidationError):
        validate_repo_id("a/b/c")


class AskedError(Exception):
    """What a reader wants of the Hub: configuration and split."""


@pytest.mark.parametrize("name", [name for name in TASKS if describe_task(name).hub_id])
def test_splits_are_called_what_the_readers_ask_the_hub_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Source: each task's own reader, stopped where it would ask the Hub. Splits that are a part of a Hub split have no
    name there; they would be ranked beside whole ones."""

    def ask(what: str, repository: str, config: str | None, split: str, revision: str | None = None) -> None:
        assert repository == describe_task(name).hub_id
        raise AskedError(config, split)

    monkeypatch.setattr("squeezoo.eval.files.load_from_hub", ask)
    monkeypatch.delenv("SQUEEZOO_DATA", raising=False)
    parts = {"squad1-articles": {"train", "dev"}, "imdb/halves": {"validation", "test"}}.get(name, set())
    for split in get_task(name).splits:
        with pytest.raises(AskedError) as asked:
            get_task(name).rows(split, None)
        config, there = asked.value.args
        foreign = config != describe_task(name).config
        assert hub_split(name, split) == (None if split in parts or foreign else there), split
        assert not (foreign and split == get_task(name).report_split)


def test_names_are_different() -> None:
    """A card with several tasks tells them apart by these names."""
    names = [about.name for about in datasets._ABOUT.values()]
    assert len(set(names)) == len(names)
