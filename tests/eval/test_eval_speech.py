"""LibriSpeech and folders of recordings: layouts, features, decoding, error rates, broken rows."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jiwer
import pytest
import soundfile
import torch
from scipy.signal import resample_poly
from speech_folders import TEXTS, ctc_model, librispeech, sound
from squeezoo.eval import get_task, speech
from squeezoo.eval.data import batches, collator
from squeezoo.eval.files import DataError, MissingDataError
from squeezoo.eval.run import evaluate
from squeezoo.eval.runner import Runner

CLEAN, OTHER, FOLDER = get_task("librispeech/clean"), get_task("librispeech/other"), get_task("speech-folder")
KINDS = pytest.mark.parametrize("masked", [False, True], ids=["group norm", "layer norm"])


def _edits(said: list[str], heard: list[str]) -> int:
    """Levenshtein's distance by its recurrence (Wagner and Fischer 1974)."""
    row = list(range(len(heard) + 1))
    for i, a in enumerate(said, start=1):
        before, row[0] = row[0], i
        for j, b in enumerate(heard, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def _texts(model: Any, processor: Any, rows: Any, batch_size: int, task: Any = CLEAN) -> tuple[list[str], dict]:
    runner = Runner(model, processor, batch_size=batch_size, settings=dict(task.settings))
    return list(task.predict(runner, rows)), runner.settings


def test_official_layout(tmp_path: Path) -> None:
    """Every line of every transcript, in the order of the paths; official sizes from OpenSLR 12 (Panayotov et al. 2015,
    table 1 gives the hours): 2,620 and 2,939 test utterances."""
    librispeech(tmp_path)
    rows = CLEAN.rows("test-clean", tmp_path)
    assert {row["audio"].stem: row["text"] for row in rows} == TEXTS
    assert rows[1]["where"].endswith("84-121123.trans.txt:2") or rows[1]["where"].endswith("174-50561.trans.txt:2")
    assert [row["audio"].name for row in rows] == sorted(
        (row["audio"].name for row in rows), key=lambda name: (name.split("-")[0], name)
    )
    shutil.move(str(tmp_path / "LibriSpeech"), str(tmp_path / "moved"))
    assert len(CLEAN.rows("test-clean", tmp_path / "moved")) == 5
    assert (CLEAN.size("test-clean"), OTHER.size("test-other")) == (2_620, 2_939)
    assert (CLEAN.splits[0], CLEAN.splits[1], CLEAN.report_split) == ("train-clean-100", "dev-clean", "test-clean")


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingDataError, match=r"LibriSpeech/test-other.*--data-dir"):
        OTHER.rows("test-other", tmp_path)
    with pytest.raises(ValueError, match="did you mean 'test-clean'"):
        CLEAN.rows("test-cleen", tmp_path)
    monkeypatch.delenv("SQUEEZOO_DATA", raising=False)
    with pytest.raises(MissingDataError, match="recordings of your own"):
        FOLDER.rows("test", None)
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="expected transcripts"):
        FOLDER.rows("test", tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("174-50561-0002 MORE\n", r"174-50561\.trans\.txt:3: expected the recording 174-50561-0002\.flac"),
        ("174-50561-0001\n", r"174-50561\.trans\.txt:3: expected an identifier, a space and a transcript"),
        ("174-50561-0001 AGAIN\n", r"174-50561\.trans\.txt:3: 174-50561-0001 stands there twice"),
        (b"174-50561-0001 \xff\n", r"174-50561\.trans\.txt:3: expected UTF-8"),
    ],
)
def test_broken_transcripts_are_named(tmp_path: Path, line: str | bytes, expected: str) -> None:
    path = librispeech(tmp_path) / "174" / "50561" / "174-50561.trans.txt"
    path.write_bytes(path.read_bytes() + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(DataError, match=expected):
        CLEAN.rows("test-clean", tmp_path)


def test_a_recording_without_transcript_is_named(tmp_path: Path) -> None:
    chapter = librispeech(tmp_path) / "84" / "121550"
    shutil.copy(chapter / "84-121550-0000.flac", chapter / "84-121550-0001.flac")
    with pytest.raises(DataError, match=r"84-121550-0001\.flac: a recording without a transcript"):
        CLEAN.rows("test-clean", tmp_path)


def _break(path: Path, how: str) -> None:
    if how == "rate":
        soundfile.write(path, sound(0.3, rate=8_000), 8_000)
    elif how == "channels":
        soundfile.write(path, sound(0.3).reshape(-1, 2), 16_000)
    elif how == "empty":
        soundfile.write(path, sound(0.0), 16_000)
    elif how == "short":
        soundfile.write(path, sound(0.001), 16_000)
    elif how == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes(b"fLaC and no more")


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("rate", "expected 16000 Hz as in the official corpus, found 8000 Hz"),
        ("channels", "expected one channel, found 2"),
        ("empty", "holds no sound|not a readable"),
        ("short", "a recording of 16 values gives no frame"),
        ("half", "does not decode|ends after"),
        ("noise", "not a readable FLAC or WAV file"),
    ],
)
def test_broken_recordings_are_named(tmp_path: Path, how: str, expected: str) -> None:
    """Each with the line of its transcript."""
    _break(librispeech(tmp_path) / "174" / "50561" / "174-50561-0001.flac", how)
    model, processor = ctc_model(True)
    with pytest.raises(DataError, match=rf"(?s)174-50561\.trans\.txt:2.*({expected})"):
        evaluate(model, CLEAN, processor, data_dir=tmp_path, batch_size=2, progress=False)


