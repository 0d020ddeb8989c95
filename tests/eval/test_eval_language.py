"""Perplexities and blocks: against sums by hand, against lm-evaluation-harness's protocol written out here, and the
official counts of the real files."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from squeezoo.eval import files, get_task
from squeezoo.eval.blocks import Blocks, token_masker
from squeezoo.eval.data import collate, collator
from squeezoo.eval.perplexity import context_length, disjoint_windows, perplexity, rolling_windows, sliding_windows
from squeezoo.eval.run import evaluate
from squeezoo.eval.wikitext import count_words, detokenize, split_pages
from squeezoo.models.dense import logits
from squeezoo.pipeline import training_data
from texts import SPECIAL, WORDS
from tiny import ALL
from torch import nn

PAGES = (
    " \n = Alpha = \n \n a b c d @-@ e f , g ( h i ) . \n \n = = Part = = \n \n j k l \n"
    ' = Beta = \n \n m n " o p " q \'s r s t u v w x y z a b c d e f g h i j k l m n o p q r s t u v w x y z . \n \n'
)


def _tokenizer(*, masked: bool = False, beginning: bool = False) -> Any:
    """[PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, letters from 4, [MASK] 30; with [CLS] ... [SEP] around a text, with [CLS]
    before it, as the tokenizers of OPT and Llama have their beginning token, or without."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *WORDS, "[MASK]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if masked:
        special = [("[CLS]", 2), ("[SEP]", 3)]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    if beginning:
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]",
        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def _folder(tmp_path: Path, split: str = "test", text: str = PAGES) -> Path:
    (tmp_path / "wikitext-2").mkdir(exist_ok=True)
    (tmp_path / "wikitext-2" / f"wiki.{split}.tokens").write_text(text, encoding="utf-8")
    return tmp_path


