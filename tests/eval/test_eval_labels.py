"""The classes by name: models whose head has them in another order. Expected: scores and logits of the same head in the
task's order, whose own correctness test_eval_run.py and test_eval_ner.py show."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from squeezoo.eval import TASKS, get_task
from squeezoo.eval.labels import column_order, model_labels, name_labels_, reorder_head_, task_order
from squeezoo.eval.run import evaluate
from squeezoo.models.dense import example_batch, load_dense, logits, save_dense
from squeezoo.pipeline import load_for, training_data
from texts import sentence_tokenizer
from tiny import ALL, ROWS, TINY
from torch import nn

MRPC, MNLI, SST2, CONLL = (get_task(name) for name in ("glue/mrpc", "glue/mnli", "glue/sst2", "conll2003"))


class Named(nn.Module):
    """A model of which only the config matters."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.config: Any = type("Config", (), {"id2label": dict(enumerate(names))})()


def _bert(labels: int, *names: str, name: str = "bert") -> Any:
    """A tiny BERT with so many classes, called ``names``."""
    model: Any = ALL[name]()
    torch.manual_seed(5)
    model.classifier = nn.Linear(32, labels)
    nn.init.normal_(model.classifier.weight, std=2)
    model.num_labels = model.config.num_labels = labels
    if names:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {label: index for index, label in enumerate(names)}
    return model.eval()


def _permuted(model: Any, names: Any, order: list[int]) -> Any:
    """The same model as another library may publish it: row i of its head is class ``order[i]``."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.classifier.weight.copy_(model.classifier.weight[order])
        other.classifier.bias.copy_(model.classifier.bias[order])
    other.config.id2label = {place: names[number] for place, number in enumerate(order)}
    other.config.label2id = {names[number]: place for place, number in enumerate(order)}
    return other


def _mrpc(tmp_path: Path, rows: int = 30) -> Path:
    (tmp_path / "MRPC").mkdir(exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    lines = [
        f"{int(i % 3 > 0)}\t1\t2\t{letters[i % 26]} {letters[i * 5 % 26]}\t{letters[i * 3 % 26]}" for i in range(rows)
    ]
    for split in ("train", "dev"):
        text = "\n".join(["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *lines])
        (tmp_path / "MRPC" / f"{split}.tsv").write_text(text, encoding="utf-8")
    return tmp_path


@given(st.permutations(range(9)), st.sampled_from((str.upper, str.lower, str.title)), st.sampled_from("-_ "))
def test_any_order_and_spelling_is_found(shuffled: list[int], case: Any, dash: str) -> None:
    """Column ``order[c]`` of the logits is class c, whatever the case and the dashes."""
    names = [case(CONLL.label_names[number]).replace("-", dash) for number in shuffled]
    order = column_order(Named(*names), CONLL.label_names)
    found = list(range(9)) if order is None else order
    assert [shuffled[column] for column in found] == list(range(9))
    assert (order is None) == (shuffled == list(range(9)))


@pytest.mark.parametrize(
    ("task", "names", "order"),
    [
        ("glue/sst2", ("NEGATIVE", "POSITIVE"), None),  # distilbert-base-uncased-finetuned-sst-2-english
        ("glue/sst2", ("pos", "neg"), (1, 0)),
        ("imdb", ("neg", "pos"), None),
        ("glue/mnli", ("contradiction", "neutral", "entailment"), (2, 1, 0)),  # bart-large-mnli
        ("glue/mnli-mm", ("CONTRADICTION", "NEUTRAL", "ENTAILMENT"), (2, 1, 0)),  # roberta-large-mnli
        ("glue/mnli", ("contradiction", "entailment", "neutral"), (1, 2, 0)),  # cross-encoder/nli-*
        ("glue/mrpc", ("equivalent", "not equivalent"), (1, 0)),
        ("glue/rte", ("not_entailment", "entailment"), (1, 0)),
        (
            "conll2003",  # bert-base-NER
            ("O", "B-MISC", "I-MISC", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"),
            (0, 3, 4, 5, 6, 7, 8, 1, 2),
        ),
        (
            "conll2003",
            (
                "O",
                "B-person",
                "I-person",
                "B-location",
                "I-location",
                "B-organization",
                "I-organization",
                "B-miscellaneous",
                "I-miscellaneous",
            ),
            (0, 1, 2, 5, 6, 3, 4, 7, 8),
        ),
        ("glue/mrpc", ("LABEL_0", "LABEL_1"), None),  # transformers' default
        ("glue/mrpc", ("0", "1"), None),
        ("glue/mrpc", ("a", "b", "c"), None),  # another width: that error is told by the logits
        ("glue/stsb", ("LABEL_0",), None),
        ("digits", tuple("abcdefghij"), None),  # the task has no names
    ],
)
def test_names_of_published_models(task: str, names: tuple[str, ...], order: tuple[int, ...] | None) -> None:
    """The names are those of the models in the comments; the orders are counted by hand."""
    assert task_order(Named(*names), get_task(task)) == order


def test_names_that_do_not_match_are_refused() -> None:
    """Expected and found are told, and what to do; two names for one class, and one name twice, do not match."""
    message = (
        r"glue/mrpc: .*expected not_equivalent, equivalent in any order, found toxic, fine \(id2label.*fine-tune it"
    )
    with pytest.raises(ValueError, match=message):
        task_order(Named("toxic", "fine"), MRPC)
    for names in (("equivalent", "EQUIVALENT"), ("LABEL_0", "equivalent")):
        with pytest.raises(ValueError, match="do not match"):
            task_order(Named(*names), MRPC)


def test_models_without_names() -> None:
    """timm's models have no such config; the tiny ones number their classes."""
    assert model_labels(TINY["timm_vit"]()) == ()
    assert all(model_labels(ALL[name]()) == () for name in ROWS)


