"""digits and CIFAR-10: splits, pixel values, sizes, augmentation, broken files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from squeezoo.eval import cifar10_files, files, get_task, image
from squeezoo.models.dense import load_dense
from tiny import TIMM_ARGS, make

DIGITS, CIFAR10 = get_task("digits"), get_task("cifar10")


def _png(colour: tuple[int, int, int], size: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def _parquet(folder: Path, columns: dict[str, Any]) -> Path:
    (folder / "cifar10").mkdir(exist_ok=True)
    path = folder / "cifar10" / "test.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_digits_split() -> None:
    """scikit-learn documents 1,797 images, 178 182 177 183 181 182 181 179 174 180 per class; the 5th, 10th, ... of
    each are validation, the 2nd, 7th, ... test. Together the parts are the whole set, no image is in two."""
    whole = np.array([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    parts = {split: DIGITS.rows(split, None) for split in DIGITS.splits}
    counts = {split: np.bincount([row["label"] for row in rows]) for split, rows in parts.items()}
    assert counts["validation"].tolist() == (whole // 5).tolist()
    assert counts["test"].tolist() == ((whole + 3) // 5).tolist()
    assert sum(counts.values()).tolist() == whole.tolist()
    assert {split: len(rows) for split, rows in parts.items()} == dict(zip(DIGITS.splits, DIGITS.sizes))
    places = [row["where"] for rows in parts.values() for row in rows]
    assert len(set(places)) == 1797
    bundled = load_digits()
    for row in parts["test"]:
        index = int(row["where"].rpartition(" ")[2])
        assert row["label"] == bundled.target[index]
        assert (row["image"] == bundled.images[index]).all()


def test_digits_pixels() -> None:
    """0..16 become -1..1: p / 8 - 1, by hand."""
    rows = DIGITS.rows("test", None)
    features = DIGITS.encode(rows, None, 0)
    first = features[0]["pixel_values"]
    assert first.shape == (1, 8, 8)
    torch.testing.assert_close(first[0], torch.from_numpy(rows[0]["image"]).float() / 8 - 1)
    assert features[0]["labels"] == rows[0]["label"]
    assert len(features) == 362
    assert [f["labels"] for f in features[350:]] == [row["label"] for row in rows[350:]]


def test_digits_can_be_enlarged() -> None:
    """A constant image stays constant under interpolation, also for values that no grey level of 8 bits would hit."""
    rows = [{"image": np.full((8, 8), 5, np.uint8), "label": 0, "where": "here"}]
    (feature,) = DIGITS.encode(rows, 12, 0)
    torch.testing.assert_close(feature["pixel_values"], torch.full((1, 12, 12), 5 / 8 - 1))


def test_cifar10_is_decoded_resized_and_normalised(tmp_path: Path) -> None:
    """A one-colour image by hand: (value / 255 - mean) / std per channel, whatever the size."""
    _parquet(tmp_path, {"image": [_png((255, 0, 51)), _png((0, 0, 0))], "label": [3, 9]})
    rows = CIFAR10.rows("test", tmp_path)
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor([0.4914, 0.4822, 0.4465])) / torch.tensor(
        [0.2470, 0.2435, 0.2616]
    )
    for processor, size in ((None, 32), (48, 48), ({"input_size": (3, 40, 40)}, 40)):
        feature = CIFAR10.encode(rows, processor, 0)[0]
        assert feature["pixel_values"].shape == (3, size, size)
        torch.testing.assert_close(feature["pixel_values"].mean((1, 2)), expected)
        assert feature["labels"] == 3


def test_cifar10_hub_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in the Hub repository's own form, read by the real ``datasets``: column img with bytes and path."""
    import datasets

    hub = tmp_path / "hub"
    (hub / "plain_text").mkdir(parents=True)
    pyarrow.parquet.write_table(
        pyarrow.table({"img": [{"bytes": _png((255, 0, 0)), "path": "a.png"}], "label": [7]}),
        hub / "plain_text" / "test-00000-of-00001.parquet",
    )
    (hub / "README.md").write_text(
        "---\ndataset_info:\n  config_name: plain_text\n  features:\n  - name: img\n    dtype: image\n"
        "  - name: label\n    dtype: int64\nconfigs:\n- config_name: plain_text\n  default: true\n"
        "  data_files:\n  - split: test\n    path: plain_text/test-*\n---\n",
        encoding="utf-8",
    )
    monkeypatch.delenv("SQUEEZOO_DATA", raising=False)
    monkeypatch.setattr(cifar10_files, "HUB", str(hub))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (row,) = CIFAR10.rows("test", None)
    assert row["label"] == 7
    assert row["image"] == _png((255, 0, 0))
    assert row["settings"] == {"images": "original pixels"}


