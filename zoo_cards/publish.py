"""From a measured checkpoint folder to an entry of the zoo: card, weights where they are small, index, README table.

For maintainers, in a source checkout. Nothing here measures anything.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ..compress.atomic import replaced_folder
from ..compress.checkpoint import MANIFEST, check_files, load_manifest
from ..eval.results import atomic_write_text
from .card import RESULTS, Card
from .hub import CARDS, ZOO, write_index
from .plots import FOLDER, plot_names
from .render import README, write_card
from .tables import render_table

MAX_BYTES = 20_000_000
BEGIN, END = "<!-- zoo table: made by `squeezoo publish`, do not edit -->", "<!-- end of zoo table -->"


class PublishError(ValueError):
    """A folder that cannot become an entry of the zoo."""


def publish(folder: str | Path, zoo: str | Path = ZOO) -> Path:
    """Copy a card with its plots, and the checkpoint when the card says ``included``, into ``zoo/cards/<name>``; renew
    the index.

    Raises:
        PublishError: weights too large for the repository, or a card that does not belong to the checkpoint.
        CheckpointError: damaged files. ValueError, OSError: no valid results.json.
    """
    folder, zoo = Path(folder), Path(zoo)
    card = Card.load(folder)
    names = [RESULTS]
    if card.weights == "included":
        manifest = load_manifest(folder)
        check_files(folder, manifest)
        if manifest.name != card.name:
            raise PublishError(f"{folder}: the card is {card.name}, the checkpoint {manifest.name}")
        names += [MANIFEST, *manifest.files]
        total = sum((folder / name).stat().st_size for name in names)
        if total > MAX_BYTES:
            raise PublishError(
                f"{card.name} has {total:,} bytes, the repository takes {MAX_BYTES:,} an entry: make the card without "
                "--included; its commands then say how to make the weights"
            )
    target = zoo / CARDS / card.name
    with replaced_folder(target) as fresh:
        for name in [*names, *(f"{FOLDER}/{plot}" for plot in plot_names(folder))]:
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, fresh / name)
        write_card(card, fresh)
    write_index(zoo)
    return target


def update_table(readme: str | Path = ZOO.parent / README, zoo: str | Path = ZOO) -> None:
    """Put the table of all cards between the two markers of a Markdown file.

    Raises:
        PublishError: the markers are not there.
    """
    path = Path(readme)
    text = path.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise PublishError(f"{path} lacks the lines {BEGIN!r} and {END!r}, between which the table goes")
    atomic_write_text(path, f"{head}{BEGIN}\n{zoo_table(zoo)}\n{END}{tail}")


def zoo_table(zoo: str | Path = ZOO) -> str:
    """The Markdown table of all cards of a zoo."""
    return render_table(Card.load(path.parent) for path in sorted((Path(zoo) / CARDS).glob(f"*/{RESULTS}")))