def _log_probabilities(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """ln P of each token but the first, from one forward pass over exactly these tokens."""
    with torch.no_grad():
        scores_LV = logits(model, {"input_ids": torch.tensor([ids])})[0].double().log_softmax(-1)
    return scores_LV[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_pages_begin_at_titles() -> None:
    """By hand: headings of sections (two equals signs) do not begin a page, the blank first line belongs to none."""
    first, second = split_pages(PAGES)
    assert first.startswith(" = Alpha = \n")
    assert first.endswith(" j k l ")
    assert second.startswith(" = Beta = ")
    assert " \n" + first + "\n" + second == PAGES


def test_detokenized_as_lm_evaluation_harness_does() -> None:
    """Each pair by hand from the rules of lm-evaluation-harness's ``preprocess_wikitext.py``."""
    for page, expected in (
        ("a @-@ b 3 @,@ 000 1 @.@ 5", "a-b 3,000 1.5"),
        ("x , y . z ; w : v ! u ? t", "x, y. z; w: v! u? t"),
        ("( a b ) [ c ] { d }", "(a b) [c] {d}"),
        ('he said " yes " twice', 'he said "yes" twice'),
        ("James ' dog", "James' dog"),
        ("the dog 's bone", "the dog's bone"),
        (" = = Part = = \n x \n y", " == Part ==\nx\ny"),
        ("20 ° C", "20°C"),
        (" N people", " 1 people"),
    ):
        assert detokenize(page) == expected


def test_words_are_counted_with_the_empty_pieces() -> None:
    """re.split(r"\\s+", " a b ") is ["", "a", "b", ""], as the harness counts."""
    assert count_words(" a b ") == 4


def test_disjoint_windows() -> None:
    """By hand: 7 tokens in windows of 3; the last has one token and nothing to score."""
    windows = disjoint_windows([1, 2, 3, 4, 5, 6, 7], 3)
    assert [(w["input_ids"], w["labels"]) for w in windows] == [([1, 2], [2, 3]), ([4, 5], [5, 6])]


def test_rolling_windows() -> None:
    """By hand, after lm-evaluation-harness's ``get_rolling_token_windows`` and ``make_disjoint_window``: 8 tokens,
    windows of 3, prefix 0; the last window is filled up with context."""
    windows = rolling_windows([1, 2, 3, 4, 5, 6, 7, 8], 3, 0)
    assert [(w["input_ids"], w["labels"]) for w in windows] == [
        ([0, 1, 2], [1, 2, 3]),
        ([3, 4, 5], [4, 5, 6]),
        ([5, 6, 7], [-100, 7, 8]),
    ]
    assert rolling_windows([], 3, 0) == []


@given(st.integers(0, 60), st.integers(2, 12), st.data())
def test_every_token_is_scored_once_in_its_place(length: int, window: int, data: Any) -> None:
    """The definition of the three schemes: which tokens are scored, how long windows are, that labels follow inputs."""
    tokens = list(range(1, length + 1))
    stride = data.draw(st.integers(1, window - 1))
    schemes = {
        "disjoint": (disjoint_windows(tokens, window), [t for i, t in enumerate(tokens) if i % window]),
        "sliding": (sliding_windows(tokens, window, stride), tokens[1:]),
        "rolling": (rolling_windows(tokens, window, 0), tokens),
    }
    for name, (windows, expected) in schemes.items():
        scored = [label for w in windows for label in w["labels"] if label != -100]
        assert scored == expected, name
        for w in windows:
            assert len(w["input_ids"]) == len(w["labels"]) == len(w["attention_mask"]) <= window
            assert all(b in (-100, a + 1) for a, b in zip(w["input_ids"], w["labels"], strict=True))
    for w in schemes["sliding"][0][1:]:
        assert w["labels"].count(-100) >= window - stride - 1


@pytest.mark.parametrize("batch_size", [1, 5])
def test_token_perplexity(tmp_path: Path, batch_size: int) -> None:
    """Reference: one forward pass per window of 16 of the joined pages, by hand; the tiny GPT-2 reads 64 tokens."""
    model, tokenizer = ALL["gpt2"](), _tokenizer()
    rows = get_task("wikitext2/token").rows("test", _folder(tmp_path))
    ids = tokenizer("\n".join(row["page"] for row in rows))["input_ids"]
    assert len(ids) > 48
    parts = [_log_probabilities(model, ids[start : start + 16]) for start in range(0, len(ids), 16)]
    scored = torch.cat([part for part in parts if len(part)])
    (score,) = evaluate(
        model, "wikitext2/token", tokenizer, data_dir=tmp_path, batch_size=batch_size, settings={"window": 16}
    )
    assert score.value == pytest.approx(math.exp(-scored.mean()), rel=1e-5)
    assert (score.metric, score.higher_is_better, score.samples, score.complete) == ("perplexity", False, 2, False)
    assert score.settings == {"window": 16, "text": "unk"}


def test_sliding_perplexity(tmp_path: Path) -> None:
    """Reference: the loop of transformers' documentation, "Perplexity of fixed-length models", means over tokens."""
    model, tokenizer = ALL["opt"](), _tokenizer()
    rows = get_task("wikitext2/sliding").rows("test", _folder(tmp_path))
    ids = tokenizer("\n".join(row["page"] for row in rows))["input_ids"]
    found, before = [], 0
    for begin in range(0, len(ids), 4):
        end = min(begin + 12, len(ids))
        found.append(_log_probabilities(model, ids[begin:end])[-(end - before) :])
        before = end
        if end == len(ids):
            break
    (score,) = evaluate(
        model, "wikitext2/sliding", tokenizer, data_dir=tmp_path, settings={"window": 12, "stride": 4}, batch_size=3
    )
    assert score.value == pytest.approx(math.exp(-torch.cat(found).mean()), rel=1e-5)
    assert score.settings == {"window": 12, "stride": 4, "text": "unk"}


def _harness(model: nn.Module, tokenizer: Any, pages: list[str], window: int) -> dict[str, float]:
    """lm-evaluation-harness's ``loglikelihood_rolling`` and the metrics of its task, from their description: one token
    after another, each with the context that its window has."""
    total = 0.0
    for page in pages:
        ids = tokenizer(detokenize(page))["input_ids"]
        for i in range(len(ids)):
            first = i // window * window  # of the window that scores token i
            context = [tokenizer.bos_token_id, *ids[:i]] if first == 0 else ids[first - 1 : i]
            if first and first + window > len(ids):
                context = ids[len(ids) - window - 1 : i]
            with torch.no_grad():
                scores_V = logits(model, {"input_ids": torch.tensor([context])})[0, -1].double()
            total += float(scores_V.log_softmax(-1)[ids[i]])
    words, size = sum(len(re.split(r"\s+", p)) for p in pages), sum(len(p.encode()) for p in pages)
    return {
        "word_perplexity": math.exp(-total / words),
        "byte_perplexity": math.exp(-total / size),
        "bits_per_byte": -total / size / math.log(2),
    }


@pytest.mark.parametrize("window", [10, 0])
def test_word_perplexity_is_that_of_lm_evaluation_harness(tmp_path: Path, window: int) -> None:
    """Against its documented algorithm above. Against the program itself (0.4.13) on the 62 test pages with a random
    Llama: 23280217.3e6 where it gives 23280217.8e6."""
    model, tokenizer = ALL["llama"](), _tokenizer()
    folder = _folder(tmp_path)
    pages = [row["page"] for row in get_task("wikitext2/word").rows("test", folder)]
    expected = _harness(model, tokenizer, pages, window or 64)
    scores = evaluate(model, "wikitext2/word", tokenizer, data_dir=folder, settings={"window": window}, batch_size=2)
    assert [score.metric for score in scores] == list(expected)
    for score in scores:
        assert score.value == pytest.approx(expected[score.metric], rel=1e-5)
        assert score.settings == {"window": window or 64, "text": "unk"}
        assert not score.higher_is_better


@pytest.mark.parametrize("window", [10, 0])
def test_a_beginning_token_stands_once_before_each_page(tmp_path: Path, window: int) -> None:
    """The same words score alike whether or not the tokenizer adds its beginning token by itself: one is context of
    each page, none is scored. With two, lm-evaluation-harness's issue 3333, the value would be another."""
    model, folder = ALL["opt"](), _folder(tmp_path)
    pages = [row["page"] for row in get_task("wikitext2/word").rows("test", folder)]
    adds, plain = _tokenizer(beginning=True), _tokenizer()
    assert adds("a b")["input_ids"] == [2, *plain("a b")["input_ids"]]
    expected = _harness(model, plain, pages, window or 64)
    for tokenizer in (adds, plain):
        found = evaluate(model, "wikitext2/word", tokenizer, data_dir=folder, settings={"window": window})
        assert {s.metric: s.value for s in found} == pytest.approx(expected, rel=1e-5)
        assert {s.task_version for s in found} == {2}
    twice = _harness(model, adds, pages, window or 64)
    assert abs(twice["word_perplexity"] / expected["word_perplexity"] - 1) > 1e-3


def test_a_beginning_token_is_never_scored_per_token(tmp_path: Path) -> None:
    """One before the whole text, the first token of the first window, whose first token no protocol scores: by hand,
    from the model's own probabilities of each window."""
    model, tokenizer, folder = ALL["opt"](), _tokenizer(beginning=True), _folder(tmp_path)
    rows = get_task("wikitext2/token").rows("test", folder)
    ids = [2, *_tokenizer()("\n".join(row["page"] for row in rows))["input_ids"]]
    assert ids.count(2) == 1
    parts = [_log_probabilities(model, ids[start : start + 16]) for start in range(0, len(ids), 16)]
    (score,) = evaluate(model, "wikitext2/token", tokenizer, data_dir=folder, settings={"window": 16})
    assert score.value == pytest.approx(math.exp(-torch.cat([p for p in parts if len(p)]).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("text", "line"), [("plain text\n of no article \n", 1), (" \n \n a first line \n = Title = \n b \n", 3)]
)
def test_text_before_any_title_is_another_kind_of_file(tmp_path: Path, text: str, line: int) -> None:
    message = rf"wiki\.test\.tokens:{line}: expected articles that begin with a line ' = Title = ', found text"
    with pytest.raises(files.DataError, match=message):
        get_task("wikitext2/token").rows("test", _folder(tmp_path, text=text))


def test_raw_text_is_preferred_and_recorded(tmp_path: Path) -> None:
    """Both versions there: the raw one is read, and the score says so."""
    folder = _folder(tmp_path)
    (folder / "wikitext-2-raw").mkdir()
    (folder / "wikitext-2-raw" / "wiki.test.raw").write_text(" = Raw = \n \n a b c d \n", encoding="utf-8")
    (score,) = evaluate(ALL["gpt2"](), "wikitext2/token", _tokenizer(), data_dir=folder)
    assert (score.samples, score.settings["text"], score.settings["window"]) == (1, "raw", 64)


def test_refusals(tmp_path: Path) -> None:
    """No perplexity of a masked model; windows out of range; unknown settings; a file without text."""
    folder, tokenizer = _folder(tmp_path), _tokenizer()
    with pytest.raises(ValueError, match="BertForMaskedLM reads in both directions and has no perplexity"):
        evaluate(ALL["bert_mlm"](), "wikitext2/word", tokenizer, data_dir=folder)
    with pytest.raises(ValueError, match="needs a model of kind 'causal-lm', BertForSequenceClassification is of kind"):
        evaluate(ALL["bert"](), "wikitext2/token", tokenizer, data_dir=folder)
    gpt2 = ALL["gpt2"]()
    with pytest.raises(ValueError, match=r"window must be 0 .* or 2 to 64, the context of GPT2LMHeadModel; found 65"):
        evaluate(gpt2, "wikitext2/token", tokenizer, data_dir=folder, settings={"window": 65})
    with pytest.raises(ValueError, match="stride must be 1 to 63"):
        evaluate(gpt2, "wikitext2/sliding", tokenizer, data_dir=folder, settings={"stride": 64})
    with pytest.raises(ValueError, match=r"unknown setting 'windows'.*did you mean 'window'"):
        evaluate(gpt2, "wikitext2/token", tokenizer, data_dir=folder, settings={"windows": 8})
    with pytest.raises(ValueError, match="setting window is a int, found 'x'"):
        evaluate(gpt2, "wikitext2/token", tokenizer, data_dir=folder, settings={"window": "x"})
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        evaluate(gpt2, "wikitext2/token", None, data_dir=folder)
    with pytest.raises(files.DataError, match=r"wiki\.valid\.tokens:1: expected articles"):
        get_task("wikitext2/token").rows("valid", _folder(tmp_path, "valid", " \n \n"))
    with pytest.raises(ValueError, match="no token was scored"):
        perplexity(0.0, 0)


def test_context_is_that_of_the_config() -> None:
    """GPT-2 calls it n_positions, Llama max_position_embeddings; both are 64 in tests/tiny.py."""
    assert context_length(ALL["gpt2"]()) == context_length(ALL["llama"]()) == 64


def test_causal_blocks_for_training(tmp_path: Path) -> None:
    """Blocks of 8 hold the tokens of the pages in order; the rest is left out; labels are the tokens themselves."""
    tokenizer = _tokenizer()
    data = training_data(
        "wikitext2/token", tokenizer, data_dir=_folder(tmp_path, "train"), max_length=8, model=ALL["gpt2"]()
    )
    text = "".join(page + "\n" for page in split_pages(PAGES))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(data.features) == len(ids) // 8
    assert [token for feature in data.features for token in feature["input_ids"]] == ids[: len(data.features) * 8]
    batch = data.collate(list(data.features))
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert data.augment is None
    assert data.lengths() == [8] * len(data.features)
    clipped = training_data("wikitext2/token", tokenizer, data_dir=tmp_path, model=ALL["gpt2"](), limit=2)
    assert clipped.lengths()[0] == 64  # the paper's 1,024 is more than this model reads
    with pytest.raises(ValueError, match="fills a block of 900 tokens"):
        training_data("wikitext2/token", tokenizer, data_dir=tmp_path, max_length=900)
    with pytest.raises(IndexError):
        Blocks(torch.arange(9, dtype=torch.int32).numpy(), 4)[2]


def test_masked_training_data_is_a_function_of_the_generator(tmp_path: Path) -> None:
    """Blocks in [CLS] and [SEP]; the same generator state gives the same masks, so a resumed run sees them again."""
    tokenizer = _tokenizer(masked=True)
    data = training_data(
        "wikitext2/masked", tokenizer, data_dir=_folder(tmp_path, "train"), max_length=16, model=ALL["bert_mlm"]()
    )
    assert all(f["input_ids"][0] == 2 and f["input_ids"][-1] == 3 and "labels" not in f for f in data.features)
    batch = data.collate(list(data.features))
    assert data.augment is not None
    first, again, other = (data.augment(batch, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert torch.equal(first["labels"], again["labels"])
    assert not torch.equal(first["labels"], other["labels"])
    hidden = first["labels"] != -100
    assert torch.equal(first["labels"][hidden], batch["input_ids"][hidden])
    assert torch.equal(first["input_ids"][~hidden], batch["input_ids"][~hidden])


def test_masking_rates() -> None:
    """Devlin et al. 2019, section 3.1: 15 % chosen, of these 80 % mask token, 10 % random, 10 % kept; special tokens
    never. 60,000 tokens: each share within five standard deviations."""
    tokenizer = _tokenizer(masked=True)
    ids = torch.randint(4, 30, (300, 200), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = 2, 3
    masked = token_masker(tokenizer)({"input_ids": ids}, torch.Generator().manual_seed(1))
    chosen = masked["labels"] != -100
    count = int(chosen.sum())
    total = 300 * 198
    assert not chosen[:, [0, -1]].any()
    assert abs(count - 0.15 * total) < 5 * math.sqrt(total * 0.15 * 0.85)
    now, was = masked["input_ids"][chosen], ids[chosen]
    shares = Counter(
        "mask" if a == tokenizer.mask_token_id else "kept" if a == b else "random"
        for a, b in zip(now.tolist(), was.tolist(), strict=True)
    )
    # a random token is the same or the mask token in 2 of 31 draws
    expected = {"mask": 0.8 + 0.1 / 31, "kept": 0.1 + 0.1 / 31, "random": 0.1 - 0.2 / 31}
    for name, share in expected.items():
        assert abs(shares[name] - share * count) < 5 * math.sqrt(count * share * (1 - share)), name
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="mask token"):
        token_masker(tokenizer)


def test_masked_score(tmp_path: Path) -> None:
    """Reference: the masked blocks one by one through the model, counted by hand; equal at every batch size."""
    model, tokenizer = ALL["bert_mlm"](), _tokenizer(masked=True)
    folder, task = _folder(tmp_path), get_task("wikitext2/masked")
    accuracy, loss = evaluate(model, task, tokenizer, data_dir=folder, settings={"window": 16})
    assert (accuracy.metric, loss.metric) == ("masked_accuracy", "masked_loss")
    assert accuracy.higher_is_better
    assert not loss.higher_is_better
    single = evaluate(model, task, tokenizer, data_dir=folder, settings={"window": 16}, batch_size=1)
    assert single[1].value == pytest.approx(loss.value, rel=1e-5)
    generator, total, right, hidden = torch.Generator().manual_seed(0), 0.0, 0, 0
    for block in task.encode(task.rows("test", folder), tokenizer, 16):
        batch = token_masker(tokenizer)(collate([block]), generator)
        with torch.no_grad():
            scores_LV = logits(model, {"input_ids": batch["input_ids"]})[0]
        for position, label in enumerate(batch["labels"][0].tolist()):
            if label != -100:
                total -= float(scores_LV[position].log_softmax(-1)[label])
                right += int(scores_LV[position].argmax()) == label
                hidden += 1
    assert loss.value == pytest.approx(total / hidden, rel=1e-5)
    assert accuracy.value == right / hidden


def test_collator_pads_labels_with_minus_100() -> None:
    """Labels of tokens, padded where there is no token."""
    batch = collator(_tokenizer(masked=True))(
        [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}]
    )
    assert batch["labels"].tolist() == [[5, 6], [7, -100]]


@pytest.mark.data
def test_real_files(data_dir: Path) -> None:
    """Official token counts, one end of sentence per line (Merity et al. 2016, table 1): 217,646 and 245,569. The
    number of pages by the Hub's rule is 60 and 62."""
    for split, tokens, pages in (("valid", 217_646, 60), ("test", 245_569, 62)):
        task = get_task("wikitext2/word")
        rows = task.rows(split, data_dir)
        assert len(rows) == pages == task.size(split)
        text = "\n".join(row["page"] for row in rows)
        # the first, blank line of the file belongs to no page
        assert len(text.split()) + text.count("\n") + 1 == tokens
        assert {row["settings"]["text"] for row in rows} == {"unk"}
