"""ImageNet-1k: its folder layouts and lists of classes, the models' own preprocessing, top-1 and top-5."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from sklearn.metrics import top_k_accuracy_score
from squeezoo.eval import get_task, imagenet, imagenet_files
from squeezoo.eval.ahead import Ahead
from squeezoo.eval.files import DataError, MissingDataError
from squeezoo.eval.image import ranked_accuracy
from squeezoo.eval.imagenet_transform import decode, transform_of
from squeezoo.eval.run import evaluate
from squeezoo.eval.runner import Runner
from squeezoo.models.torchvision_guard import ensure_torchvision_importable

ensure_torchvision_importable()
TASK = get_task("imagenet")
# the first, two neighbours and the last of the sorted wnids: tench, goldfish, shark and toilet paper
WNIDS = {"n01440764": 0, "n01443537": 1, "n01484850": 2, "n15075141": 999}
NAMES = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2, 3, 5)]


def _picture(seed: int, width: int = 60, height: int = 45, mode: str = "RGB") -> Image.Image:
    """Smooth colours, so that JPEG and resizing lose little."""
    small = np.random.RandomState(seed).randint(0, 255, (4, 5, 4 if mode == "CMYK" else 3), dtype=np.uint8)
    image = Image.fromarray(small, "CMYK" if mode == "CMYK" else "RGB")
    return (image if mode == "CMYK" else image.convert(mode)).resize((width, height), Image.Resampling.BICUBIC)


def _jpeg(path: Path, seed: int, **how: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _picture(seed, **how).save(path, "JPEG", quality=95)


def _folders(root: Path, split: str = "val", count: int = 3) -> Path:
    for number, wnid in enumerate(WNIDS):
        for image in range(count):
            _jpeg(root / "imagenet" / split / wnid / f"{wnid}_{image}.JPEG", 10 * number + image, width=50 + 7 * image)
    return root / "imagenet" / split


def _flat(root: Path) -> Path:
    for number, name in enumerate(NAMES):
        _jpeg(root / "imagenet" / "val" / name, number)
    return root / "imagenet"


def _timm(**more: Any) -> Any:
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=1000,
            **more,
        ).eval()  # fmt: skip


def test_classes_are_numbered_by_sorted_wnids() -> None:
    """torchvision.datasets.ImageFolder numbers the sorted folder names; tench is 0, toilet paper 999 in every model's
    list of names."""
    classes = imagenet_files.class_indices()
    assert list(classes) == sorted(classes)
    assert (len(classes), list(classes.values())) == (1000, list(range(1000)))
    assert {wnid: classes[wnid] for wnid in WNIDS} == WNIDS


@pytest.mark.parametrize("split", ["train", "validation"])
def test_class_folders(tmp_path: Path, split: str) -> None:
    """The rows of torchvision's ImageFolder, with the classes of the whole list; official sizes of ILSVRC 2012."""
    from torchvision.datasets import ImageFolder

    folder = _folders(tmp_path, "train" if split == "train" else "val")
    rows = TASK.rows(split, tmp_path)
    theirs = ImageFolder(str(folder))
    assert [(str(row["image"]), row["label"]) for row in rows] == [
        (path, WNIDS[theirs.classes[label]]) for path, label in theirs.samples
    ]
    assert rows[2]["where"] == str(folder / "n01440764" / "n01440764_2.JPEG")
    assert (TASK.size("train"), TASK.size("validation"), TASK.report_split) == (1_281_167, 50_000, "validation")


def _val_txt(root: Path) -> None:
    (root / "val.txt").write_text("".join(f"{n} {label}\n" for n, label in zip(NAMES, (999, 0, 2, 1))), "utf-8")


def _synset_labels(root: Path) -> None:
    wnids = ["n15075141", "n01440764", "n01484850", "n01498041", "n01443537"]  # the fourth image is not there
    (root / "val" / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(wnids), "utf-8")


def _kaggle(root: Path) -> None:
    wnids = ["n01443537", "n01484850", "n01440764", "n15075141"]  # of the last image first
    lines = [f"{n[:-5]},{wnid} 1 2 3 4 {wnid} 5 6 7 8 " for n, wnid in zip(NAMES[::-1], wnids)]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]), "utf-8")


