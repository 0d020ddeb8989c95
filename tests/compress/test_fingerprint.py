"""What a run is known by: all rows of its data, all weights of its models, and nothing else."""

import os

import pytest
import torch
from squeezoo.compress.fingerprint import run_fingerprint, weights_digest
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.train_data import TrainData
from tiny import TINY

RECIPE = Recipe.load("dense")


def known_by(features, source=None, models=()):
    return run_fingerprint(models, RECIPE, TrainData(features, lambda rows: {}, None, source))


def rows(count=40):
    return [{"input_ids": [i, i + 1, 7], "labels": i % 2, "values": torch.arange(2000.0) + i} for i in range(count)]


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r[20]["input_ids"].__setitem__(2, 8),
        lambda r: r[20].__setitem__("labels", 1 - r[20]["labels"]),
        lambda r: r[20]["values"].__setitem__(1000, -1.0),  # the middle of a tensor, which str() leaves out
        lambda r: r.__setitem__(slice(20, 22), [r[21], r[20]]),
        lambda r: r.__delitem__(20),
        lambda r: r[20].__setitem__("score", [0.5, 0.25]),
    ],
)
def test_any_change_of_any_row_changes_it(change):
    changed = rows()
    change(changed)
    assert known_by(rows()) == known_by(rows())
    assert known_by(changed) != known_by(rows())


def test_lists_are_told_apart_by_content_and_length():
    """Token ids, numbers beyond 64 bits, decimals, nested lists and lists of tensors."""
    values = ([1, 2], [1, 2, 0], [12], [1.0, 2.5], [1.0, 2.25], [[1], [2]], [[1, 2]], [2**70], [2**71],
              ["a", "b"], ["ab"], [torch.zeros(3000)], [torch.zeros(3000).index_fill(0, torch.tensor(1500), 1)],
              "1, 2", None)  # fmt: skip
    assert len({known_by([{"x": value}]) for value in values}) == len(values)


class Decoded(list):
    """Features that are made on access, and say how often."""

    made = 0

    def __getitem__(self, index):
        self.made += 1
        return {"pixel_values": torch.ones(3), "labels": 0}

    def __iter__(self):
        raise AssertionError("all samples were decoded")


def test_samples_decoded_on_access_are_known_by_their_files(tmp_path):
    """A file of another size, or of the same size changed later, is another; all but two samples stay undecoded."""
    source = []
    for i in range(10):
        path = tmp_path / f"{i}.png"
        path.write_bytes(bytes([i] * 100))
        os.utime(path, (1e9, 1e9))
        source.append({"image": path, "label": i})
    features = Decoded(source)
    first = known_by(features, source)
    assert features.made == 2
    assert known_by(Decoded(source), source) == first
    (tmp_path / "5.png").write_bytes(bytes(100))
    touched = known_by(Decoded(source), source)
    os.utime(tmp_path / "5.png", (1e9, 1e9))
    (tmp_path / "6.png").write_bytes(bytes(101))
    os.utime(tmp_path / "6.png", (1e9, 1e9))
    assert len({first, touched, known_by(Decoded(source), source)}) == 3
    stored = [{"image": bytes(100), "label": 0}, {"image": bytes(99) + b"x", "label": 0}]
    assert known_by(Decoded(stored), stored) != known_by(Decoded(stored), stored[:1] * 2)


def test_a_table_of_datasets_is_known_by_its_own_fingerprint():
    """Of a Hub data set nothing is read: `datasets` keeps a hash of its files and of all that was done to it."""
    datasets = pytest.importorskip("datasets")

    class Lazy(Decoded):
        def __init__(self, table):
            super().__init__(range(len(table)))
            self.table = table

    tables = [datasets.Dataset.from_dict({"x": [1, 2, last]}) for last in (3, 3, 4)]
    found = [known_by(Decoded(range(3)), Lazy(table)) for table in tables]
    assert found[0] == found[1] != found[2]


def test_models_are_known_by_weights_and_by_their_part_in_the_run():
    one, other = TINY["bert"](), TINY["bert"]()
    assert known_by(rows(), models=(one, one)) == known_by(rows(), models=(other, other))
    with torch.no_grad():
        other.classifier.bias[0] += 1
    found = {known_by(rows(), models=m) for m in ((one, one), (one, other), (other, one), (other, other))}
    assert len(found) == 4
    assert weights_digest(one) == weights_digest(TINY["bert"]()) != weights_digest(other)


def test_every_task_that_decodes_on_access_gives_its_source():
    """`pipeline.training_data` on the scans of digits, which are decoded on access: the source is the rows."""
    from squeezoo.pipeline import training_data

    data = training_data("digits", None, limit=20)
    assert data.source is not None
    assert len(data.source) == len(data.features) == 20
    changed = [dict(row) for row in data.source]
    changed[10]["image"] = changed[10]["image"].copy()
    changed[10]["image"][3, 3] += 1
    other = TrainData(data.features, data.collate, data.augment, changed)
    assert run_fingerprint((), RECIPE, data) != run_fingerprint((), RECIPE, other)
