"""Summaries: ROUGE, the files and the Hub's form, what models read, write and learn; shared: `eval.generate`."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from squeezoo.compress.attach import attach_, fold_, prune_
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.eval import files, get_task
from squeezoo.eval.generate import prompt_ids, search_arguments, source_length, with_target, write_tokens
from squeezoo.eval.run import evaluate
from squeezoo.eval.runner import Runner
from squeezoo.eval.summarize import PROMPT, SummaryFiles, encode_sources, predict, rouge, sentences
from squeezoo.pipeline import training_data
from writing import HEADS, character_tokenizer, learn_, writer

VECTOR = json.loads((Path(__file__).parents[1] / "vectors" / "metrics.json").read_text(encoding="utf-8"))
SETTINGS: dict[str, Any] = {
    "num_beams": 3, "min_target": 6, "max_target": 14, "length_penalty": 2.0, "no_repeat_ngram_size": 3,
    "early_stopping": 1,
}  # fmt: skip
ROWS: list[Any] = [
    {"id": "1", "source": "The cat sat on the mat. It slept.", "target": "A cat slept."},
    {"id": "2", "source": "Rain.", "target": "It rains."},
    {"id": "3", "source": "Dogs bark, cats do not; the longest of all documents here.", "target": "Dogs bark."},
]


def _runner(head: str, batch_size: int = 4, **settings: Any) -> Runner:
    model, tokenizer = writer(head)
    return Runner(model, tokenizer, "cpu", batch_size, 100, {**SETTINGS, **settings})


# the metric


def test_rouge_vector() -> None:
    """Reference vector metrics, google-research rouge_score; its texts have one sentence a line."""
    found = rouge([VECTOR["rouge_prediction"]], [VECTOR["rouge_target"]])
    assert found == pytest.approx({name: VECTOR["rouge"][name]["f"] for name in found}, rel=1e-6)
    assert next(iter(found)) == get_task("xsum").metric


def test_rouge_is_the_mean_over_documents_and_sees_sentences() -> None:
    """By hand: the same two sentences in the other order are all right for LSum, half right for L (longest common
    subsequence 2 of 4 words); another document without a common word halves the means."""
    pair = ("c d. a b.", "a b.\nc d.")
    assert rouge([pair[0]], [pair[1]]) == {
        "rougeLsum": 1.0,
        "rouge1": 1.0,
        "rouge2": pytest.approx(2 / 3),
        "rougeL": 0.5,
    }
    assert rouge([pair[0], "x"], [pair[1], "y"])["rougeLsum"] == 0.5
    assert rouge(["running dogs"], ["runs dog"])["rouge1"] == 1.0  # Porter's stemmer


def test_sentences_by_hand() -> None:
    """A sentence ends at . ! or ? before white space, and at a line break."""
    assert sentences("One. Two!  Three?\n\n Four 3.5 a.m. end") == "One.\nTwo!\nThree?\nFour 3.5 a.m.\nend"
    assert sentences("") == ""


# files


def _write(folder: Path, name: str, rows: list[Any], compress: bool = False) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    path.write_bytes(lzma.compress(text.encode()) if compress else text.encode())
    return path


@pytest.mark.parametrize("compress", [False, True])
def test_official_fields(tmp_path: Path, compress: bool) -> None:
    """Plain or .xz; an empty document is as published (XSum has some), line separators inside texts are kept."""
    suffix = ".xz" if compress else ""
    article = {"id": "a", "article": "Long\u2028text.", "highlights": "One .\nTwo .\n"}
    _write(tmp_path, f"cnn_dailymail/test.jsonl{suffix}", [article], compress)
    _write(tmp_path, f"xsum/test.jsonl{suffix}", [{"id": "b", "document": "", "summary": "S."}], compress)
    assert get_task("cnn_dailymail").rows("test", tmp_path) == [
        {"id": "a", "source": "Long\u2028text.", "target": "One .\nTwo ."}
    ]
    assert get_task("xsum").rows("test", tmp_path) == [{"id": "b", "source": "", "target": "S."}]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"id": "b", "document": "x", "summary": "  "}, "'summary' is empty"),
        ({"id": "b", "document": "x"}, r"expected text under 'summary', found the keys \['document', 'id'\]"),
        ({"id": "b", "document": None, "summary": "x"}, "expected text under 'document'"),
        ("[1]", "expected a JSON object, found list"),
        ('{"id": ', "expected one JSON object"),
    ],
)
def test_broken_rows_are_reported_with_their_line(tmp_path: Path, broken: Any, message: str) -> None:
    """The broken row is line 3; line 2 is empty and skipped."""
    _write(tmp_path, "xsum/validation.jsonl", [{"id": "a", "document": "x", "summary": "y"}, "", broken])
    with pytest.raises(files.DataError, match=rf"validation\.jsonl:3: {message}"):
        get_task("xsum").rows("validation", tmp_path)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    """What was looked for; a file without rows; a split that there is not."""
    with pytest.raises(files.MissingDataError, match=r"xsum, split test,.*xsum/test\.jsonl\.xz"):
        get_task("xsum").rows("test", tmp_path)
    _write(tmp_path, "xsum/test.jsonl", [""])
    with pytest.raises(files.DataError, match="found none"):
        get_task("xsum").rows("test", tmp_path)
    with pytest.raises(ValueError, match="did you mean 'validation'"):
        get_task("xsum").rows("valid", tmp_path)


def test_hub_form_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in the form of EdinburghNLP/xsum, read by the real ``datasets.load_dataset``."""
    import datasets

    (tmp_path / "hub").mkdir()
    row = {"document": "Long text.", "summary": "Short.", "id": "7"}
    datasets.Dataset.from_list([row]).to_parquet(str(tmp_path / "hub" / "test-00000-of-00001.parquet"))
    monkeypatch.delenv("SQUEEZOO_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    reader = SummaryFiles("xsum", "xsum", "document", "summary", str(tmp_path / "hub"), None)
    _write(tmp_path, "xsum/test.jsonl", [row])
    assert reader.rows("test", None) == get_task("xsum").rows("test", tmp_path)


# what models read


def test_decoders_read_the_document_and_the_prompt() -> None:
    """By hand: 12 tokens for everything leave 5 characters beside the 7 of the prompt; never an end token."""
    tokenizer = character_tokenizer(False)
    (feature, short) = encode_sources([ROWS[0], {**ROWS[0], "source": "x"}], tokenizer, 12, prompted=True)
    assert tokenizer.decode(feature["input_ids"]) == f"The c{PROMPT}"
    assert tokenizer.decode(short["input_ids"]) == f"x{PROMPT}"
    closing = character_tokenizer(True)  # adds <s> and </s>
    assert [closing.decode(ids) for ids in prompt_ids(["ab", "abcd"], closing, 3)] == ["<s>ab", "<s>ab"]
    with pytest.raises(ValueError, match="leaves no token"):
        encode_sources(ROWS, tokenizer, 7, prompted=True)


def test_encoder_decoders_read_the_document_alone() -> None:
    """<s> and </s> around it, cut inside."""
    tokenizer = character_tokenizer(True)
    (feature,) = encode_sources(ROWS[:1], tokenizer, 5, prompted=False)
    assert tokenizer.decode(feature["input_ids"]) == "<s>The</s>"


def test_training_features() -> None:
    """Labels are the summary only, in one line and closed; a decoder's document makes room for the rest."""
    rows = [{**ROWS[0], "target": "One .\nTwo ."}]
    task = get_task("cnn_dailymail")
    pair = task.train_encode_by_head["seq2seq-lm"](rows, character_tokenizer(True), 100)[0]
    assert character_tokenizer(True).decode(pair["labels"]) == "<s>One . Two .</s>"
    tokenizer = character_tokenizer(False)
    (feature,) = task.train_encode_by_head["causal-lm"](rows, tokenizer, 24)
    kept = [label for label in feature["labels"] if label != -100]
    assert tokenizer.decode(kept) == " One . Two .</s>"
    assert len(feature["input_ids"]) == len(feature["labels"]) == 24
    assert tokenizer.decode(feature["input_ids"]).endswith(f"{PROMPT} One . Two .</s>")


@pytest.mark.parametrize("head", HEADS)
def test_training_data_is_that_of_the_models_head(tmp_path: Path, head: str) -> None:
    """`squeezoo.pipeline.training_data`: pairs for an encoder-decoder, one text for a decoder, within its positions."""
    _write(tmp_path, "xsum/train.jsonl", [{"document": r["source"], "summary": r["target"]} for r in ROWS])
    model, tokenizer = writer(head, 40)
    data = training_data("xsum", tokenizer, data_dir=tmp_path, model=model)
    together = [len(feature["labels"]) == len(feature["input_ids"]) for feature in data.features]
    assert together == [head == "causal-lm"] * 3
    assert max(len(feature["input_ids"]) for feature in data.features) == 40
    batch = data.collate([data.features[0], data.features[2]])
    assert torch.isfinite(model(**batch).loss)


@given(st.lists(st.integers(4, 9), max_size=8), st.lists(st.integers(4, 9), min_size=1, max_size=8), st.integers(1, 12))
def test_with_target_keeps_the_target_first(prompt: list[int], target: list[int], length: int) -> None:
    """The end of the prompt and the beginning of the target remain; labels are the target's tokens."""
    feature = with_target(prompt, target, length)
    assert len(feature["input_ids"]) == len(feature["labels"]) == min(length, len(prompt) + len(target))
    kept = target[:length]
    assert feature["input_ids"][-len(kept) :] == kept
    assert [label for label in feature["labels"] if label != -100] == kept
    rest = feature["input_ids"][: -len(kept)]
    assert rest == prompt[len(prompt) - len(rest) :]


# what models write


@pytest.mark.parametrize("head", HEADS)
def test_batched_equals_single_whatever_the_order(head: str) -> None:
    """Beam search over documents of different length (decoders: padded on the left)."""
    single = predict(_runner(head, 1), ROWS)
    assert predict(_runner(head, 4), ROWS) == single
    assert predict(_runner(head, 2), ROWS[::-1]) == single[::-1]
    assert len(set(single)) > 1


@pytest.mark.parametrize("head", HEADS)
def test_greedy_equals_a_loop_of_forward_passes(head: str) -> None:
    """One token at a time, the whole sequence again for each, by the model's logits alone."""
    runner = _runner(head, num_beams=1, min_target=0, max_target=9, no_repeat_ngram_size=0)
    model: Any = runner.model
    wanted = []
    for feature in encode_sources(ROWS, runner.processor, 100, prompted=head == "causal-lm"):
        source = torch.tensor([feature["input_ids"]])
        written = torch.tensor([[model.config.decoder_start_token_id]]) if head == "seq2seq-lm" else source
        begun = written.shape[1]
        for _ in range(8 if head == "seq2seq-lm" else 9):
            with torch.no_grad():
                how = (
                    {"input_ids": source, "decoder_input_ids": written}
                    if head == "seq2seq-lm"
                    else {"input_ids": written}
                )
                scores = model(**how).logits[0, -1]
            written = torch.cat([written, scores.argmax()[None, None]], 1)
            if written[0, -1] == model.config.eos_token_id:
                break
        wanted.append(runner.processor.decode(written[0, begun:], skip_special_tokens=True).strip())
    assert predict(runner, ROWS) == wanted


@pytest.mark.parametrize("head", HEADS)
def test_lengths_and_repetitions(head: str) -> None:
    """Without the rule a random model repeats itself; with it no three characters come twice. Lengths count tokens,
    of an encoder-decoder the start token too."""
    prompted = head == "causal-lm"

    def write(**settings: Any) -> list[list[int]]:
        runner = _runner(head, num_beams=1, **settings)
        return write_tokens(runner, encode_sources(ROWS, runner.processor, 400, prompted=prompted))

    def repeats(tokens: list[int]) -> bool:
        triples = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
        return len(set(triples)) < len(triples)

    assert any(map(repeats, write(min_target=40, max_target=40, no_repeat_ngram_size=0)))
    assert not any(map(repeats, write(min_target=40, max_target=40)))
    assert {len(ids) for ids in write(min_target=5, max_target=5)} == {5}


def test_settings_out_of_range_and_missing_positions() -> None:
    """Each says what was expected."""
    with pytest.raises(ValueError, match="num_beams of at least 1"):
        search_arguments({**SETTINGS, "num_beams": 0}, True)
    with pytest.raises(ValueError, match="min_target from 0 to max_target"):
        search_arguments({**SETTINGS, "min_target": 20}, True)
    model, _ = writer("causal-lm", 64)
    assert source_length(model, 1024, 24) == 40
    assert source_length(model, 30, 24) == 30
    with pytest.raises(ValueError, match="64 positions"):
        source_length(model, 1024, 64)
    encoder_decoder, _ = writer("seq2seq-lm", 64)
    assert source_length(encoder_decoder, 1024, 24) == 64
    with pytest.raises(ValueError, match="64 positions"):
        source_length(encoder_decoder, 1024, 65)
    runner = _runner("causal-lm")
    runner.processor = None
    with pytest.raises(ValueError, match="tokenizer"):
        predict(runner, ROWS)


@pytest.mark.parametrize("head", HEADS)
def test_evaluation_records_its_settings(tmp_path: Path, head: str) -> None:
    """Beams, lengths, the source's length that the model allows and the prompt stand in each score."""
    _write(
        tmp_path, "xsum/test.jsonl", [{"id": r["id"], "document": r["source"], "summary": r["target"]} for r in ROWS]
    )
    model, tokenizer = writer(head, 64)
    scores = evaluate(
        model, "xsum", tokenizer, data_dir=tmp_path, progress=False, settings={"max_target": 20, "num_beams": "2"}
    )
    assert [score.metric for score in scores] == ["rougeLsum", "rouge1", "rouge2", "rougeL"]
    assert not scores[0].complete
    assert scores[0].samples == 3
    assert "rouge-score 0." in str(scores[0].settings["rouge"])
    assert {name: value for name, value in scores[0].settings.items() if name != "rouge"} == {
        "max_length": 44 if head == "causal-lm" else 64, "num_beams": 2, "min_target": 11, "max_target": 20,
        "length_penalty": 1.0, "no_repeat_ngram_size": 3, "early_stopping": 1,
        "prompt": "TL;DR:" if head == "causal-lm" else "none",
    }  # fmt: skip


def test_the_papers_settings() -> None:
    """BART in its authors' code: beam 4, lenpen 2, 55 to 140 without start and end token; XSum: beam 6, 10 to 60."""
    assert dict(get_task("cnn_dailymail").settings) == {
        "num_beams": 4, "min_target": 56, "max_target": 142, "length_penalty": 2.0, "no_repeat_ngram_size": 3,
        "early_stopping": 1,
    }  # fmt: skip
    xsum = get_task("xsum").settings
    assert [xsum[name] for name in ("num_beams", "min_target", "max_target", "length_penalty")] == [6, 11, 62, 1.0]


@pytest.mark.parametrize("head", HEADS)
def test_what_is_learnt_is_written(head: str) -> None:
    """A model trained on the training features until it knows them writes the summaries that they hold: the prompt, the
    labels, the end token and the decoding belong together. They quote their documents ("cat", "Dogs bark"), which the
    rule against repetition must allow."""
    model, tokenizer = writer(head, spread=0.02)
    features = get_task("xsum").train_encode_by_head[head](ROWS, tokenizer, 200)
    assert learn_(model.train(), tokenizer, features, 120) < 0.05
    runner = Runner(
        model.eval(), tokenizer, "cpu", 2, 200, {**SETTINGS, "min_target": 2, "max_target": 20, "num_beams": 1}
    )
    written = predict(runner, ROWS)
    assert written == [row["target"] for row in ROWS]
    assert rouge(written, [row["target"] for row in ROWS])["rougeLsum"] == 1.0


@pytest.mark.parametrize("head", HEADS)
def test_compressed_models_write(head: str) -> None:
    """A model with 2:4 masks attached writes what the folded one writes, and not what the dense one does."""
    texts = []
    for step in ("dense", "attached", "folded"):
        runner = _runner(head, min_target=12)
        if step != "dense":
            attach_(runner.model, make_plan(runner.model, Recipe.load("gpusq-gemm-int8")))
            prune_(runner.model)
        if step == "folded":
            fold_(runner.model)
        texts.append(predict(runner, ROWS))
    dense, attached, folded = texts
    assert attached == folded
    assert attached != dense


@pytest.mark.data
def test_real_files(data_dir: Path) -> None:
    """Counts of ../shared/data/README.md; a reference scores 1 against itself, its first sentence less."""
    xsum, cnn = get_task("xsum"), get_task("cnn_dailymail")
    assert len(xsum.rows("test", data_dir)) == 1_000
    assert len(cnn.rows("validation", data_dir)) == 500
    rows = cnn.rows("test", data_dir)
    assert len(rows) == 500
    references = [row["target"] for row in rows[:50]]
    assert cnn.score(references, references) == pytest.approx(
        dict.fromkeys(("rougeLsum", "rouge1", "rouge2", "rougeL"), 1)
    )
    one_line = [" ".join(reference.split()) for reference in references]
    assert cnn.score(one_line, references)["rougeLsum"] > 0.99  # sentences are found again
    assert cnn.score([reference.split("\n")[0] for reference in references], references)["rougeLsum"] < 0.8