def _devkit(root: Path, ids: str = "30\n7\n2\n1\n4") -> None:
    """The kit's own numbering, which is not that of the sorted wnids."""
    place = root / "ILSVRC2012_devkit_t12" / "data"
    place.mkdir(parents=True)
    wnids = {30: "n15075141", 7: "n01440764", 2: "n01484850", 1: "n01498041", 4: "n01443537"}
    synsets = np.array(
        [(i, wnid, "words") for i, wnid in wnids.items()],
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")],
    )
    savemat(place / "meta.mat", {"synsets": synsets.reshape(-1, 1)})
    (place / "ILSVRC2012_validation_ground_truth.txt").write_text(ids, "utf-8")


@pytest.mark.parametrize("labels", [_val_txt, _synset_labels, _kaggle, _devkit])
def test_flat_validation_folders(tmp_path: Path, labels: Any) -> None:
    """Images 1, 2, 3 and 5 are toilet paper, tench, shark and goldfish in each list."""
    labels(_flat(tmp_path))
    rows = TASK.rows("validation", tmp_path)
    assert [(row["image"].name, row["label"]) for row in rows] == list(zip(NAMES, (999, 0, 2, 1)))


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"imagenet/val, imagenet/validation.*--data-dir"):
        TASK.rows("validation", tmp_path)
    with pytest.raises(ValueError, match="did you mean 'validation'"):
        TASK.rows("valid", tmp_path)
    root = _flat(tmp_path)
    with pytest.raises(DataError, match=r"classes must stand in one of val\.txt"):
        TASK.rows("validation", tmp_path)
    for name in NAMES:
        (root / "val" / name).unlink()
    with pytest.raises(DataError, match=r"named by WordNet id .* or images, found neither"):
        TASK.rows("validation", tmp_path)
    (root / "val" / "tench").mkdir()
    with pytest.raises(DataError, match="expected a WordNet id such as n01440764, found 'tench'"):
        TASK.rows("validation", tmp_path)
    (root / "val" / "tench").rename(root / "val" / "n00000001")
    with pytest.raises(DataError, match="n00000001 is none of the 1,000 classes"):
        TASK.rows("validation", tmp_path)
    (root / "val" / "n00000001").rename(root / "val" / "n01440764")
    with pytest.raises(DataError, match="n01440764: expected images, found none"):
        TASK.rows("validation", tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("val.txt", f"{NAMES[0]} 1000\n", r"val\.txt:1: expected a label 0 to 999, found '1000'"),
        ("val.txt", f"{NAMES[0]} 1 2\n", r"val\.txt:1: expected the name of an image and its class"),
        ("val.txt", f"{NAMES[0]} 1\n", r"no class for ILSVRC2012_val_00000002\.JPEG \(3 of 4 images have none\)"),
        ("val.txt", "\n", r"val\.txt:1: expected lines"),
        ("synset_labels.txt", "n01440764\nx\n", r"synset_labels\.txt:2: expected a WordNet id"),
        ("synset_labels.txt", "n01440764\n" * 4, "its 4 lines belong to .* ILSVRC2012_val_00000005.JPEG is not"),
        ("LOC_val_solution.csv", "Id,Text\na,b\n", r"csv:1: expected the columns ImageId, PredictionString"),
        ("LOC_val_solution.csv", "ImageId,PredictionString\na,b\n", r"csv:2: expected a WordNet id"),
    ],
)
def test_broken_lists_of_classes(tmp_path: Path, name: str, text: str, expected: str) -> None:
    (_flat(tmp_path) / name).write_text(text, "utf-8")
    with pytest.raises(DataError, match=expected):
        TASK.rows("validation", tmp_path)