def test_a_cut_wav_is_named(tmp_path: Path) -> None:
    """soundfile alone would read what is left of it in silence."""
    (tmp_path / "test").mkdir()
    soundfile.write(tmp_path / "test" / "a.wav", sound(0.3), 16_000)
    (tmp_path / "test" / "a.trans.txt").write_text("a NO\n", encoding="utf-8")
    _break(tmp_path / "test" / "a.wav", "half")
    model, processor = ctc_model(True)
    with pytest.raises(DataError, match=r"a\.trans\.txt:1 .*a\.wav\): the file ends after"):
        evaluate(model, FOLDER, processor, data_dir=tmp_path, progress=False)


@KINDS
def test_scores_are_those_of_the_library(tmp_path: Path, masked: bool) -> None:
    """jiwer on texts decoded by transformers' own tokenizer, one row after another; and the edit distances by hand."""
    librispeech(tmp_path)
    model, processor = ctc_model(masked)
    rows = CLEAN.rows("test-clean", tmp_path)
    heard = []
    for row in rows:
        values, rate = soundfile.read(row["audio"], dtype="float32")
        batch = processor(values, sampling_rate=rate, return_tensors="pt")
        with torch.inference_mode():
            best = model(**batch).logits.argmax(-1)
        special = [processor.tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "</s>", "<unk>")]
        text = processor.batch_decode(best)[0]
        for token in processor.tokenizer.convert_ids_to_tokens(special):
            text = text.replace(token, "")  # they write nothing here
        heard.append(" ".join(text.upper().split()))
    assert any(heard), "the model must write something for this test to mean anything"
    found, _ = _texts(model, processor, rows, 3)
    assert found == heard
    wer, cer = evaluate(model, CLEAN, processor, data_dir=tmp_path, batch_size=3, progress=False)
    said = [row["text"] for row in rows]
    assert (wer.metric, cer.metric, wer.higher_is_better, cer.higher_is_better) == ("wer", "cer", False, False)
    assert wer.value == pytest.approx(jiwer.wer(said, heard))
    assert cer.value == pytest.approx(jiwer.cer(said, heard))
    words = sum(_edits(a.split(), b.split()) for a, b in zip(said, heard))
    letters = sum(_edits(list(a), list(b)) for a, b in zip(said, heard))
    assert wer.value == pytest.approx(words / sum(len(a.split()) for a in said))
    assert cer.value == pytest.approx(letters / sum(map(len, said)))
    assert (wer.samples, wer.complete) == (5, False)
    assert wer.settings == {
        "decoder": "greedy", "normalisation": "upper case, single spaces", "padding": "masked" if masked else "none",
    }  # fmt: skip


@KINDS
def test_batches_and_order_do_not_matter(tmp_path: Path, masked: bool) -> None:
    """Also for the model that normalises over time: its frames' scores are those of the row alone, to rounding."""
    librispeech(tmp_path)
    model, processor = ctc_model(masked)
    rows = list(CLEAN.rows("test-clean", tmp_path))
    alone, _ = _texts(model, processor, rows, 1)
    assert _texts(model, processor, rows, 5)[0] == alone
    shuffled = random.Random(1).sample(range(5), 5)
    assert _texts(model, processor, [rows[i] for i in shuffled], 4)[0] == [alone[i] for i in shuffled]
    features = CLEAN.encode(rows, processor, 0)
    join = collator(processor)
    for indices, chosen in batches(features, 5):
        batch = {name: tensor for name, tensor in join(chosen).items() if name != "labels"}
        batch["samples"] = torch.tensor([features.lengths()[i] for i in indices])
        with torch.inference_mode():
            together = speech.frame_scores(model, batch)
            for index, scores in zip(indices, together):
                single = model(features[index]["input_values"][None]).logits[0]
                torch.testing.assert_close(scores, single, atol=2e-5, rtol=1e-4)


