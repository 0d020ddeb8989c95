"""The index and the way from a name to verified files; and that the committed zoo is what its results.json say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import squeezoo
from squeezoo.zoo_cards.card import Card
from squeezoo.zoo_cards.hub import ZOO, ZooError, build_index, info, list_models, resolve, write_index
from squeezoo.zoo_cards.plots import plot_names
from squeezoo.zoo_cards.render import render_card, write_card

WEIGHTS = b"not really weights"
WEIGHTS_SHA256 = "6bc9509551b471fd7d25a12b99a9d825e866b1ad02f9f9b5071757ab66d30e68"  # by coreutils' sha256sum
NAMES = ["minilm-l6.mrpc.gpusq-gemm-int8", "minilm-l6.sst2.gpusq-gemm-int8", "vit.digits.gpusq-gemm-int8"]


@pytest.fixture
def zoo(tmp_path: Path, new_card: Callable[..., Card]) -> Path:
    """A zoo of three cards, the last one with weights."""
    for name in reversed(NAMES):  # not in the order that the index must have
        folder = tmp_path / "cards" / name
        included = name == NAMES[2]
        write_card(new_card(name=name, weights="included" if included else "reproducible"), folder)
        if included:
            (folder / "squeezoo.json").write_text("{}")
            (folder / "weights.safetensors").write_bytes(WEIGHTS)
            (folder / ".DS_Store").write_text("of the file manager, not ours")
    write_index(tmp_path)
    return tmp_path


def test_index_is_sorted_flat_and_repeatable(zoo: Path) -> None:
    """Source: the fixture's values: 6,635,520 / 21,233,664 = 0.3125; best of 120 / 52 and 14 / 7."""
    index = build_index(zoo / "cards")
    assert [entry["name"] for entry in index] == NAMES
    assert (zoo / "index.json").read_text() == json.dumps(index, indent=2) + "\n"
    assert build_index(zoo / "cards") == index
    first, last = index[0], index[2]
    assert (first["task"], first["metric"], first["split"], first["samples"]) == ("glue/sst2", "accuracy", "dev", 872)
    assert (first["dense"], first["compressed"], first["paper_ratio"]) == (0.9174, 0.914, 0.3125)
    assert (first["speed_up"], first["never_slower"]) == (round(120 / 52, 4), True)
    assert first["speed_up_condition"] == "batch 8, sequence 128, against float32, Test CPU (2 threads)"
    assert first["reproduce"].startswith("squeezoo compress ")
    assert (first["location"], last["location"]) == (None, f"cards/{NAMES[2]}")
    assert sorted(last["files"]) == ["README.md", "results.json", "squeezoo.json", "weights.safetensors"]
    assert last["files"]["weights.safetensors"] == {"sha256": WEIGHTS_SHA256, "bytes": 18}


def test_wildcards(zoo: Path) -> None:
    """Source: shell rules, as `ls` would answer."""
    assert list_models(zoo=zoo) == NAMES
    assert list_models("minilm-l6.*", zoo=zoo) == NAMES[:2]
    assert list_models("*.digits.*", zoo=zoo) == NAMES[2:]
    assert list_models("minilm", zoo=zoo) == []


def test_unknown_names_get_the_nearest(zoo: Path) -> None:
    """Source: one letter changed in a known name."""
    assert info(NAMES[2], zoo=zoo)["recipe"] == "gpusq-gemm-int8"
    with pytest.raises(ZooError, match=rf"did you mean .*{NAMES[2]}"):
        info("vit.digit.gpusq-gemm-int8", zoo=zoo)
    with pytest.raises(ZooError, match=r"it has minilm-l6\.mrpc"):
        resolve("zzz", zoo=zoo)


def test_resolve_gives_verified_folders(zoo: Path, tmp_path: Path) -> None:
    """Source: the index entry of the one card with weights; a local folder is taken as it is."""
    assert resolve(NAMES[2], zoo=zoo) == zoo / "cards" / NAMES[2]
    local = tmp_path / "mine"
    local.mkdir()
    assert resolve(local, zoo=zoo) == local
    with pytest.raises(ZooError, match=r"weights .* are not distributed(.|\n)*squeezoo compress runs/dense"):
        resolve(NAMES[0], zoo=zoo)


@pytest.mark.parametrize("damage", [b"not really weight!", b"short", None])
def test_altered_files_are_refused(zoo: Path, damage: bytes | None) -> None:
    """Source: SHA-256 of the files as they were when the index was written; same length, truncated, and missing."""
    file = zoo / "cards" / NAMES[2] / "weights.safetensors"
    if damage is None:
        file.unlink()
        message = "weights.safetensors is missing"
    else:
        file.write_bytes(damage)
        message = (
            f"weights.safetensors is not the published file: expected 18 bytes with sha256 {WEIGHTS_SHA256}, found"
        )
    with pytest.raises(ZooError, match=message):
        resolve(NAMES[2], zoo=zoo)


def test_cards_and_folders_must_agree(zoo: Path, new_card: Callable[..., Card]) -> None:
    """Source: the index's rules: a folder bears its card's name, and `weights` says what lies in it."""
    moved = zoo / "cards" / "other"
    (zoo / "cards" / NAMES[0]).rename(moved)
    with pytest.raises(ValueError, match=f"holds the card of {NAMES[0]}; rename the folder"):
        write_index(zoo)
    moved.rename(zoo / "cards" / NAMES[0])
    (zoo / "cards" / NAMES[2] / "squeezoo.json").unlink()
    with pytest.raises(ValueError, match=r"weights are included, but squeezoo.json does not lie there"):
        write_index(zoo)
    assert list_models(zoo=zoo) == NAMES  # the old index is untouched


def test_a_missing_or_broken_index_is_named(tmp_path: Path) -> None:
    """Source: the house's rule for errors."""
    with pytest.raises(ZooError, match=r"index.json is missing"):
        list_models(zoo=tmp_path)
    (tmp_path / "index.json").write_text("[")
    with pytest.raises(ZooError, match=r"index.json is damaged"):
        list_models(zoo=tmp_path)


def test_the_committed_zoo_is_up_to_date() -> None:
    """Source: results.json of each committed card. On failure: `squeezoo card` on each folder, then `write_index()`."""
    index = build_index()
    assert json.loads((ZOO / "index.json").read_text(encoding="utf-8")) == index
    for entry in index:
        folder = ZOO / "cards" / entry["name"]
        shown = render_card(Card.load(folder), plot_names(folder))
        assert (folder / "README.md").read_text(encoding="utf-8") == shown, entry["name"]
    stray = {path.name for path in (ZOO / "cards").glob("*") if path.is_dir()} - {entry["name"] for entry in index}
    assert not stray, f"folders without results.json: {stray}"


def test_every_committed_model_with_weights_proves_itself() -> None:
    """Source: the golden output inside each published checkpoint; a name without weights says how to make them."""
    for name in list_models():
        if info(name)["location"] is None:
            with pytest.raises(ZooError, match="not distributed"):
                squeezoo.load(name)
        else:
            assert squeezoo.verify(resolve(name)).name == name