def test_broken_development_kit(tmp_path: Path) -> None:
    root = _flat(tmp_path)
    _devkit(root, "30\n99\n2\n1\n4")
    with pytest.raises(DataError, match=r"ground_truth\.txt:2: expected an ILSVRC2012_ID of meta\.mat, found '99'"):
        TASK.rows("validation", tmp_path)
    (root / "ILSVRC2012_devkit_t12" / "data" / "meta.mat").write_bytes(b"MATLAB no more")
    with pytest.raises(DataError, match=r"meta\.mat: expected the development kit's synsets"):
        TASK.rows("validation", tmp_path)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_timm_preprocessing(tmp_path: Path, crop_mode: str) -> None:
    """Resizing and crop by hand with PIL from the data configuration (crop_pct 0.9 of 32: shorter side 35), for the
    centre crop that nearly all models use; timm's transform for every mode."""
    from timm.data import create_transform

    model = _timm(pretrained_cfg_overlay={"crop_pct": 0.9, "crop_mode": crop_mode, "mean": (0.5, 0.4, 0.3)})
    _folders(tmp_path, count=1)
    (row, *_) = rows = TASK.rows("validation", tmp_path)
    feature = TASK.encode(rows, model, 0)[0]
    assert (feature["pixel_values"].shape, feature["labels"]) == ((3, 32, 32), 0)
    config = dict(input_size=(3, 32, 32), crop_pct=0.9, crop_mode=crop_mode, interpolation="bicubic")
    theirs = create_transform(**config, mean=(0.5, 0.4, 0.3), std=(0.5, 0.5, 0.5))
    torch.testing.assert_close(feature["pixel_values"], theirs(Image.open(row["image"])))
    if crop_mode == "center":
        image = Image.open(row["image"])  # 50 x 45
        image = image.resize((int(35 * 50 / 45), 35), Image.Resampling.BICUBIC)
        left, top = round((image.width - 32) / 2), round((image.height - 32) / 2)
        values = torch.from_numpy(np.array(image.crop((left, top, left + 32, top + 32)))).permute(2, 0, 1) / 255
        expected = (values - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / 0.5
        torch.testing.assert_close(feature["pixel_values"], expected)


def test_transformers_preprocessing(tmp_path: Path) -> None:
    """The image processor's own output, and its description in words that do not depend on its class of sizes."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    _folders(tmp_path, count=1)
    rows = TASK.rows("validation", tmp_path)
    feature = TASK.encode(rows, processor, 0)[1]
    theirs = processor(Image.open(rows[1]["image"]), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(feature["pixel_values"], theirs)
    told = transform_of(processor)[1]
    assert "size shortest_edge=40" in told
    assert "crop_size height=32 width=32" in told
    with pytest.raises(ValueError, match=r"own image processor.*NoneType"):
        transform_of(None)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_images_of_other_colours(tmp_path: Path, mode: str) -> None:
    """ImageNet holds grey and CMYK files; PIL's conversion to RGB is what torchvision's loader does too."""
    _jpeg(tmp_path / "x.JPEG", 1, mode=mode)
    image = decode({"image": tmp_path / "x.JPEG", "where": "x"})
    assert (image.mode, image.size) == ("RGB", (60, 45))


@pytest.mark.parametrize("how", ["cut", "text"])
def test_a_corrupt_image_is_named(tmp_path: Path, how: str) -> None:
    """Also when a thread has decoded it ahead."""
    path = _folders(tmp_path) / "n01484850" / "n01484850_1.JPEG"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if how == "cut" else b"no image")
    with pytest.raises(DataError, match=r"n01484850_1\.JPEG: not a readable image"):
        evaluate(_timm(), TASK, None, data_dir=tmp_path, batch_size=4, progress=False)


def test_scores_are_those_of_the_library(tmp_path: Path) -> None:
    """scikit-learn's top-k accuracy of the logits of single images, in any order and batch."""
    _folders(tmp_path)
    model = _timm()
    rows = list(TASK.rows("validation", tmp_path))
    with torch.no_grad():  # the model likes the first two classes best
        for wnid in (0, 1):
            model.head.bias[wnid] += 2
        model.head.bias[2:7] += 1
        logits = torch.cat([model(TASK.encode([row], model, 0)[0]["pixel_values"][None]) for row in rows])
    labels = [row["label"] for row in rows]
    top1, top5 = evaluate(model, TASK, None, data_dir=tmp_path, batch_size=5, progress=False)
    assert (top1.metric, top5.metric, top1.samples, top1.complete) == ("top1", "top5", 12, False)
    for score, k in ((top1, 1), (top5, 5)):
        assert score.value == pytest.approx(top_k_accuracy_score(labels, logits.numpy(), k=k, labels=range(1000)))
    assert 0 < top1.value < top5.value < 1
    assert "crop_pct 0.9" in str(top1.settings["preprocessing"])
    random.Random(0).shuffle(rows)
    for size in (1, 12):
        ranks = imagenet.predict_images(Runner(model, None, batch_size=size), rows)
        assert TASK.score(ranks, [row["label"] for row in rows]) == {"top1": top1.value, "top5": top5.value}


def test_ranked_accuracy_against_scikit_learn() -> None:
    """On random logits without ties; of equal logits the lower class comes first, as argmax takes it."""
    generator = torch.Generator().manual_seed(0)
    logits_NC = torch.randn(400, 10, generator=generator)
    labels = torch.randint(10, (400,), generator=generator).tolist()
    ranks = logits_NC.sort(descending=True, stable=True).indices[:, :5].tolist()
    found = ranked_accuracy(ranks, labels)
    for name, k in (("accuracy", 1), ("top5", 5)):
        assert found[name] == pytest.approx(top_k_accuracy_score(labels, logits_NC.numpy(), k=k))


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_small_images_have_both(name: str) -> None:
    """The first stays ``accuracy``, the name that published cards compare by."""
    task = get_task(name)
    assert task.metric == "accuracy"
    assert task.score([[1, 2, 3, 4, 5], [0, 9, 8, 7, 6]], [1, 6]) == {"accuracy": 0.5, "top5": 1.0}


class _Counting(list):  # type: ignore[type-arg]
    """Features that remember how many have been computed."""

    def __init__(self, count: int) -> None:
        super().__init__(range(count))
        self.made: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.made.append(index)
        if index == 13:
            raise DataError("13 is broken")
        return {"x": index}


def test_decoding_ahead_is_bounded_and_the_same() -> None:
    """Never more than ``window`` items beyond those taken, each once; errors come where the item is asked for."""
    features = _Counting(40)
    order = random.Random(2).sample(range(40), 40)
    with Ahead(features, 3, order, workers=3) as ahead:
        for taken, index in enumerate(order, start=1):
            if index == 13:
                with pytest.raises(DataError, match="13 is broken"):
                    _ = ahead[index]
            else:
                assert ahead[index] == {"x": index}
            assert len(features.made) <= taken + 6
    assert sorted(features.made) == list(range(40))
    with Ahead(features, 1, workers=1) as ahead:
        assert [item["x"] for item in ahead[3:6]] == [3, 4, 5]
        assert ahead[30] == {"x": 30}


@pytest.mark.parametrize("library", ["timm", "transformers"])
@pytest.mark.parametrize("cores", [1, 4])
def test_batches_hold_the_librarys_own_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, cores: int
) -> None:
    """What the model is called with, decoded beside it and between its batches: the bits that timm's transform and
    transformers' processor give for each file, in the block of memory in which they were made."""
    from squeezoo.eval import ahead
    from timm.data import create_transform, resolve_data_config
    from transformers import CLIPImageProcessor

    monkeypatch.setattr(ahead, "cores", lambda: cores)
    folder, model, calls = _folders(tmp_path), _timm(), []
    model.register_forward_pre_hook(lambda module, arguments: calls.append(arguments[0]))
    processor = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    timms = create_transform(**resolve_data_config({"input_size": (3, 32, 32)}, model=model))
    runner = Runner(model, None if library == "timm" else processor, batch_size=5)
    imagenet.predict_images(runner, TASK.rows("validation", tmp_path))
    images = [Image.open(path) for path in sorted(folder.rglob("*.JPEG"))]
    if library == "timm":
        wanted = [timms(image) for image in images]
    else:
        wanted = [processor(image, return_tensors="pt")["pixel_values"][0] for image in images]
    assert [len(call) for call in calls] == [5, 5, 2]
    assert torch.equal(torch.cat(calls), torch.stack(wanted))
    assert len({call.untyped_storage().data_ptr() for call in calls}) == 3
    assert all(call.untyped_storage().nbytes() == call.nbytes for call in calls)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_timms_transform_in_numpy_gives_the_same_bits(name: str) -> None:
    """Reference: timm's own `create_transform`, on sizes around the crop, upright, lying, odd, smaller than it; its
    constants are 0.5 for one model and ImageNet's for the other."""
    import timm
    from squeezoo.eval.imagenet_numpy import NumpyNormalized
    from timm.data import create_transform, resolve_data_config

    small = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    model = timm.create_model(name, **small)
    whole = create_transform(**resolve_data_config({"input_size": (3, 32, 32)}, model=model))
    ours = transform_of(model)[0]
    assert isinstance(ours, NumpyNormalized)
    draw = random.Random(5)
    sizes = [(35, 35), (36, 36), (48, 36), (36, 500), (33, 37), (8, 300), (5, 5), (64, 64), (1, 90)]
    sizes += [(draw.randint(20, 200), draw.randint(20, 200)) for _ in range(4)]
    for number, (width, height) in enumerate(sizes):
        image = _picture(number, width, height)
        assert torch.equal(ours(image), whole(image)), (width, height)