def _batch(labels: list[int], pixels_NHWC: np.ndarray) -> bytes:
    """As https://www.cs.toronto.edu/~kriz/cifar.html describes the binary version: a label, then red, green, blue."""
    return b"".join(
        bytes([label]) + image_HWC.transpose(2, 0, 1).tobytes() for label, image_HWC in zip(labels, pixels_NHWC)
    )


def _binary(folder: Path) -> np.ndarray:
    """Twelve random images: two in each of the five training batches, two to test on."""
    (folder / "cifar-10-batches-bin").mkdir(parents=True)
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for i, name in enumerate(names):
        part = slice(2 * i, 2 * i + 2)
        (folder / "cifar-10-batches-bin" / name).write_bytes(_batch([i, 9], pixels_NHWC[part]))
    return pixels_NHWC


@pytest.mark.parametrize("below", [".", "cifar10"])
def test_cifar10_official_binaries(tmp_path: Path, below: str) -> None:
    """The same pixels as PNG give the same features, to the bit, resized or not."""
    pixels_NHWC = _binary(tmp_path / below)
    train, test = CIFAR10.rows("train", tmp_path), CIFAR10.rows("test", tmp_path)
    assert [row["label"] for row in train] == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert all((row["image"] == image).all() for row, image in zip([*train, *test], pixels_NHWC, strict=True))
    assert {row["settings"]["images"] for row in (*train, *test)} == {"original pixels"}
    buffer = io.BytesIO()
    Image.fromarray(pixels_NHWC[10]).save(buffer, "PNG")
    png = {"image": buffer.getvalue(), "label": 5, "where": "here"}
    for size in (None, 48):
        found, expected = (CIFAR10.encode([row], size, 0)[0]["pixel_values"] for row in (test[0], png))
        assert torch.equal(found, expected)


def test_cifar10_binaries_that_are_damaged(tmp_path: Path) -> None:
    _binary(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(files.DataError, match=r"test_batch\.bin: expected images of 3,073 bytes, found 6,145"):
        CIFAR10.rows("test", tmp_path)
    path.write_bytes(bytes([10]) + whole[1:])
    with pytest.raises(files.DataError, match=r"test_batch\.bin image 0: expected a label 0 to 9, found '10'"):
        CIFAR10.rows("test", tmp_path)
    path.unlink()
    with pytest.raises(files.MissingDataError, match=r"test_batch\.bin is missing"):
        CIFAR10.rows("test", tmp_path)


def test_cifar10_pickles_are_not_opened(tmp_path: Path) -> None:
    """A pickle that would leave a file behind when it is read."""
    import pickle

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(files.DataError, match=r"pickled version of CIFAR-10.*cifar-10-batches-bin"):
        CIFAR10.rows("test", tmp_path)
    assert not (tmp_path / "sprung").exists()
    _binary(tmp_path)  # beside it, the binary version is read
    assert len(CIFAR10.rows("test", tmp_path)) == 2


def test_lossy_images_are_called_so(tmp_path: Path) -> None:
    """One JPEG among PNGs makes the score's pixels lossy; the setting is part of every score."""
    from squeezoo.eval.run import evaluate

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 9, 9)).save(buffer, "JPEG")
    for images, said in (
        ([_png((1, 2, 3)), _png((0, 0, 0))], "original pixels"), ([_png((1, 2, 3)), buffer.getvalue()], "JPEG (lossy)"),
        ([b"RIFF webp", _png((0, 0, 0))], "another encoding"),
    ):  # fmt: skip
        _parquet(tmp_path, {"image": images, "label": [3, 9]})
        assert {row["settings"]["images"] for row in CIFAR10.rows("test", tmp_path)} == {said}
    _parquet(tmp_path, {"image": [buffer.getvalue()] * 2, "label": [3, 9]})
    arguments = TIMM_ARGS | {"num_classes": 10, "in_chans": 3}
    model = load_dense("timm/vit_tiny_patch16_224", model_args=arguments).model
    (first, *_) = evaluate(model, CIFAR10, None, data_dir=tmp_path)
    assert first.settings["images"] == "JPEG (lossy)"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"picture": [b"x"], "label": [1]}, r"expected the columns \['image', 'label'\]"),
        ({"image": [b"x", b"y"], "label": [1, 10]}, "row 1: expected a label 0 to 9, found '10'"),
        ({"image": [b"x", None], "label": [1, 1]}, "row 1: column 'image' is empty"),
    ],
)
def test_cifar10_broken_rows(tmp_path: Path, columns: dict[str, Any], expected: str) -> None:
    """Each table breaks one documented column; the file and row are named."""
    path = _parquet(tmp_path, columns)
    with pytest.raises(files.DataError, match=expected) as caught:
        CIFAR10.rows("test", tmp_path)
    assert str(path) in str(caught.value)


