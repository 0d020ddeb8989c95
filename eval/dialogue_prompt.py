"""What a model reads before a reply: the persona, the turns so far, and whose turn it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .dialogue_files import PERSONA, YOU
from .generate import continuation_ids, prompt_ids, require_tokenizer, with_target
from .task import Feature, Row


@dataclass(frozen=True)
class Prompt:
    """Token ids before a reply, and those of every candidate, the right one first."""

    ids: list[int]
    targets: tuple[list[int], ...]


def prompt_text(row: Row, place: int, left_out: int = 0) -> str:
    """The lines before reply number ``place`` of a dialogue, without its first ``left_out`` turns."""
    turns = row["turns"][left_out : row["replies"][place]]
    lines = [f"{PERSONA} {sentence}" for sentence in row["persona"]] + [f"{who}: {text}" for who, text in turns]
    return "\n".join([*lines, f"{YOU}:"])


def prompts(
    items: Sequence[tuple[Row, int]],
    processor: Any,
    max_length: int,
    *,
    encoder_decoder: bool,
    limit: int | None,
    max_target: int,
    candidates: bool = True,
) -> list[Prompt]:
    """Prompts of at most ``max_length`` tokens, which lose their oldest turns first and then their first tokens.

    Args:
        items: a dialogue and the number of its reply.
        limit: positions of the model; of a decoder the prompt leaves those for its longest candidate and for
            ``max_target`` tokens.
        candidates: False takes the right reply alone, as training does.

    Raises:
        ValueError: no tokenizer, no end token, or no positions left for a prompt.
    """
    require_tokenizer(processor)
    found = []
    for row, place in items:
        texts = (row["turns"][row["replies"][place]][1], *(row["distractors"][place] if candidates else ()))
        targets = tuple(_target_ids(texts, processor, encoder_decoder))
        longest = max(max_target, *(len(target) for target in targets))
        room = max_length if limit is None else min(max_length, limit if encoder_decoder else limit - longest)
        if room < 1 or (limit is not None and longest > limit):
            raise ValueError(
                f"the model has {limit} positions and a reply of dialogue {row['id']} needs {longest}, which leaves "
                f"{room} for the dialogue: expected at least 1"
            )
        found.append(Prompt(_fitting(row, place, processor, room, encoder_decoder), targets))
    return found


def encode_for_decoder(rows: Sequence[Row], processor: Any, max_length: int) -> list[Feature]:
    """Training sequences of one reply each, at most ``max_length`` tokens; ``labels`` of the reply only."""
    features = []
    for row in rows:
        for place in range(len(row["replies"])):
            (target,) = _target_ids([row["turns"][row["replies"][place]][1]], processor, encoder_decoder=False)
            prompt = _fitting(row, place, processor, max(max_length - len(target), 1), encoder_decoder=False)
            features.append(with_target(prompt, target, max_length))
    return features


def encode_for_encoder_decoder(rows: Sequence[Row], processor: Any, max_length: int) -> list[Feature]:
    """Training pairs of one reply each: ``input_ids`` of what was said before, ``labels`` of the reply."""
    features: list[Feature] = []
    for row in rows:
        for place in range(len(row["replies"])):
            (target,) = _target_ids([row["turns"][row["replies"][place]][1]], processor, encoder_decoder=True)
            ids = _fitting(row, place, processor, max_length, encoder_decoder=True)
            features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": target[:max_length]})
    return features


def _target_ids(texts: Sequence[str], processor: Any, encoder_decoder: bool) -> Iterator[list[int]]:
    if encoder_decoder:
        yield from processor(text_target=list(texts))["input_ids"]
    else:
        yield from (continuation_ids(f" {text}", processor) for text in texts)


def _fitting(row: Row, place: int, processor: Any, room: int, encoder_decoder: bool) -> list[int]:
    """The prompt's ids with as many of the last turns as fit."""
    ids: list[int] = []
    for left_out in range(row["replies"][place] + 1):
        text = prompt_text(row, place, left_out)
        ids = processor(text)["input_ids"] if encoder_decoder else prompt_ids([text], processor)[0]
        if len(ids) <= room:
            return ids
    return ids[-room:]
