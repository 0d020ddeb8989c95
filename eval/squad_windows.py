"""Question and text as windows of a model's length, and the answer read from the scores of all windows of a question.

After the code of Devlin et al. 2019 (BERT), with the fast tokenizers' meaning of the stride: the number of tokens that
two neighbouring windows share. (In that code it is the step from one window to the next.)

Legend: L tokens of a window, K best starts or ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .task import Feature, Row

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .runner import Runner

STRIDE = 128
_CHUNK = 512  # rows tokenized at a time: their encodings take far more memory than the token ids


@dataclass(frozen=True)
class Span:
    """The best answer to a question.

    Args:
        text: never empty but for spaces.
        score: sum of the logits of its start and its end.
        null_margin: score of no answer (the lowest over the windows) minus ``score``.
    """

    text: str
    score: float
    null_margin: float


def encode_windows(rows: Sequence[Row], processor: Any, max_length: int) -> list[Feature]:
    """`answer_windows` with the usual stride: question and text without the place of the answer."""
    return answer_windows(rows, processor, max_length, STRIDE)


def answer_windows(rows: Sequence[Row], processor: Any, max_length: int, stride: int) -> list[Feature]:
    """The windows of all questions, one after the other.

    Args:
        rows: with ``question`` and ``context``.
        processor: a fast tokenizer (one that knows the characters of each token).
        max_length: tokens of a window: question, special tokens and text.
        stride: tokens of the text that neighbouring windows share.

    Returns:
        ``input_ids``, ``attention_mask``, ``token_type_ids`` where the tokenizer makes them, all unpadded, and
        ``_row`` (index in ``rows``), ``_first`` (position of the first token of the text), ``_offsets`` int32
        [tokens of the text, 2] (their characters), ``_null`` (position of the token that stands for no answer).

    Raises:
        ValueError: a tokenizer without offsets, or a question that leaves no more than ``stride`` tokens for the text.
    """
    return list(_windows(rows, processor, max_length, stride))


def train_windows(rows: Sequence[Row], processor: Any, max_length: int, stride: int = STRIDE) -> list[Feature]:
    """Windows with ``start_positions`` and ``end_positions``: of the first answer, both of the token of no answer where
    the window does not hold the whole of it or the question has none. Arguments and errors as `answer_windows`."""
    features: list[Feature] = []
    for window in _windows(rows, processor, max_length, stride):
        row = rows[window["_row"]]
        start, end = window["_null"], window["_null"]
        if row["answers"]:
            begin = row["answer_starts"][0]
            found = token_span(window["_offsets"], begin, begin + len(row["answers"][0]))
            if found is not None:
                start, end = (window["_first"] + token for token in found)
        inputs = {name: value for name, value in window.items() if not name.startswith("_")}
        features.append({**inputs, "start_positions": start, "end_positions": end})
    return features


def token_span(offsets_L2: np.ndarray, begin: int, end: int) -> tuple[int, int] | None:
    """First and last token of the characters ``begin`` to ``end``; None where the tokens do not hold all of them."""
    if not len(offsets_L2) or begin < offsets_L2[0, 0] or end > offsets_L2[-1, 1]:
        return None
    first = int(np.searchsorted(offsets_L2[:, 0], begin, side="right")) - 1
    last = int(np.searchsorted(offsets_L2[:, 1], end, side="left"))
    return (first, last) if first <= last else None


def read_spans(runner: Runner, rows: Sequence[Row], windows: Sequence[Feature]) -> list[Span]:
    """Run the model over the windows and take the best span of each question.

    In each window the ``n_best`` best starts and ends within the text are paired; an answer has at most
    ``max_answer_length`` tokens (both from ``runner.settings``).

    Raises:
        ValueError: scores that are not finite.
    """
    from ..models.call import TARGETS, logits

    def scores(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
        return list(logits(model, batch).float().cpu().numpy())

    n_best, longest = int(runner.settings["n_best"]), int(runner.settings["max_answer_length"])
    if n_best < 1 or longest < 1:
        raise ValueError(f"n_best and max_answer_length must be at least 1, found {n_best} and {longest}")
    best: dict[int, tuple[float, int, int]] = {}
    null: dict[int, float] = {}
    for window, found_L2 in zip(windows, runner.map(windows, scores, drop=TARGETS), strict=True):
        row, first, offsets_L2 = window["_row"], window["_first"], window["_offsets"]
        scores_L2 = found_L2[first : first + len(offsets_L2)].astype(np.float64)
        nothing = float(found_L2[window["_null"]].astype(np.float64).sum())
        if not (np.isfinite(scores_L2).all() and np.isfinite(nothing)):
            raise ValueError(f"the model gives NaN or infinite logits for question {rows[row]['id']}")
        null[row] = min(null.get(row, nothing), nothing)
        score, start, end = best_span(scores_L2, n_best, longest)
        if row not in best or score > best[row][0]:
            best[row] = score, int(offsets_L2[start, 0]), int(offsets_L2[end, 1])
    spans = []
    for index, row in enumerate(rows):
        score, begin, end = best.get(index, (0.0, 0, 0))  # a text without a single token has no window
        spans.append(Span(row["context"][begin:end], score, null.get(index, 0.0) - score))
    return spans


def best_span(scores_L2: np.ndarray, n_best: int, longest: int) -> tuple[float, int, int]:
    """Score, first and last token of the best span: the highest sum of the logits of start and end.

    Only the ``n_best`` best starts and ends are paired; of equal sums the first start and then the first end wins.
    Where no pair is a span (all ends lie before all starts), all tokens are paired.
    """
    for count in (n_best, len(scores_L2)):
        order_L2 = np.argsort(-scores_L2, axis=0, kind="stable")[:count]
        starts_K, ends_K = np.sort(order_L2, axis=0).T
        length_KK = ends_K[None, :] - starts_K[:, None] + 1
        sum_KK = scores_L2[starts_K, 0][:, None] + scores_L2[ends_K, 1][None, :]
        sum_KK = np.where((length_KK >= 1) & (length_KK <= longest), sum_KK, -np.inf)
        start, end = np.unravel_index(int(sum_KK.argmax()), sum_KK.shape)
        if np.isfinite(sum_KK[start, end]):
            break
    return float(sum_KK[start, end]), int(starts_K[start]), int(ends_K[end])


def _windows(rows: Sequence[Row], processor: Any, max_length: int, stride: int) -> Iterator[dict[str, Any]]:
    if not getattr(processor, "is_fast", False):
        raise ValueError(
            f"question answering needs a fast tokenizer, which knows the characters of its tokens, got "
            f"{type(processor).__name__}: save one in the model's folder (tokenizer.save_pretrained)"
        )
    if stride < 0:
        raise ValueError(f"stride must be at least 0, found {stride}")
    length = min(max_length, processor.model_max_length)
    special = processor.num_special_tokens_to_add(pair=True)
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        questions = [row["question"] for row in chunk]
        # asked first: the tokenizer does not survive it
        for row, ids in zip(chunk, processor(questions, add_special_tokens=False)["input_ids"], strict=True):
            if length - special - len(ids) <= stride:
                raise ValueError(
                    f"question {row['id']} has {len(ids)} tokens, which leaves {length - special - len(ids)} of "
                    f"{length} for the text: expected more than the stride, {stride}. Give a larger max_length or a "
                    "smaller stride"
                )
        encoded = processor(
            questions, [row["context"] for row in chunk], truncation="only_second", max_length=length, stride=stride,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded]
        for index, inside in enumerate(encoded["overflow_to_sample_mapping"]):
            of_text = np.flatnonzero(np.array(encoded.sequence_ids(index), dtype=object) == 1)
            if not len(of_text):
                continue  # a text without a single token
            first, last = int(of_text[0]), int(of_text[-1])
            ids = encoded["input_ids"][index]
            anchor = processor.cls_token_id if processor.cls_token_id is not None else processor.bos_token_id
            yield {
                **{name: encoded[name][index] for name in names},
                "_row": start + inside,
                "_first": first,
                "_offsets": np.array(encoded["offset_mapping"][index][first : last + 1], dtype=np.int32),
                "_null": ids.index(anchor) if anchor in ids else 0,
            }