def test_features_are_the_extractors_own(tmp_path: Path) -> None:
    """Values and masks as transformers' feature extractor gives them, labels as its tokenizer does, padded by -100."""
    librispeech(tmp_path)
    for masked in (False, True):
        _, processor = ctc_model(masked)
        rows = CLEAN.rows("test-clean", tmp_path)
        features = CLEAN.encode(rows, processor, 0)
        waves = [soundfile.read(row["audio"], dtype="float32")[0] for row in rows]
        assert features.lengths() == [len(wave) for wave in waves]
        batch = collator(processor)([features[i] for i in range(5)])
        extract = processor.feature_extractor
        if masked:
            expected = dict(extract(waves, sampling_rate=16_000, padding=True, return_tensors="pt"))
        else:  # in a padded batch without a mask it would normalise over the padding too
            alone = [torch.from_numpy(extract(wave, sampling_rate=16_000)["input_values"][0]) for wave in waves]
            expected = {"input_values": torch.nn.utils.rnn.pad_sequence(alone, batch_first=True)}
        assert batch.keys() == {*expected.keys(), "labels"}
        for name, values in expected.items():
            torch.testing.assert_close(batch[name], values.to(batch[name].dtype))
        for labels, row in zip(batch["labels"].tolist(), rows):
            assert [x for x in labels if x != -100] == processor.tokenizer(row["text"])["input_ids"]
            assert labels == sorted(labels, key=lambda x: x == -100)


def test_a_character_without_symbol_is_named(tmp_path: Path) -> None:
    librispeech(tmp_path, "train-clean-100", {"1-1-0000": "IN 1891"})
    rows = CLEAN.rows("train-clean-100", tmp_path)
    with pytest.raises(DataError, match=r"1-1\.trans\.txt:1: .*no symbol for '1', '8', '9'"):
        CLEAN.encode(rows, ctc_model(True)[1], 0)


def test_resampling_is_scipys_and_recorded(tmp_path: Path) -> None:
    """8 kHz to the model's 16 kHz in a folder of one's own; the score says so."""
    place = tmp_path / "test"
    place.mkdir()
    wave = sound(0.3, rate=8_000)
    soundfile.write(place / "slow.wav", wave, 8_000, subtype="FLOAT")
    soundfile.write(place / "odd.flac", sound(0.3, 1, 22_050), 22_050)
    (place / "all.tsv").write_text("path\ttext\tnote\nslow.wav\tNo, no!\tx\nodd.flac\tyes\tx\n", encoding="utf-8")
    model, processor = ctc_model(True)
    features = FOLDER.encode(FOLDER.rows("test", tmp_path), processor, 0)
    expected = resample_poly(wave, 2, 1)
    expected = (expected - expected.mean()) / (expected.var() + 1e-7) ** 0.5
    torch.testing.assert_close(features[0]["input_values"], torch.from_numpy(expected).float(), atol=1e-5, rtol=1e-4)
    assert features.lengths() == [len(feature["input_values"]) for feature in features]
    wer, _ = evaluate(model, FOLDER, processor, data_dir=tmp_path, progress=False)
    assert wer.settings["resampled"] == "from 8000, 22050 to 16000 Hz"
    assert (wer.samples, wer.complete) == (2, True)
    part, _ = evaluate(model, FOLDER, processor, data_dir=tmp_path, limit=1, progress=False)
    assert (part.samples, part.complete, part.settings["data"]) == (1, False, wer.settings["data"])


