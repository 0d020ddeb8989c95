"""Persona-Chat: the files, candidates, prompts, likelihoods, scores, and whole evaluations."""

from __future__ import annotations

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from squeezoo.eval import files, get_task
from squeezoo.eval.dialogue import predict, references
from squeezoo.eval.dialogue_files import convai2_rows, read_convai2, read_synthetic, synthetic_rows
from squeezoo.eval.dialogue_prompt import prompt_text, prompts
from squeezoo.eval.dialogue_score import Reply, score
from squeezoo.eval.likelihood import Pairs, log_likelihoods
from squeezoo.eval.run import evaluate
from squeezoo.eval.runner import Runner
from writing import HEADS, character_tokenizer, learn_, writer

VECTOR = json.loads((Path(__file__).parents[1] / "vectors" / "metrics.json").read_text(encoding="utf-8"))
CONVAI2 = (
    "1 your persona: i like tea.\n2 partner's persona: i like rain.\n3 your persona: i am old.\n"
    "4 hi .\thello !\t\tbye .|no .|hello !\n5 how old ?\tvery .\t\tvery .|tea .|tea .|no .\n"
    "1 your persona: i run.\n2 __SILENCE__\twho are you ?\t\tyes .|who are you ?\n"
)
HEADER = "user 1 personas,user 2 personas,Best Generated Conversation\n"


def _dialogues(count: int = 4) -> list[Any]:
    """Dialogues with one persona and two replies each, with 2 wrong candidates."""
    return [
        {
            "id": str(n), "persona": (f"i am {n}.",),
            "turns": (("them", f"hi {n}."), ("you", f"I am {n}."), ("them", "ok"), ("you", f"bye {n * 7}")),
            "replies": (1, 3), "distractors": ((f"I am {n + 1}.", "no"), ("yes", f"bye {n}x")),
            "candidates_from": "file",
        }
        for n in range(count)
    ]  # fmt: skip


def _runner(head: str, batch_size: int = 4, spread: float = 0.3, length: int = 200, **settings: Any) -> Runner:
    model, tokenizer = writer(head, spread=spread)
    return Runner(
        model, tokenizer, "cpu", batch_size, length, {**get_task("personachat").settings, "max_target": 12, **settings}
    )


# files


def test_convai2_format(tmp_path: Path) -> None:
    """By hand: a number that falls begins a dialogue; the partner's persona and silence are not shown; a candidate that
    comes twice counts once."""
    path = tmp_path / "valid_self_original.txt"
    path.write_text(CONVAI2, encoding="utf-8")
    first, second = get_task("personachat").rows("valid", tmp_path)
    assert first == {
        "id": "0", "persona": ("i like tea.", "i am old."),
        "turns": (("them", "hi ."), ("you", "hello !"), ("them", "how old ?"), ("you", "very .")),
        "replies": (1, 3), "distractors": (("bye .", "no ."), ("tea .", "no .")), "candidates_from": "file",
    }  # fmt: skip
    assert (second["turns"], second["replies"]) == ((("you", "who are you ?"),), (0,))
    assert references(first) == ("hello !", "very .")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 your persona: a\n2 hi\n", "2: expected their text, a tab and your reply, found 'hi'"),
        ("1 your persona: a\n2 hi\t \n", "2: expected their text"),
        ("1 your persona: a\nhi\tho\n", "2: expected a line number"),
        ("1 hi\tho\n", "1: the persona is empty"),
        ("1 your persona: a\n2 hi\tho\t\tx|y\n", "2: the reply 'ho' is not among its 2 candidates"),
        ("1 your persona: a\n2 hi\tho\t\tho|y\n3 hi\tho\n", "1: some replies of this dialogue have candidates"),
        ("1 your persona: a\n", " expected dialogues with replies, found none"),
        ("1 your persona: a\n2 hi\tho\n", "expected 19 different replies in the other dialogues .* found 0"),
    ],
)
def test_broken_convai2_lines(tmp_path: Path, text: str, message: str) -> None:
    """With file and line."""
    path = tmp_path / "train_self_original.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(files.DataError, match=rf"train_self_original\.txt:.*{message}"):
        get_task("personachat").rows("train", tmp_path)


def _numbered(dialogues: int, replies: int = 3) -> str:
    lines = []
    for n in range(dialogues):
        lines.append(f"1 your persona: i am {n}.")
        lines += [f"{k + 2} hi {k}\treply {n} {k}" for k in range(replies)]
    return "\n".join(lines)


