"""The rooms joined: a task's data for training, and the measured card of a checkpoint.

The engine knows no tasks and the evaluation knows no recipes; whoever needs both (the command line, the quickstart,
scripts of your own) finds them joined here.
"""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from . import __version__
from .compress.backends import Backend
from .compress.checkpoint import MANIFEST, Manifest, load, load_manifest
from .compress.engine import read_provenance
from .compress.runtime.cuda_support import check_cuda
from .compress.train_data import TrainData
from .eval import get_task
from .eval.data import collator
from .eval.energy import measure_energy
from .eval.fit import check_labels, check_reads, head_kind
from .eval.labels import name_labels_
from .eval.perplexity import context_length
from .eval.results import atomic_write_json
from .eval.run import evaluate, sample_rows
from .eval.speech_vocabulary import LETTERS, with_vocabulary
from .eval.task import Task
from .measure import extra_measurements
from .models.dense import Dense, DenseError, load_dense
from .models.folders import load_processor
from .models.kinds import WITH_LABELS
from .timings import measure_speeds, points
from .zoo_cards.bases import describe_base
from .zoo_cards.card import COMPRESSED, DENSE, Card
from .zoo_cards.datasets import describe_task
from .zoo_cards.hub import list_models, resolve
from .zoo_cards.parts import Base, PlanSummary, RecipeNote, ScoreRow, Training
from .zoo_cards.plots_card import write_plots
from .zoo_cards.render import write_card
from .zoo_cards.resources import Resources
from .zoo_cards.search import Search
from .zoo_cards.sizes import measure_size, measure_storage

ENERGY = "energy.json"  # what the training of a folder took; ``resumed``: only the part after its last stop


@dataclass(frozen=True)
class Loaded:
    """A model, dense or compressed, with its tokenizer or image processor (None for timm)."""

    model: nn.Module
    processor: Any


def load_any(source: str, backend: Backend = "auto", device: str = "cpu") -> Loaded:
    """A checkpoint folder, a zoo name, or whatever ``load_dense`` takes, on ``device``.

    Raises:
        CheckpointError, ZooError, DenseError: it is none of them, or damaged. CudaError: no such device.
    """
    if source in list_models() or (Path(source) / MANIFEST).is_file():
        folder = resolve(source)
        return Loaded(load(folder, device=device, backend=backend), load_processor(folder))
    if device.startswith("cuda"):
        check_cuda(device)
    dense = load_dense(source, kind="auto")
    return Loaded(dense.model.to(device), dense.processor)


def load_for(source: str, task: Task | None, *, seed: int = 0, retrain: bool = False) -> Dense:
    """A dense model with the head that a task needs, newly initialised from ``seed`` where it has none; without a task
    with the head that it was saved with. Its classes get the task's names and order (`name_labels_`); ``retrain``: even
    where they had others, because the head will be trained on this task.

    Raises:
        DenseError: see `load_dense`, and for a name of the zoo, whose models are compressed.
    """
    if source in list_models() and not Path(source).is_dir():
        raise DenseError(
            f"{source} is a compressed model of the zoo (`squeezoo info {source}`), and a dense model is needed here: "
            f"write one first with `squeezoo export {source} --to dense -o DENSE` and hand in DENSE"
        )
    if task is None:
        return load_dense(source, kind="auto", seed=seed)
    kind = task.model_kinds[0]
    dense = load_dense(source, kind=kind, num_labels=task.num_labels if kind in WITH_LABELS else None, seed=seed)
    if kind == "ctc" and hasattr(dense.processor, "sampling_rate"):  # a feature extractor alone: no vocabulary yet
        dense = load_dense(source, kind=kind, num_labels=len(LETTERS), seed=seed)
        return replace(dense, processor=with_vocabulary(dense.processor))
    name_labels_(dense.model, task, new=dense.new, retrain=retrain)
    return dense


def training_data(
    task: Task | str,
    processor: Any,
    *,
    data_dir: str | Path | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    model: nn.Module | None = None,
    split: str | None = None,
) -> TrainData:
    """The training split of a task as the engine takes it.

    Args:
        processor: tokenizer, image or speech processor of the model.
        max_length: tokens of a sequence, or of a block of text; None takes the task's own fine-tuning default. Never
            more than the model can read.
        limit: so many rows instead of all, always the same ones.
        model: is checked against the task, and says the image size where there is no processor.
        split: None takes the task's first one.

    Raises:
        ValueError: unknown task or split, or a task that the model cannot do. DataError: its files are missing or
            broken.
    """
    task = get_task(task) if isinstance(task, str) else task
    split = task.splits[0] if split is None else split
    task.size(split)
    if max_length is None:
        max_length = task.finetune.max_length if task.finetune is not None else task.max_length or 0
    if model is not None:
        check_reads(model, task)
        check_labels(model, task)
        context = context_length(model, processor) if task.reads == "text" else None
        max_length = max_length if context is None else min(max_length, context)
    augment = task.augment if task.make_augment is None else task.make_augment(processor)
    rows = sample_rows(task.rows(split, data_dir), limit)
    encode = task.train_encode or task.encode
    if model is not None and task.train_encode_by_head:
        encode = task.train_encode_by_head[head_kind(model)]
    features = encode(rows, model if processor is None and task.reads == "images" else processor, max_length)
    return TrainData(features, collator(processor), augment, None if isinstance(features, list) else rows)


