"""From a zoo name to verified files: the index of all cards, and the folders that lie in the installed package.

``index.json`` is made from ``cards/*/results.json`` and the files beside them; nobody edits it by hand. Listing needs
no torch, so what does is imported where it is used.
"""

from __future__ import annotations

import difflib
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..eval.results import atomic_write_json
from .parts import RESULTS

if TYPE_CHECKING:
    from torch import nn

    from ..compress.verify import Verification

ZOO = Path(__file__).parent
INDEX = "index.json"
CARDS = "cards"

Entry = dict[str, Any]


class ZooError(ValueError):
    """A name that the zoo does not know, weights that it does not carry, or files that are not the published ones."""


def build_index(cards: str | Path = ZOO / CARDS) -> list[Entry]:
    """One flat record per ``cards/<name>/results.json``, sorted by name, with size and SHA-256 of every file there.

    Raises:
        ValueError: a card that is not valid, lies in a folder of another name, or says ``included`` without weights.
    """
    found = (path.parent for path in sorted(Path(cards).glob(f"*/{RESULTS}")))
    return [_entry(folder) for folder in found if not _hidden(Path(folder.name))]


def write_index(zoo: str | Path = ZOO) -> Path:
    """Write ``zoo/index.json`` from ``zoo/cards``, whole or not at all. Render the README.md files before this."""
    path = Path(zoo) / INDEX
    atomic_write_json(path, build_index(Path(zoo) / CARDS))
    return path


def list_models(pattern: str = "*", zoo: str | Path = ZOO) -> list[str]:
    """Names in the index that match a shell pattern (``minilm-l6.*``), sorted."""
    return [entry["name"] for entry in _read_index(zoo) if fnmatchcase(entry["name"], pattern)]


def info(name: str, zoo: str | Path = ZOO) -> Entry:
    """The index record of one name.

    Raises:
        ZooError: unknown name; the message offers the nearest ones.
    """
    entries = {entry["name"]: entry for entry in _read_index(zoo)}
    if name in entries:
        return entries[name]
    near = difflib.get_close_matches(name, entries, n=3, cutoff=0.4)
    if near:
        raise ZooError(f"the zoo has no model {name!r}; did you mean {' or '.join(near)}?")
    raise ZooError(f"the zoo has no model {name!r}; it has {', '.join(entries) or 'none yet'}. A folder works too.")


def resolve(name_or_path: str | Path, zoo: str | Path = ZOO) -> Path:
    """The folder of a checkpoint: a local folder as it is, or a zoo name whose files all have their published SHA-256.

    A local folder comes before a zoo name, as in transformers.

    Raises:
        ZooError: neither a folder nor a known name; weights not distributed (the message says which command makes
            them); a file missing or altered (which one, expected and found).
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    entry = info(str(name_or_path), zoo)
    if entry["location"] is None:
        raise ZooError(
            f"the weights of {entry['name']} are not distributed with Squeezoo, only their card. Make them with:\n"
            f"  {entry['reproduce']}\nand give the folder that this writes instead of the name"
        )
    folder = Path(zoo) / entry["location"]
    for name, expected in entry["files"].items():
        _check_file(folder / name, expected)
    return folder


def load(name_or_path: str | Path, **options: Any) -> nn.Module:
    """The model behind a zoo name or a checkpoint folder; ``options`` are those of `squeezoo.compress.checkpoint.load`.

    Raises:
        ZooError: see `resolve`. CheckpointError: damaged files, or a backend that cannot run here.
    """
    from ..compress import checkpoint

    return checkpoint.load(resolve(name_or_path), **options)


def verify(name_or_path: str | Path) -> Verification:
    """Prove a checkpoint by zoo name or folder: every hash, then the golden output; see `compress.verify`.

    Raises:
        ZooError: see `resolve`. CheckpointError: a damaged file, or an output that differs too much.
    """
    from ..compress.verify import verify as prove

    return prove(resolve(name_or_path))


def load_processor(name_or_path: str | Path) -> Any:
    """Tokenizer or image processor of a zoo name or a folder; None where it has none (timm).

    Raises:
        ZooError: see `resolve`. DenseError: files that transformers cannot read.
    """
    from ..models import folders

    return folders.load_processor(resolve(name_or_path))


def _check_file(path: Path, expected: Entry) -> None:
    from ..compress.atomic import sha256

    if not path.is_file():
        raise ZooError(f"{path} is missing; install Squeezoo again")
    found = sha256(path)
    if found != expected["sha256"]:
        raise ZooError(
            f"{path} is not the published file: expected {expected['bytes']:,} bytes with sha256 {expected['sha256']}, "
            f"found {path.stat().st_size:,} bytes with sha256 {found}; install Squeezoo again"
        )


def _read_index(zoo: str | Path) -> list[Entry]:
    path = Path(zoo) / INDEX
    try:
        entries: list[Entry] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ZooError(f"{path} is missing; install Squeezoo again") from None
    except json.JSONDecodeError as error:
        raise ZooError(f"{path} is damaged ({error}); install Squeezoo again") from error
    return entries


def _entry(folder: Path) -> Entry:
    from ..compress.atomic import sha256
    from ..compress.checkpoint import MANIFEST
    from .card import Card
    from .tables import condition, fastest

    card = Card.load(folder)
    if card.name != folder.name:
        raise ValueError(f"{folder} holds the card of {card.name}; rename the folder")
    if (folder / MANIFEST).is_file() != (card.weights == "included"):
        there = "lies" if card.weights == "reproducible" else "does not lie"
        raise ValueError(f"{folder / RESULTS} says that the weights are {card.weights}, but {MANIFEST} {there} there")
    best, size = fastest(card), card.size
    dense, score = card.primary_pair or (None, None)
    visible = (path for path in sorted(folder.rglob("*")) if not _hidden(path.relative_to(folder)))
    return {
        "name": card.name,
        "base_model": card.base.hub_id or card.base.name,
        "recipe": card.recipe.name,
        "task": score and score.task,
        "split": score and score.split,
        "metric": score and score.metric,
        "samples": score and score.samples,
        "dense": dense and dense.value,
        "compressed": score and score.value,
        "paper_ratio": round(size.paper_bytes / size.paper_dense_fp16_bytes, 6),
        "true_bytes": size.true_bytes,
        "true_dense_bytes": size.true_dense_bytes,
        "speed_up": None if best is None else round(best.speedup, 4),
        "speed_up_condition": None if best is None else condition(best),
        "never_slower": all(speed.speedup >= 1 for speed in card.speeds) if card.speeds else None,
        "licence": card.base.licence,
        "reproduce": " && ".join(card.commands),
        "location": f"{CARDS}/{card.name}" if card.weights == "included" else None,
        "files": {
            path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
            for path in visible
            if path.is_file()
        },
    }


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)