def test_every_alias_names_a_class_of_its_own() -> None:
    """A name that could be two classes would make an order a guess."""
    for task in TASKS.values():
        spellings = [name.casefold() for name in task.label_names]
        spellings += [alias.casefold() for aliases in task.label_aliases.values() for alias in aliases]
        assert len(set(spellings)) == len(spellings)
    with pytest.raises(ValueError, match="label_aliases has maybe, which label_names has not"):
        replace(MRPC, label_aliases={"maybe": ("perhaps",)})


def test_a_head_in_another_order_earns_the_same_score(tmp_path: Path) -> None:
    """The rows of the head swapped and named so: equal scores, and the score says it; as numbers they are taken in the
    order of the task, which gives another score here."""
    folder, tokenizer = _mrpc(tmp_path), sentence_tokenizer()
    model = _bert(2, "not_equivalent", "equivalent")
    swapped = _permuted(model, MRPC.label_names, [1, 0])
    expected = evaluate(model, MRPC, tokenizer, data_dir=folder, progress=False)
    found = evaluate(swapped, MRPC, tokenizer, data_dir=folder, progress=False)
    assert [score.value for score in found] == [score.value for score in expected]
    assert found[0].settings == {"max_length": 128, "label_order": "equivalent, not_equivalent"}
    assert expected[0].settings == {"max_length": 128}
    swapped.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    numbered = evaluate(swapped, MRPC, tokenizer, data_dir=folder, progress=False)
    assert numbered[1].value == pytest.approx(1 - expected[1].value)
    assert expected[1].value != 0.5


def test_refused_before_data_is_read(tmp_path: Path) -> None:
    """No data is there at all."""
    with pytest.raises(ValueError, match="do not match"):
        evaluate(_bert(2, "toxic", "fine"), MRPC, sentence_tokenizer(), data_dir=tmp_path / "none")


def test_tags_in_another_order(tmp_path: Path) -> None:
    """The 13 tags of WNUT-2017 turned round: equal scores, word for word."""
    (tmp_path / "wnut17").mkdir()
    words = "".join(f"{c}\t{t}\n" for c, t in zip("abcdefgh", ["O", "B-person", "I-person", "O", "B-group"] * 2))
    (tmp_path / "wnut17" / "test.conll").write_text(words + "\nx\tO\ny\tB-location\n", encoding="utf-8")
    task, tokenizer = get_task("wnut17"), sentence_tokenizer()
    model = _bert(13, *task.label_names, name="bert_token")
    turned = _permuted(model, task.label_names, [*range(5, 13), *range(5)])
    expected = evaluate(model, task, tokenizer, data_dir=tmp_path, progress=False)
    found = evaluate(turned, task, tokenizer, data_dir=tmp_path, progress=False)
    assert [score.value for score in found] == [score.value for score in expected]
    assert found[0].settings["label_order"].startswith(task.label_names[5])
    turned.config.id2label[0] = "B-brand"
    with pytest.raises(ValueError, match=r"wnut17: .*found B-brand"):
        evaluate(turned, task, tokenizer, data_dir=tmp_path, progress=False)


HEADS = [
    name
    for name, row in ROWS.items()
    if row.kind in ("classification", "token") and name not in ("deit_teacher", "timm_vit", "timm_deit")
]


@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_every_architecture_can_be_reordered(name: str) -> None:
    """Logits before, their columns exchanged; exactly, because only rows of the last matrix move."""
    model = ALL[name]()
    batch = example_batch(model)
    with torch.no_grad():
        before = logits(model, batch)
        reorder_head_(model, (2, 0, 1))
        assert torch.equal(logits(model, batch), before[..., [2, 0, 1]])


def test_a_head_that_cannot_be_reordered() -> None:
    """DeiT's two heads."""
    with pytest.raises(ValueError, match="expected one linear layer with 3 outputs, found 2"):
        reorder_head_(ALL["deit_teacher"](), (1, 0, 2))


def test_a_model_to_train_gets_the_names_and_the_order(tmp_path: Path) -> None:
    """`load_for`: a head in another order is put into the task's; one of other classes is refused unless it will be
    trained; a new head is named; names survive saving."""
    tokenizer = sentence_tokenizer()
    model = _bert(2, "not_equivalent", "equivalent")
    swapped = _permuted(model, MRPC.label_names, [1, 0])
    save_dense(swapped, tokenizer, tmp_path / "swapped")
    loaded = load_for(str(tmp_path / "swapped"), MRPC).model
    assert model_labels(loaded) == MRPC.label_names
    batch = example_batch(model)
    with torch.no_grad():
        assert torch.equal(logits(loaded, batch), logits(model, batch))
    save_dense(loaded, tokenizer, tmp_path / "saved")
    assert model_labels(load_dense(tmp_path / "saved", kind="auto").model) == MRPC.label_names
    as_sst2 = load_for(str(tmp_path / "saved"), SST2).model
    with pytest.raises(ValueError, match=r"glue/sst2: .*do not match"):
        training_data(SST2, tokenizer, data_dir=tmp_path, model=as_sst2)
    assert model_labels(load_for(str(tmp_path / "saved"), SST2, retrain=True).model) == SST2.label_names
    assert model_labels(load_for(str(tmp_path / "saved"), MNLI).model) == MNLI.label_names  # three classes: a new head


def test_a_new_head_takes_no_order_from_old_names() -> None:
    """The config may still hold the names of a head that was thrown away."""
    model = _bert(2, "equivalent", "not_equivalent")
    weight = model.classifier.weight.clone()
    name_labels_(model, MRPC, new=("classifier.weight", "classifier.bias"))
    assert torch.equal(model.classifier.weight, weight)
    assert model_labels(model) == MRPC.label_names