def test_sampled_candidates(tmp_path: Path) -> None:
    """19 different replies of other dialogues, the same at each reading, others for each reply."""
    path = tmp_path / "valid_self_original_no_cands.txt"
    path.write_text(_numbered(9), encoding="utf-8")
    rows = get_task("personachat").rows("valid", tmp_path)
    assert rows == read_convai2(path)
    for row in rows:
        assert row["candidates_from"] == "sampled"
        own = set(references(row))
        for wrong in row["distractors"]:
            assert len(set(wrong)) == 19
            assert not own & set(wrong)
    drawn = [wrong for row in rows for wrong in row["distractors"]]
    assert len(set(drawn)) == len(drawn) == 27


def test_synthetic_format(tmp_path: Path) -> None:
    """By hand: cells over several lines, lines of nobody, one speaker twice, an empty turn, no speakers at all."""
    conversation = "User 1: Hi!\n\n* User 2:* Hello. *\nUser 2: I cook:\n1. eggs\nUser 1: Nice\nUser 2:\nUser 2: Bye"
    replies = "\n".join(f"User 1: a\nUser 2: reply {n}" for n in range(20))
    others = replies.replace("reply", "other")
    path = tmp_path / "Synthetic-Persona-Chat_test.csv"
    path.write_text(
        f'{HEADER}"I am A.","I am B.\nI cook.","{conversation}"\nx,y,"Hi!\nHo!"\nx,y,"{replies}"\nx,y,"{others}"\n',
        encoding="utf-8",
    )
    rows = get_task("personachat-synthetic").rows("test", tmp_path)
    assert rows[0]["persona"] == ("I am B.", "I cook.")
    assert rows[0]["turns"] == (
        ("them", "Hi!"), ("you", "Hello. I cook: 1. eggs"), ("them", "Nice"), ("you", "Bye"),
    )  # fmt: skip
    assert [len(row["replies"]) for row in rows] == [2, 0, 20, 20]
    assert rows == read_synthetic(path)
    path.write_text(f"{HEADER}x,y,z\nx,y\n", encoding="utf-8")
    with pytest.raises(files.DataError, match=r"test\.csv:3: expected 3 cells, found 2"):
        read_synthetic(path)
    path.write_text(f'{HEADER}x," ","User 2: a"\n', encoding="utf-8")
    with pytest.raises(files.DataError, match=r"test\.csv:2: the persona is empty"):
        read_synthetic(path)
    path.write_text("a,b\n", encoding="utf-8")
    with pytest.raises(files.DataError, match=r"test\.csv:1: expected the columns"):
        read_synthetic(path)


def test_hub_forms_give_the_same_rows(tmp_path: Path) -> None:
    """The columns of AlekseyKorshuk/persona-chat (the reply is the last candidate) and of Synthetic-Persona-Chat."""
    path = tmp_path / "x.txt"
    path.write_text(CONVAI2.split("\n1 your")[0], encoding="utf-8")
    table = [
        {
            "personality": ["i like tea.", "i am old."],
            "utterances": [
                {"history": ["hi ."], "candidates": ["bye .", "no .", "hello !"]},
                {"history": ["hi .", "hello !", "how old ?"], "candidates": ["tea .", "no .", "very ."]},
            ],
        }
    ]
    assert convai2_rows(table, "hub") == read_convai2(path)
    replies = "\n".join(f"User 1: a\nUser 2: reply {n}" for n in range(20))
    cells = [{"user 1 personas": "x", "user 2 personas": "y", "Best Generated Conversation": replies}] * 2
    path.write_text(HEADER + f'x,y,"{replies}"\n' * 2, encoding="utf-8")
    assert synthetic_rows(cells, "hub") == read_synthetic(path)


def test_missing_files(tmp_path: Path) -> None:
    """What was looked for, candidates first."""
    with pytest.raises(files.MissingDataError, match=r"personachat, split valid,.*ConvAI2/valid_self_original\.txt,"):
        get_task("personachat").rows("valid", tmp_path)
    with pytest.raises(ValueError, match="did you mean 'valid'"):
        get_task("personachat").rows("validation", tmp_path)


# prompts


