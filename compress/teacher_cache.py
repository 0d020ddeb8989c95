"""The teacher's outputs on disk: run it once over the training data, instead of at every step of every epoch.

A cache is a folder named by its fingerprint, of the teacher, the data and what is kept. Shards of consecutive samples
are written whole or not at all, so a killed run goes on where it stopped. Padding is not stored: a sample keeps its
real positions, and batches pad them anew. In a shard, ``scores`` and ``state.<k>`` [sum of positions, D] hold the
samples one after the other, ``<name>.rows`` [samples] says how many positions each has.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .fingerprint import fingerprint
from .heads import Batch, DistillError
from .observe import SAMPLE_ID, Observed, Observer, available_points, compared_points
from .stages import Distill, Patient
from .taps import Point

MANIFEST = "teacher.json"
Collate = Callable[[list[Mapping[str, Any]]], Batch]


class Numbered(Sequence[Mapping[str, Any]]):
    """The features, each with its place as ``sample_id``; `collate_numbered` brings it into the batch."""

    def __init__(self, features: Sequence[Mapping[str, Any]]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Any) -> Any:
        return {**self.features[index], SAMPLE_ID: index}


def collate_numbered(collate: Collate) -> Collate:
    """``collate`` for rows of `Numbered`: the same batch with ``sample_id`` [B]."""

    def numbered(rows: list[Mapping[str, Any]]) -> Batch:
        batch = collate([{name: value for name, value in row.items() if name != SAMPLE_ID} for row in rows])
        return {**batch, SAMPLE_ID: torch.tensor([row[SAMPLE_ID] for row in rows])}

    return numbered


class TeacherCache:
    """A finished cache.

    Args:
        folder: as `cache_teacher` returns it.

    Attributes:
        available: every point of the teacher that could have been compared. points: those whose states are kept.

    Raises:
        DistillError: the folder holds no finished cache.
    """

    def __init__(self, folder: Path) -> None:
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DistillError(f"{folder} holds no teacher cache: {error}") from error
        self.folder, self.samples, self.per_shard = folder, manifest["samples"], manifest["per_shard"]
        self.available = tuple(Point(**point) for point in manifest["available"])
        self.points = tuple(Point(**point) for point in manifest["points"])
        self._shards: dict[int, tuple[Any, dict[str, list[int]]]] = {}
        count = -(-self.samples // self.per_shard)
        if missing := [k for k in range(count) if not _is_shard(_shard(folder, k))]:
            raise DistillError(
                f"{folder} lacks shard {missing[0]} of {count}: run cache_teacher again, it goes on there"
            )

    def reader(self, points: Sequence[Point]) -> Callable[[Batch, Observed], Observed]:
        """A function that gives the teacher's outputs for a batch with ``sample_id``, padded like the student's.

        Raises:
            DistillError: states of a point that is not kept; later, a batch of other inputs than the cached ones.
        """
        if lost := [point for point in points if point not in self.points]:
            raise DistillError(f"the cache in {self.folder} does not keep {lost[0]}: make a new one for this stage")
        places = [self.points.index(point) for point in points]

        def read(batch: Batch, student: Observed) -> Observed:
            if SAMPLE_ID not in batch:
                raise DistillError(f"a cached teacher needs {SAMPLE_ID} in the batch: train on Numbered(features)")
            ids = batch[SAMPLE_ID].tolist()
            scores = self._padded("scores", ids, student.scores, student.given.mask)
            states = [
                None if own is None else self._padded(f"state.{place}", ids, own, mask)
                for place, own, mask in zip(places, student.features, student.masks, strict=True)
            ]
            return Observed(scores, student.given, tuple(states), student.masks)

        return read

    def _padded(self, name: str, ids: Sequence[int], like: Tensor, mask: Tensor | None) -> Tensor:
        """A kept tensor of some samples as a batch: real positions where the mask of this batch has them, else 0."""
        rows = [self._rows(name, sample) for sample in ids]
        if name == "scores" and like.dim() == 2:
            return torch.cat(rows).to(like.device)
        expected = [like.shape[1]] * len(ids) if mask is None else mask.sum(dim=1).tolist()
        for sample, row, positions in zip(ids, rows, expected, strict=True):
            if len(row) != positions:
                raise DistillError(
                    f"sample {sample} has {positions} positions, its cached {name} {len(row)}: the batches differ from "
                    "those the teacher saw; make the cache again from these data"
                )
        if mask is None:
            return torch.stack(rows).to(like.device)
        padded = rows[0].new_zeros(*mask.shape, *rows[0].shape[1:], device=like.device)
        padded[mask] = torch.cat(rows).to(like.device)
        return padded

    def _rows(self, name: str, sample: int) -> Tensor:
        if not 0 <= sample < self.samples:
            raise DistillError(f"{SAMPLE_ID} {sample} is outside the cache, which has {self.samples} samples")
        index, place = divmod(sample, self.per_shard)
        if index not in self._shards:
            file = safe_open(_shard(self.folder, index), framework="pt")
            lengths = {key: file.get_tensor(key) for key in file.keys() if key.endswith(".rows")}  # noqa: SIM118
            self._shards[index] = file, {k: [0, *accumulate(v.tolist())] for k, v in lengths.items()}
        file, starts = self._shards[index]
        start, stop = starts[f"{name}.rows"][place : place + 2]
        rows: Tensor = file.get_slice(name)[start:stop]
        return rows


@torch.no_grad()
def cache_teacher(
    teacher: nn.Module,
    student: nn.Module,
    config: Distill | Patient,
    features: Sequence[Mapping[str, Any]],
    collate: Collate,
    folder: Path,
    *,
    batch_size: int = 32,
    per_shard: int = 1024,
    device: str = "cpu",
    precision: str = "float32",
    key: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> TeacherCache:
    """Run the teacher over all samples, or over those that an earlier call did not reach.

    Args:
        student: the scores and states kept are those that this student is compared with.
        folder: the cache goes into a folder in it, named by its fingerprint.
        precision: of the stage that uses it; ``bfloat16`` runs under autocast like the training.
        key: what else the teacher's outputs depend on, e.g. its plan where sparse attention maps are attached.

    Raises:
        DistillError: teacher and student cannot be compared, or the disk is too small (told after the first shard).
    """
    available = available_points(teacher, config)
    pairs = compared_points(available_points(student, config), available, config)
    points = tuple(dict.fromkeys(theirs for _, theirs in pairs))
    only_first = isinstance(config, Patient) and config.token == "first"
    teacher.requires_grad_(False).eval().to(device)
    what = json.dumps([[asdict(p) for p in points], "one state" if only_first else "all", precision, per_shard, key])
    place = folder / fingerprint(teacher, features, collate, what)
    place.mkdir(parents=True, exist_ok=True)
    manifest = {
        "samples": len(features),
        "per_shard": per_shard,
        "available": [asdict(point) for point in available],
        "points": [asdict(point) for point in points],
    }
    _write(place / MANIFEST, lambda path: path.write_text(json.dumps(manifest), encoding="utf-8"))
    observer = Observer(teacher, points, only_first)
    count = -(-len(features) // per_shard)
    for index in range(count):
        path = _shard(place, index)
        if _is_shard(path):
            continue
        rows = range(index * per_shard, min(len(features), (index + 1) * per_shard))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
            tensors = _observe(observer, [features[i] for i in rows], collate, batch_size, device)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        free = shutil.disk_usage(place).free
        if size * (count - index) > free:
            raise DistillError(
                f"the teacher's outputs need about {size * count / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free: "
                "set cache: false, or compare less (token: first, fewer blocks)"
            )
        _write(path, lambda path, tensors=tensors: save_file(tensors, path))  # type: ignore[misc]
        say(f"teacher outputs: {index + 1} of {count} shards, {size / 1e6:.0f} MB each")
    return TeacherCache(place)


def _observe(
    observer: Observer, features: list[Mapping[str, Any]], collate: Collate, batch_size: int, device: str
) -> dict[str, Tensor]:
    """The tensors of one shard; samples of similar length run together."""
    order = sorted(range(len(features)), key=lambda i: len(features[i].get("input_ids", ())))
    kept: dict[str, list[Tensor]] = {}
    for start in range(0, len(order), batch_size):
        ids = order[start : start + batch_size]
        batch = {name: tensor.to(device) for name, tensor in collate([features[i] for i in ids]).items()}
        seen = observer(batch)
        outputs = {"scores": (seen.scores, seen.given.mask)}
        for k, (state, mask) in enumerate(zip(seen.features, seen.masks, strict=True)):
            assert state is not None  # the teacher is in evaluation mode
            outputs[f"state.{k}"] = state, mask
        for name, (output, mask) in outputs.items():
            output = output.unsqueeze(1) if output.dim() == 2 else output
            rows = list(output) if mask is None else [o[m] for o, m in zip(output, mask, strict=True)]
            places = kept.setdefault(name, [torch.empty(0)] * len(order))
            for i, row in zip(ids, rows, strict=True):
                places[i] = row.cpu()
    tensors = {name: torch.cat(rows).contiguous() for name, rows in kept.items()}
    return tensors | {f"{name}.rows": torch.tensor([len(row) for row in rows]) for name, rows in kept.items()}


def _shard(folder: Path, index: int) -> Path:
    return folder / f"outputs-{index:05d}.safetensors"


def _is_shard(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return "scores.rows" in file.keys()  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """The whole file or none: written beside its place, then renamed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(temporary)
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(path)