@contextmanager
def recording_energy(folder: str | Path, how: str, device: str, restart: bool = False) -> Iterator[None]:
    """Measure the work inside the block and leave ``energy.json`` in ``folder``, which the work makes.

    Args:
        how: ``off``; ``sensors``; ``estimate``: a power model speaks for what has no sensor.
        restart: the work begins anew, so that what an earlier run left behind is no part of it.
    """
    if how == "off":
        yield
        return
    resumed = not restart and Path(f"{folder}.work").is_dir()
    with measure_energy(device=device, estimate=how == "estimate") as meter:
        yield
    atomic_write_json(Path(folder) / ENERGY, meter.energy.to_dict() | {"resumed": resumed})


def measure_card(
    folder: str | Path,
    dense_folder: str | Path,
    task_name: str,
    *,
    commands: Sequence[str],
    batches: Sequence[int] = (1, 8),
    lengths: Sequence[int] = (128,),
    variants: Mapping[str, str | Path] | None = None,
    data_dir: str | Path | None = None,
    max_length: int | None = None,
    repeats: int = 30,
    included: bool = False,
    limits: Sequence[str] = (),
    costs: bool = False,
    decode: int | None = None,
    estimate: bool = False,
    sweep: str | Path | None = None,
    plots: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Card:
    """Evaluate and time a checkpoint beside its dense model, then write ``results.json`` and ``README.md`` into it.

    Args:
        folder: the checkpoint. dense_folder: the fine-tuned dense model that it was made from.
        commands: the shell lines that made it.
        batches, lengths: what to time, every batch with every length; lengths are tokens and do not matter for images.
        variants: more checkpoints of the same model to put beside it in the table, by name.
        included: the checkpoint is published with its weights.
        costs: measure loading, memory and energy too, and predict the GEMMs' time by the roofline model.
        decode: with ``costs``, time so many new tokens after each prompt. estimate: with ``costs``, let a power model
            speak for what has no sensor.
        sweep: the folder of the sweep that the settings come from. plots: draw what the card holds beside it.

    Raises:
        CheckpointError, ValueError, DataError: nothing is written then.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    task = get_task(task_name)
    search = None if sweep is None else Search.load(sweep)
    if search is not None:
        search.check_chose(model=str(manifest.base["name"]), recipe=manifest.recipe.name, task=task.name)
    dense = load_dense(dense_folder, kind="auto")
    compressed = load(folder)
    models = {DENSE: dense.model, COMPRESSED: compressed}
    models |= {name: load(path) for name, path in (variants or {}).items()}
    scores: list[ScoreRow] = []
    for variant, model in models.items():
        say(f"evaluating {variant} on {task.name}")
        found = evaluate(
            model, task, dense.processor,
            data_dir=data_dir, max_length=max_length, seed=manifest.recipe.seed, progress=progress,
        )  # fmt: skip
        scores += [ScoreRow(variant, score) for score in found]
    conditions = points(dense.model, batches, lengths)
    speeds = measure_speeds(dense.model, compressed, conditions, repeats, progress, say)
    resources = Resources()
    if costs:
        resources = extra_measurements(
            folder, dense_folder, dense.model, compressed, conditions,
            decode=decode, repeats=repeats, estimate=estimate, progress=progress, say=say,
        )  # fmt: skip
    card = Card(
        name=manifest.name,
        base=_base(manifest, dense_folder, dense.library),
        recipe=RecipeNote(manifest.recipe.name, manifest.recipe.source),
        plan=PlanSummary.of(manifest.plan),
        size=measure_size(folder, dense_folder),
        scores=tuple(scores),
        speeds=speeds,
        data=(describe_task(task.name),),
        training=_training(manifest),
        commands=tuple(commands),
        limits=tuple(limits),
        published=(),
        weights="included" if included else "reproducible",
        date=datetime.date.today().isoformat(),
        squeezoo=__version__,
        code=code_version(),
        storage=measure_storage(folder),
        search=search,
        resources=resources,
    )
    if plots:
        write_plots(card, folder)
    write_card(card, folder)
    return card


def code_version() -> str | None:
    """The git commit of the source tree, with ``+changes`` where files differ from it; None outside a checkout."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return f"{commit}+changes" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    root = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def _base(manifest: Manifest, dense_folder: str | Path, library: str) -> Base:
    """What the dense model was fine-tuned from; the dense model itself where its folder does not say."""
    provenance = read_provenance(dense_folder)
    base = manifest.base if provenance is None else provenance["base"]
    return describe_base(str(base["name"]), base["revision"], library, manifest.plan.adapter)


def _training(manifest: Manifest) -> Training | None:
    if not manifest.recipe.needs_training:
        return None
    hardware = next((r["hardware"] for r in manifest.training if r.get("hardware")), None)
    return Training.of(manifest.training, manifest.recipe.seed, hardware or "hardware that the run did not record")