def test_folders_of_ones_own(tmp_path: Path) -> None:
    """A table or transcripts, in DIR/speech-folder/SPLIT, DIR/SPLIT or DIR; the fingerprint follows names, sizes and
    texts, not the place and not the order."""
    one = tmp_path / "one" / "speech-folder" / "test"
    (one / "audio").mkdir(parents=True)
    for name in ("a", "b"):
        soundfile.write(one / "audio" / f"{name}.flac", sound(0.2, ord(name)), 16_000)
    (one / "texts.csv").write_text('text,path\n"Well, yes",audio/a.flac\nno,audio/b.flac\n', encoding="utf-8")
    first = FOLDER.rows("test", tmp_path / "one")
    assert [row["text"] for row in first] == ["Well, yes", "no"]
    assert [FOLDER.reference(row) for row in first] == ["WELL YES", "NO"]
    two = tmp_path / "two"
    shutil.copytree(one / "audio", two)
    (two / "x.trans.txt").write_text("b no\na Well, yes\n", encoding="utf-8")
    second = FOLDER.rows("test", two)
    assert first[0]["settings"] == second[0]["settings"]
    (two / "x.trans.txt").write_text("b no\na Well yes\n", encoding="utf-8")
    assert FOLDER.rows("test", two)[0]["settings"] != first[0]["settings"]
    for split in ("train", "validation"):
        with pytest.raises(MissingDataError, match=split):
            FOLDER.rows(split, two)
    (one / "more.tsv").write_text("path\ttext\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"one table of transcripts, found \['more.tsv', 'texts.csv'\]"):
        FOLDER.rows("test", tmp_path / "one")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path,words\na.flac,x\n", r"t\.csv:1: expected the columns \['path', 'text'\]"),
        ("path,text\na.flac,\n", r"t\.csv:2: column 'text' is empty"),
        ("path,text\nb.flac,x\n", r"t\.csv:2: the recording .*b\.flac' does not exist"),
        ("path,text\na.flac,well, yes\n", r"t\.csv:2: more fields than the header"),
        ("path,text\n", r"t\.csv:1: expected rows"),
        ("path,text\na.flac,?!\n", r"t\.csv:2: nothing is left of the transcript '\?!'"),
    ],
)
def test_broken_tables_are_named(tmp_path: Path, text: str, expected: str) -> None:
    soundfile.write(tmp_path / "a.flac", sound(0.2), 16_000)
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=expected):
        [FOLDER.reference(row) for row in FOLDER.rows("test", tmp_path)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("don’t 'stop' — now!", "DON'T STOP NOW"),
        ("Ⅳ   café\tx2", "IV CAFÉ X2"),
        ("rock-'n'-roll ''", "ROCK N ROLL"),
        ("हिन्दी।", "हिन्दी"),
    ],
)
def test_plain_words(text: str, expected: str) -> None:
    """By the rule as the setting says it: NFKC, upper case, letters, digits and inner apostrophes, single spaces."""
    assert speech.plain_words(text) == expected
    assert speech.plain_words(expected) == expected


def test_error_rates_of_known_texts() -> None:
    """Counted by hand: one word of four substituted, then one inserted and none written at all; above 1 is possible."""
    assert speech.error_rates(["A B X D"], ["A B C D"]) == {"wer": 0.25, "cer": 1 / 7}
    assert speech.error_rates(["A B", ""], ["A", "B"])["wer"] == 1.0
    assert speech.error_rates(["A B C"], ["A"])["wer"] == 2.0


