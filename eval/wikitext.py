"""The text of WikiText-2 and WikiText-103 (Merity et al. 2016), as pages.

Folder layout, each file plain or ``.xz``: ``DIR/wikitext-2-raw/wiki.{train,valid,test}.raw`` (the raw version) or else
``DIR/wikitext-2/wiki.{train,valid,test}.tokens`` (rare words are ``<unk>``); likewise ``wikitext-103``. Which of the
two was read is the setting ``text`` of every score (``raw`` or ``unk``): numbers on them cannot be compared. On the
Hub: ``EleutherAI/wikitext_document_level``, raw.

A page begins at a line `` = Title = `` with one equals sign on each side, as in that dataset. The rule is blind to
meaning: the test split has 60 articles (Merity et al. 2016, table 1) and 62 pages, because two formulas in the article
"Constant k filter" look like titles.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from . import files
from .task import Row, nearest

HUB = "EleutherAI/wikitext_document_level"
HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


@dataclass(frozen=True)
class Wikitext:
    """One of the two corpora: ``size`` is 2 or 103."""

    size: int

    def rows(self, split: str, data_dir: str | Path | None = None) -> list[Row]:
        """``[{"page": str, "settings": {"text": "raw" or "unk"}}]``, which joined by line feeds are the file.

        Raises:
            ValueError: unknown split. DataError: not found, not UTF-8, no page in it, or text before the first title.
        """
        if split not in HUB_SPLITS:
            raise ValueError(f"wikitext{self.size}: " + nearest("split", split, HUB_SPLITS))
        folder = files.resolve_data_dir(data_dir)
        if folder is None:
            what = f"wikitext{self.size}"
            table = files.load_from_hub(what, HUB, f"wikitext-{self.size}-raw-v1", HUB_SPLITS[split])
            return [{"page": row["page"], "settings": {"text": "raw"}} for row in table]
        stem = f"wikitext-{self.size}"
        raw, unk = f"{stem}-raw/wiki.{split}.raw", f"{stem}/wiki.{split}.tokens"
        path = files.find_file(f"wikitext{self.size}, split {split},", folder, (raw, unk))
        text = files.read_text(path)
        pages = split_pages(text)
        if not pages:
            raise files.DataError(f"{path}:1: expected articles that begin with a line ' = Title = ', found none")
        first = pages[0].split("\n", 1)[0]
        if not is_title(first):  # text before the first title, or no title at all: another kind of file
            line = 1 + next(number for number, one in enumerate(text.split("\n")) if one.strip())
            raise files.DataError(
                f"{path}:{line}: expected articles that begin with a line ' = Title = ', found text before any title: "
                f"{text.split(chr(10))[line - 1].strip()[:60]!r}"
            )
        version = "raw" if path.name.removesuffix(".xz").endswith(".raw") else "unk"
        return [{"page": page, "settings": {"text": version}} for page in pages]


def is_title(line: str) -> bool:
    """Whether a line begins a page: one equals sign on each side, as in `HUB`."""
    bare = line.replace("= = =", "===").replace("= =", "==").strip()
    return bare.startswith("= ") and bare.endswith(" =")


def split_pages(text: str) -> list[str]:
    """The pages of a WikiText file; what stands before the first title is left out where it is blank."""
    pages: list[str] = []
    lines: list[str] = []
    for line in text.split("\n"):
        if is_title(line):
            pages.append("\n".join(lines))
            lines = []
        lines.append(line)
    pages.append("\n".join(lines))
    return [page for page in pages if page.strip()]


# What the WikiText files spell apart, and how lm-evaluation-harness puts it together before it asks the model, in this
# order. Its second rule wants slashes around it and so never applies to ordinary text; it is part of the protocol.
_JOINED: tuple[tuple[str | re.Pattern[str], str], ...] = (
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), "/'[0-9]/"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    *(
        (re.compile(rf"{left}\s*([^{right}]*?)\s*{right}"), rf"{plain}\1{end}")
        for left, right, plain, end in (
            (r"\(", r"\)", "(", ")"), (r"\[", r"\]", "[", "]"), ("{", "}", "{", "}"), ('"', '"', '"', '"'),
            ("'", "'", "'", "'"),
        )
    ),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)  # fmt: skip


def detokenize(page: str) -> str:
    """The page as ordinary text, by the rules of lm-evaluation-harness's task ``wikitext`` (version 2)."""
    for pattern, joined in _JOINED:
        page = page.replace(pattern, joined) if isinstance(pattern, str) else pattern.sub(joined, page)
    return page


def count_words(page: str) -> int:
    """Pieces between white space, the empty ones at both ends included, as lm-evaluation-harness counts."""
    return len(re.split(r"\s+", page))