def test_transforms_that_numpy_does_not_know_stay_as_they_are() -> None:
    """Steps of other names, another order, and a conversion that is not a division by 255."""
    from squeezoo.eval.imagenet_numpy import NumpyNormalized, with_numpy
    from timm.data import create_transform
    from timm.data.transforms import MaybeToTensor

    class ToTensor(MaybeToTensor):  # type: ignore[misc]
        def __call__(self, image: Any) -> torch.Tensor:
            doubled: torch.Tensor = 2 * super().__call__(image)
            return doubled

    usual = create_transform((3, 32, 32))
    assert isinstance(with_numpy(usual), NumpyNormalized)
    without = create_transform((3, 32, 32), normalize=False)
    assert with_numpy(without) is without
    assert with_numpy(str) is str
    usual.transforms[-2] = ToTensor()
    assert with_numpy(usual) is usual


def test_hub_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in the Hub repository's own form, read by the real ``datasets``: columns image and label."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = TASK.rows("validation", _folders(tmp_path, count=1).parent.parent)
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    table = {
        "image": [{"bytes": row["image"].read_bytes(), "path": row["image"].name} for row in rows],
        "label": [row["label"] for row in rows],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), hub / "data" / "validation-00000-of-00001.parquet")
    (hub / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype: int64\n"
        "configs:\n- config_name: default\n  data_files:\n  - split: validation\n    path: data/validation-*\n---\n",
        encoding="utf-8",
    )
    monkeypatch.delenv("SQUEEZOO_DATA", raising=False)
    monkeypatch.setattr(imagenet, "HUB", str(hub))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = _timm()
    online = evaluate(model, TASK, None, progress=False)
    assert online == evaluate(model, TASK, None, data_dir=tmp_path, progress=False)