def test_what_the_model_must_bring(tmp_path: Path) -> None:
    """Blank and width of tokenizer and model, and a processor at all."""
    librispeech(tmp_path)
    rows = CLEAN.rows("test-clean", tmp_path)
    model, processor = ctc_model(True)
    with pytest.raises(ValueError, match=r"CTC tokenizer.*NoneType"):
        _texts(model, None, rows, 1)
    with pytest.raises(ValueError, match="CTC tokenizer"):
        CLEAN.encode(rows, processor.feature_extractor, 0)
    model.config.pad_token_id = 4
    with pytest.raises(ValueError, match="blank is 0, the model's config says 4"):
        _texts(model, processor, rows, 1)
    model.config.vocab_size = 20
    with pytest.raises(ValueError, match="symbols up to index 31, the model a head for 20"):
        _texts(model, processor, rows, 1)
    broken, processor = ctc_model(True)
    torch.nn.init.constant_(broken.lm_head.bias, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        _texts(broken, processor, rows, 2)


def test_training_a_ctc_head(tmp_path: Path) -> None:
    """`finetune` from a folder with a feature extractor alone: it gets the alphabet, learns (transformers' own CTC loss
    of the same labels halves), and the written folder is evaluated by itself; `compress` goes on from there."""
    from squeezoo.compress.engine import compress, train_dense
    from squeezoo.compress.recipe import Recipe
    from squeezoo.models.dense import save_dense
    from squeezoo.pipeline import load_any, load_for, training_data

    def trained(name: str, epochs: float, rate: float) -> Recipe:
        recipe = Recipe.load(name)
        change = {"epochs": epochs, "learning_rate": rate, "batch_size": 5}
        stages = [s.model_copy(update=change) if s.stage == "finetune" else s for s in recipe.stages]
        return recipe.model_copy(update={"stages": tuple(stages)})

    def loss(model: Any) -> float:
        with torch.inference_mode():
            return float(model(**batch).loss)

    model, processor = ctc_model(False)
    save_dense(model.wav2vec2, processor.feature_extractor, tmp_path / "base")
    librispeech(tmp_path, "train-clean-100")
    librispeech(tmp_path, "test-clean")
    dense = load_for(str(tmp_path / "base"), CLEAN, seed=1)
    assert dense.processor.tokenizer("IT'S")["input_ids"] == processor.tokenizer("IT'S")["input_ids"]
    data = training_data(CLEAN, dense.processor, data_dir=tmp_path, model=dense.model)
    assert data.lengths() == [len(feature["input_values"]) for feature in data.features]
    batch = data.collate([data.features[i] for i in range(5)])
    before = loss(dense.model)
    train_dense(dense, trained("dense", 40.0, 3e-3), data, tmp_path / "tuned")
    tuned = load_for(str(tmp_path / "tuned"), CLEAN)
    assert not tuned.new
    assert loss(tuned.model) < 0.5 * before
    compress(tuned, trained("deepcomp-int8", 1.0, 1e-5), data, tmp_path / "tiny.libri.deepcomp-int8")
    small = load_any(str(tmp_path / "tiny.libri.deepcomp-int8"), backend="reference")
    for found in (tuned, small):
        scores = evaluate(found.model, CLEAN, found.processor, data_dir=tmp_path, progress=False)
        assert [(score.metric, score.samples) for score in scores] == [("wer", 5), ("cer", 5)]


def test_hub_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in the Hub repository's own form, read by the real ``datasets``: FLAC bytes in the column audio."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = CLEAN.rows("test-clean", librispeech(tmp_path).parent)
    hub = tmp_path / "hub"
    (hub / "clean").mkdir(parents=True)
    table = {
        "audio": [{"bytes": row["audio"].read_bytes(), "path": row["audio"].name} for row in rows],
        "text": [row["text"] for row in rows],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), hub / "clean" / "test-00000-of-00001.parquet")
    (hub / "README.md").write_text(
        "---\ndataset_info:\n  config_name: clean\n  features:\n  - name: audio\n    dtype:\n      audio:\n"
        "        sampling_rate: 16000\n  - name: text\n    dtype: string\nconfigs:\n- config_name: clean\n"
        "  data_files:\n  - split: test\n    path: clean/test-*\n---\n",
        encoding="utf-8",
    )
    monkeypatch.delenv("SQUEEZOO_DATA", raising=False)
    monkeypatch.setattr(speech, "HUB", str(hub))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, processor = ctc_model(True)
    online = evaluate(model, CLEAN, processor, progress=False)
    local = evaluate(model, CLEAN, processor, data_dir=tmp_path, progress=False)
    assert online == local


def test_version_and_protocol_stand_in_the_task() -> None:
    assert (CLEAN.version, CLEAN.metric, CLEAN.model_kinds, CLEAN.reads) == (1, "wer", ("ctc",), "sound")
    with pytest.raises(ValueError, match="did you mean 'beam_width'"):
        replace(CLEAN).resolved({"beam_witdh": 2})


@pytest.mark.data
def test_the_real_sample(data_dir: Path) -> None:
    """Four utterances of test-clean: 16 kHz, lengths by soundfile, texts in the letters of the alphabet."""
    rows = CLEAN.rows("test-clean", data_dir)
    assert [row["audio"].name for row in rows] == [
        "1089-134686-0000.flac", "1089-134686-0001.flac", "1089-134691-0000.flac", "1089-134691-0001.flac",
    ]  # fmt: skip
    assert rows[1]["text"] == "STUFF IT INTO YOU HIS BELLY COUNSELLED HIM"
    for masked in (False, True):
        model, processor = ctc_model(masked)
        features = CLEAN.encode(rows, processor, 0)
        assert features.lengths() == [len(soundfile.read(row["audio"])[0]) for row in rows]
        assert _texts(model, processor, rows, 4)[0] == _texts(model, processor, rows, 1)[0]
    perfect = CLEAN.score([row["text"] for row in rows], [CLEAN.reference(row) for row in rows])
    assert perfect == {"wer": 0.0, "cer": 0.0}