def test_prompt_and_what_is_left_out() -> None:
    """By hand; the oldest turns go first, then the first tokens."""
    (row,) = _dialogues(1)
    whole = "your persona: i am 0.\nthem: hi 0.\nyou: I am 0.\nthem: ok\nyou:"
    assert prompt_text(row, 1) == whole
    tokenizer = character_tokenizer(False)
    common: dict[str, Any] = {"encoder_decoder": False, "limit": None, "max_target": 5}
    texts = []
    for room in (len(whole), len(whole) - 1, 10):
        (prompt,) = prompts([(row, 1)], tokenizer, room, **common)
        texts.append(tokenizer.decode(prompt.ids))
    assert texts == [whole, whole.replace("them: hi 0.\n", ""), "am 0.\nyou:"]
    assert [tokenizer.decode(ids) for ids in prompt.targets] == [" bye 0</s>", " yes</s>", " bye 0x</s>"]
    with pytest.raises(ValueError, match=r"8 positions .* needs 8"):
        prompts([(row, 1)], tokenizer, 50, **{**common, "limit": 8})
    assert len(prompts([(row, 1)], tokenizer, 50, **{**common, "limit": 28})[0].ids) == 20


@pytest.mark.parametrize("head", HEADS)
def test_training_features_label_the_reply_only(head: str) -> None:
    """One sequence per reply."""
    tokenizer = character_tokenizer(head == "seq2seq-lm")
    features = get_task("personachat").train_encode_by_head[head](_dialogues(2), tokenizer, 40)
    assert len(features) == 4
    labels = [tokenizer.decode([i for i in f["labels"] if i != -100], skip_special_tokens=True) for f in features]
    assert [label.strip() for label in labels] == ["I am 0.", "bye 0", "I am 1.", "bye 7"]
    assert all(len(feature["input_ids"]) <= 40 for feature in features)
    assert tokenizer.decode(features[0]["input_ids"], skip_special_tokens=True).startswith("your persona: i am 0.")


# likelihoods


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihood_is_that_of_the_models_own_loss(head: str, batch_size: int) -> None:
    """transformers' loss is the mean over the labels; one pair at a time against batches."""
    runner = _runner(head, batch_size)
    pairs = Pairs([([5, 6, 7, 8], [9, 3]), ([5], [10, 11, 12, 3]), ([5] * 9, [3])], head == "seq2seq-lm")
    found = log_likelihoods(runner, pairs)
    model: Any = runner.model
    for pair, likelihood in zip(pairs, found, strict=True):
        with torch.no_grad():
            loss = model(**{name: torch.tensor([ids]) for name, ids in pair.items()}).loss
        assert likelihood.total == pytest.approx(-float(loss) * likelihood.tokens, rel=1e-5)
    assert [likelihood.tokens for likelihood in found] == [2, 4, 1]


# scores


def _reply(text: str = "a", rank: int = 1, log_likelihood: float = -1.0, tokens: int = 1) -> Reply:
    return Reply(text, rank, log_likelihood, tokens)


def test_bleu_and_ter_vector() -> None:
    """Reference vector metrics, mjpost/sacrebleu (in percent there)."""
    found = score([[_reply(text) for text in VECTOR["hyp"]]], [VECTOR["ref"]])
    assert found["bleu"] == pytest.approx(VECTOR["bleu"] / 100, rel=1e-6)
    assert found["ter"] == pytest.approx(VECTOR["ter_percent"] / 100, rel=1e-6)


def test_perplexity_vector() -> None:
    """Reference vector metrics; split over two dialogues, where only the sums count."""
    nll = VECTOR["nll_per_token"]
    replies = [[_reply(log_likelihood=-sum(nll[:3]), tokens=3)], [_reply(log_likelihood=-nll[3], tokens=1)]]
    found = score(replies, [["one two"], ["three"]])
    assert found["perplexity"] == pytest.approx(VECTOR["perplexity"], rel=1e-6)
    assert found["word_perplexity"] == pytest.approx(math.exp(sum(nll) / 3))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=20))
def test_hits_count_ranks(ranks: list[int]) -> None:
    """The share of ranks up to 1, 5 and 10."""
    found = score([[_reply(rank=rank) for rank in ranks]], [["a"] * len(ranks)])
    assert [found[f"hits@{k}"] for k in (1, 5, 10)] == [sum(r <= k for r in ranks) / len(ranks) for k in (1, 5, 10)]


# whole evaluations


@pytest.mark.parametrize("head", HEADS)
def test_batched_equals_single_whatever_the_order(head: str) -> None:
    """Texts and ranks are equal, likelihoods to rounding."""
    rows = _dialogues()
    single = predict(_runner(head, 1), rows)
    for found in (predict(_runner(head, 5), rows), predict(_runner(head, 3), rows[::-1])[::-1]):
        for one, other in zip(chain(*single), chain(*found), strict=True):
            assert (one.text, one.rank, one.tokens) == (other.text, other.rank, other.tokens)
            assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-5)