def test_training_data(tmp_path: Path) -> None:
    """What `finetune` gets: the train folders through the model's preprocessing, mirrored and moved."""
    from squeezoo.pipeline import training_data

    _folders(tmp_path, "train")
    data = training_data(TASK, None, data_dir=tmp_path, model=_timm())
    batch = data.collate([data.features[i] for i in (0, 4, 11)])
    assert (batch["pixel_values"].shape, batch["labels"].tolist()) == ((3, 3, 32, 32), [0, 1, 999])
    assert data.augment is not None
    changed = data.augment(batch, torch.Generator().manual_seed(1))["pixel_values"]
    assert changed.shape == batch["pixel_values"].shape
    assert not torch.equal(changed, batch["pixel_values"])


@pytest.mark.data
def test_the_real_sample(data_dir: Path, tmp_path: Path) -> None:
    """One image of each of the 1,000 classes, its wnid and class from the set's own table: the list agrees, and every
    100th decodes to the same pixels from a folder and from bytes."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(data_dir / "imagenet-sample" / "images.parquet").to_pylist()
    assert imagenet_files.class_indices() == {row["wnid"]: row["label"] for row in table}
    for row in table[::100]:
        place = tmp_path / "imagenet" / "val" / row["wnid"]
        place.mkdir(parents=True)
        (place / "a.JPEG").write_bytes(row["image"])
    rows = TASK.rows("validation", tmp_path)
    assert [row["label"] for row in rows] == [row["label"] for row in table[::100]]
    features = TASK.encode(rows, _timm(), 0)
    again = TASK.encode([{**row, "where": "here"} for row in table[::100]], _timm(), 0)
    for one, other in zip(features, again):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
    assert Image.open(io.BytesIO(table[0]["image"])).mode == "RGB"