def test_broken_files_are_named(tmp_path: Path) -> None:
    """Neither a parquet file nor an image."""
    path = _parquet(tmp_path, {"image": [b"no image"], "label": [1]})
    features = CIFAR10.encode(CIFAR10.rows("test", tmp_path), None, 0)
    with pytest.raises(files.DataError, match=r"test\.parquet row 0: not a readable image"):
        features[0]
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(files.DataError, match=r"test\.parquet: not a readable parquet"):
        CIFAR10.rows("test", tmp_path)
    with pytest.raises(files.MissingDataError, match=r"cifar10/train\.parquet.*--data-dir.*SQUEEZOO_DATA"):
        CIFAR10.rows("train", tmp_path)


def test_input_size_understands_processors_and_models() -> None:
    """Each library's own way to say the size: timm's data configuration, transformers' image processor, the models."""
    from timm.data import resolve_data_config
    from transformers import CLIPImageProcessor, ViTImageProcessor

    vit = make("timm_vit")
    assert image.input_size(ViTImageProcessor(size={"height": 20, "width": 24})) == (20, 24)
    assert image.input_size(resolve_data_config({"input_size": (1, 8, 8)})) == (8, 8)
    assert image.input_size(CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=32)) == (32, 32)
    assert image.input_size(vit) == image.input_size(make("vit")) == (8, 8)
    assert image.declared_shape(vit) == (1, 8, 8)
    assert image.declared_shape(make("bert")) is None
    assert image.input_size(None) is None


def test_shift_moves_whole_images_by_at_most_one_pixel() -> None:
    """Every result equals one of the nine windows of the padded original, and all nine occur over 200 images."""
    assert DIGITS.augment is not None
    x = torch.arange(64.0).reshape(1, 1, 8, 8).repeat(200, 1, 1, 1)
    batch = {"pixel_values": x, "labels": torch.arange(200)}
    out = DIGITS.augment(batch, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x[:1], (1, 1, 1, 1), mode="replicate")[0]
    windows = [padded[:, r : r + 8, c : c + 8] for r in range(3) for c in range(3)]
    found = [next(i for i, window in enumerate(windows) if torch.equal(window, y)) for y in out["pixel_values"]]
    assert set(found) == set(range(9))
    assert batch["pixel_values"] is x
    assert torch.equal(out["labels"], batch["labels"])


def test_flip_and_crop_windows() -> None:
    """Every result equals a window of the (perhaps mirrored) original padded by 32 / 8 = 4; about half are mirrored."""
    assert CIFAR10.augment is not None
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).repeat(60, 1, 1, 1)
    out = CIFAR10.augment({"pixel_values": x}, torch.Generator().manual_seed(0))["pixel_values"]
    pad = torch.nn.functional.pad
    mirrored = []
    for y in out:
        found = [
            flip
            for flip in (False, True)
            for unfolded in [pad(x[:1].flip(-1) if flip else x[:1], (4,) * 4, mode="reflect")[0]]
            if any(torch.equal(unfolded[:, r : r + 32, c : c + 32], y) for r in range(9) for c in range(9))
        ]
        assert len(found) == 1
        mirrored += found
    assert 15 < sum(mirrored) < 45


@pytest.mark.parametrize("task", [DIGITS, CIFAR10], ids=lambda task: task.name)
def test_augmentation_is_a_function_of_the_generator(task: Any) -> None:
    """Same generator state, same result; the global random state is not touched."""
    x = torch.randn(8, 3, 16, 16)
    state = torch.get_rng_state()
    first, again, other = (task.augment({"pixel_values": x}, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.data
def test_real_cifar10(data_dir: Path) -> None:
    """Official: 10,000 test images, 1,000 per class. Normalised by the constants of the training images, a sample has
    mean 0 and deviation 1 to a few hundredths."""
    rows = CIFAR10.rows("test", data_dir)
    assert np.bincount([row["label"] for row in rows]).tolist() == [1000] * 10
    features = CIFAR10.encode(rows, None, 0)
    sample = torch.stack([features[i]["pixel_values"] for i in range(0, 10_000, 7)])  # labels repeat every 10
    assert sample.mean((0, 2, 3)).abs().max() < 0.05
    assert (sample.std((0, 2, 3)) - 1).abs().max() < 0.05