@pytest.mark.parametrize("ranking", ["mean", "sum"])
def test_rank_is_counted_from_single_likelihoods(ranking: str) -> None:
    """Each candidate alone, by the model's own loss."""
    runner, rows = _runner("causal-lm", ranking=ranking), _dialogues()
    model: Any = runner.model
    found = predict(runner, rows)
    common: dict[str, Any] = {"encoder_decoder": False, "limit": 512, "max_target": 12}
    for row, replies in zip(rows, found, strict=True):
        for place, reply in enumerate(replies):
            (prompt,) = prompts([(row, place)], runner.processor, 200, **common)
            values = []
            for target in prompt.targets:
                labels = [-100] * len(prompt.ids) + target
                with torch.no_grad():
                    loss = model(torch.tensor([prompt.ids + target]), labels=torch.tensor([labels])).loss
                values.append(-float(loss) * (len(target) if ranking == "sum" else 1))
            assert reply.rank == 1 + sum(value >= values[0] for value in values[1:])


def test_equal_candidates_count_against_the_model() -> None:
    """Unknown characters make two candidates the same tokens: nobody can tell them apart."""
    rows = _dialogues(1)
    rows[0] |= {"turns": (("them", "hi"), ("you", "é")), "replies": (1,), "distractors": (("ü",),)}
    assert predict(_runner("causal-lm"), rows)[0][0].rank == 2


@pytest.mark.parametrize("head", HEADS)
def test_what_is_learnt_is_said_and_ranked_first(head: str) -> None:
    """A model trained on the training features until it knows them gives every score its best value."""
    task, rows = get_task("personachat"), _dialogues(3)
    runner = _runner(head, 2, spread=0.02)
    features = task.train_encode_by_head[head](rows, runner.processor, 200)
    assert learn_(runner.model.train(), runner.processor, features, 150) < 0.05
    found = task.score(predict(runner, rows), [task.reference(row) for row in rows])
    assert found["bleu"] == pytest.approx(1.0)
    assert found["ter"] == 0.0
    assert [found[f"hits@{k}"] for k in (1, 5, 10)] == [1.0, 1.0, 1.0]
    assert 1.0 < found["perplexity"] < 1.06


def test_evaluation_records_its_settings(tmp_path: Path) -> None:
    """Candidates, replies, decoding and libraries' settings stand in each score; TER and perplexity point down."""
    (tmp_path / "valid_self_original_no_cands.txt").write_text(_numbered(8), encoding="utf-8")
    model, tokenizer = writer("causal-lm")
    scores = evaluate(
        model, "personachat", tokenizer, data_dir=tmp_path, progress=False, limit=2, settings={"max_target": 6}
    )
    down = {"ter", "perplexity", "word_perplexity"}
    assert scores[0].metric == "bleu"
    assert {score.metric for score in scores if not score.higher_is_better} == down
    assert {score.metric for score in scores} == down | {"bleu", "hits@1", "hits@5", "hits@10"}
    settings = scores[0].settings
    assert settings["candidates"] == "20: the reply and 19 replies of other dialogues, seed 0"
    assert (settings["replies"], settings["num_beams"], settings["ranking"]) == (6, 1, "mean")
    assert "sacrebleu" in str(settings["bleu"])
    assert (scores[0].samples, scores[0].complete) == (2, False)
    with pytest.raises(ValueError, match="ranking is 'mean' or 'sum'"):
        evaluate(model, "personachat", tokenizer, data_dir=tmp_path, progress=False, settings={"ranking": "x"})


# real data


@pytest.mark.data
def test_real_files(data_dir: Path) -> None:
    """Counts of ../shared/data/README.md; two dialogues of the synthetic test split name no speakers."""
    task = get_task("personachat")
    for split in task.splits:
        rows = task.rows(split, data_dir)
        assert len(rows) == 9
        assert all(4 <= len(row["persona"]) <= 5 for row in rows)
        assert all(row["turns"][0][0] == "them" and len(row["distractors"][0]) == 19 for row in rows)
    synthetic = get_task("personachat-synthetic")
    valid, test = synthetic.rows("valid", data_dir), synthetic.rows("test", data_dir)
    assert (len(valid), len(test)) == synthetic.sizes[1:]
    assert [sum(not row["replies"] for row in rows) for rows in (valid, test)] == [0, 2]
    for rows in (valid, test):
        right = [task.reference(row) for row in rows[:40]]
        said = [[_reply(text) for text in row] for row in right]
        assert task.score(said, right)["bleu"] == pytest.approx(1.0)
