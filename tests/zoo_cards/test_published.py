"""Published numbers: every row is there as printed, and a card finds those of its model, method and task."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from squeezoo.compress.recipe import recipe_names
from squeezoo.eval import TASKS
from squeezoo.eval.task import Score
from squeezoo.zoo_cards.card import Card, ScoreRow
from squeezoo.zoo_cards.datasets import describe_task
from squeezoo.zoo_cards.published_costs import costs_for, published_costs
from squeezoo.zoo_cards.published_models import is_same_model
from squeezoo.zoo_cards.published_scores import published_for, published_scores
from squeezoo.zoo_cards.published_section import published
from squeezoo.zoo_cards.published_tables import FOLDER, PublishedError, number, published_table, published_tables

# columns of words; every other cell is a number or empty
WORDS = {
    "reference_model", "method", "model", "setting", "task", "metric", "claim", "quantity", "note", "precision",
    "weight_quantizer", "activation_quantizer", "initialization", "zero_alignment", "optimizer", "lr_schedule",
    "train_samples", "tasks", "learning_rates", "rho", "batch_sizes", "gpu", "split_train_dev_test", "corpus",
    "imp_model", "mlm_probability", "pruning_step",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.csv")))
def test_every_row_parses(name: str) -> None:
    """Source: the columns' own names: all but the words hold numbers, or nothing where the paper printed nothing."""
    table = published_table(name)
    lines = (FOLDER / f"{name}.csv").read_text(encoding="utf-8").splitlines()
    assert len(table.rows) == len(lines) - 1
    assert table.paper.citation.startswith(("Chong Yu", "Naigang Wang", "Connor Holmes", "Joao Carlos"))
    for row in table.rows:
        for column, cell in row.items():
            if column not in WORDS and cell:
                assert number(cell) is not None, (column, cell)


def test_all_tables_of_the_four_papers_are_described() -> None:
    """Source: the folder: as many tables as files; 16 numbered notes and one more about names."""
    tables = published_tables()
    assert {table.name for table in tables} == {path.stem for path in FOLDER.glob("*.csv")}
    assert len(tables) == 30
    assert {note.number for table in tables for note in table.notes} == set(range(1, 17))


def find(**wanted: object) -> list[tuple[str, str, str]]:
    found = [s for s in published_scores() if all(getattr(s, key) == value for key, value in wanted.items())]
    return [(score.method, score.dense, score.compressed) for score in found]


def test_known_rows_are_found() -> None:
    """Source: read off the papers: Yu et al. 2023 Tables 1 to 4, Wang et al. 2022 Table 4, Holmes et al. 2021 Tables 1
    and 2, Antunes 2021 Table A.1."""
    gemm = ("gpusq-gemm-int8",)
    mrpc = ("glue/mrpc",)
    assert find(model="BERT-base", tasks=mrpc, recipes=gemm) == [("GPUSQ-TLM_GEMM", "88.9", "89.1")]
    assert find(model="BERT-large", tasks=("squad1",), metric="f1", recipes=gemm) == [
        ("GPUSQ-TLM_GEMM", "90.9", "91.9")
    ]
    assert find(model="OPT-125M", recipes=gemm) == [("GPUSQ-TLM_GEMM", "15.09", "15.17")]
    assert find(model="BART", tasks=("xsum",), recipes=gemm) == [("GPUSQ-TLM_GEMM", "36.61", "36.73")]
    assert find(model="DistilBERT", tasks=mrpc, method="DistilBERT_GPUSQ") == [("DistilBERT_GPUSQ", "87.5", "87.7")]
    assert find(model="BERT-base", tasks=mrpc, recipes=("asp-2-4",)) == [("ASP", "91.7", "88.1")]
    assert find(model="DistilBERT", tasks=("glue/rte",), recipes=("nxm-admm",)) == [
        ("DistilBERT-NxMTransformer", "63.5", "59.2")
    ]
    assert find(model="Wav2vec2", recipes=("deepcomp-sparse-int4",)) == [("INT4, 50 % sparse", "4.20", "4.65")]
    assert find(model="GPT-2 small", metric="bleu", recipes=("imp-30",)) == [("IMP", "2.362", "2.682")]
    assert find(tasks=("conll2003",), metric="f1", recipes=("dq",)) == [("DQ", "0.941", "0.894")]


def test_typos_are_noted_where_they_are() -> None:
    """Source: the notes: 82.47 is printed for 84.47 (ViT, INT8), and in no other cell of that column."""
    vit = [score for score in published_scores() if score.model == "ViT-base/16"]
    assert [(score.compressed, [note.number for note in score.notes]) for score in vit] == [
        ("82.47", [1]), ("84.03", []), ("83.49", []), ("83.60", []),
    ]  # fmt: skip


def test_recipes_and_tasks_exist_here() -> None:
    """Source: the package's own lists; tasks that are patterns are for data sets with variants."""
    scores = published_scores()
    assert {recipe for score in scores for recipe in score.recipes} <= set(recipe_names())
    assert {task for score in scores for task in score.tasks if "*" not in task} <= set(TASKS)


def test_the_model_itself_comes_before_its_family(card: Card, new_score: Callable[..., Score]) -> None:
    """Source: Table 1 holds BERT-base and BERT-large; MiniLM is neither, so both are shown, as other models."""
    score = new_score(0.9)
    bert = replace(card.base, name="bert-base-uncased", hub_id="google-bert/bert-base-uncased")
    found = published_for(bert, "gpusq-gemm-int8", score)
    assert [(p.model, p.compressed, is_same_model(p.model, bert)) for p in found] == [("BERT-base", "95.3", True)]
    family = published_for(card.base, "gpusq-gemm-int8", score)
    assert {p.model for p in family} >= {"BERT-base", "BERT-large"}
    assert not any(is_same_model(p.model, card.base) for p in family)
    distil = replace(card.base, name="distilbert-base-uncased", hub_id=None, adapter="distilbert")
    assert [p.model for p in published_for(distil, "gpusq-gemm-int8", score)] == ["DistilBERT"]
    assert published_for(bert, "wanda-2-4", score) == ()
    assert published_for(replace(bert, adapter="vit", name="deit", hub_id=None), "gpusq-gemm-int8", score) == ()
    assert published_for(bert, "gpusq-gemm-int8", new_score(0.9, metric="f1")) == ()


def test_known_costs_are_found(card: Card) -> None:
    """Source: read off the papers: Yu et al. 2023 Tables 1 and 2, Wang et al. 2022 section 2.4, Antunes 2021 Tables 5.1
    and 5.6 and Figure 5.1(c)."""

    def found(recipe: str, task: str, name: str, adapter: str, what: str) -> list[tuple[str, str, list[int]]]:
        base = replace(card.base, name=name, hub_id=None, adapter=adapter)
        costs = [cost for cost in costs_for(base, recipe, [task]) if what in cost.what]
        return [(cost.dense, cost.compressed, [note.number for note in cost.notes]) for cost in costs]

    bert = ("bert-base-uncased", "bert")
    assert found("gpusq-gemm-int8", "glue/mrpc", *bert, "speed-up") == [("1", "3.73", []), ("1", "4.92", [])]
    assert found("gpusq-gemm-int8", "glue/mrpc", "distilbert", "distilbert", "batch 32") == [("1.93", "8.34", [])]
    assert found("sparsegpt-2-4", "wikitext2/token", "facebook/opt-13b", "opt", "batch 1,") == [("1", "1.07", [7])]
    assert found("deepcomp-sparse-int4", "squad1", *bert, "modelled") == [("1", "1.25", [])]
    assert found("dq", "imdb/halves", *bert, "Raspberry") == [("10.000", "4.850", [15])]
    assert found("dq", "imdb/halves", *bert, "GPU") == [("0.003", "0.286", [13])]
    assert found("pkd-6", "imdb/halves", *bert, "Wh") == [("361.77", "186.05", [12])]
    assert found("imp-dq", "personachat", "gpt2", "gpt2", "size") == [("650", "280", [10])]
    assert found("dq", "glue/mrpc", *bert, "") == []  # the thesis measured other tasks
    assert {recipe for cost in published_costs() for recipe in cost.recipes} <= set(recipe_names())


def test_measured_numbers_are_shown_in_the_papers_unit(new_card: Callable[..., Card], new_score: Callable) -> None:
    """Source: Table A.1 prints fractions (0.938 and 0.934), Table 1 percentages: 0.521 becomes 52.10 beside 52.1."""
    imdb = {"task": "imdb/halves", "split": "test", "samples": 12_500, "settings": {}}
    base = replace(new_card().base, name="bert-base-cased", hub_id=None)
    rows = (ScoreRow("dense", new_score(0.94, **imdb)), ScoreRow("compressed", new_score(0.93, **imdb)))
    recipe = replace(new_card().recipe, name="dq")
    card = new_card(
        name="bert.imdb.dq", base=base, recipe=recipe, scores=rows, published=(),
        data=(replace(describe_task("glue/sst2"), task="imdb/halves", name="IMDb"),),
    )  # fmt: skip
    text = published(card)
    assert "| IMDb test | accuracy | BERT-base, DQ | 25 % of all reviews | Antunes 2021, Table A.1 |" in text
    assert text.splitlines()[4].endswith("| 0.94 | 0.93 | 0.938 | 0.934 |")
    assert "| size, MB | BERT-base, DQ | Antunes 2021, Table 5.1 [10] | 440 | 175 |" in text
    assert "- [10] Section 5.3 prints" in text
    assert "another model" not in text
    cola = {"task": "glue/cola", "metric": "matthews", "samples": 100, "complete": False}
    rows = (ScoreRow("dense", new_score(0.521, **cola)), ScoreRow("compressed", new_score(0.5, **cola)))
    card = new_card(base=base, scores=rows, data=(describe_task("glue/cola"),), published=())
    assert "| 52.10 | 50.00 | 52.1 | 52.2 |" in published(card)
    assert "dev (sample)" in published(card)


def test_broken_tables_are_named(tmp_path: Path) -> None:
    """Source: the house's rule for errors: the file, the line, what was expected."""
    folder = tmp_path / "published"
    shutil.copytree(FOLDER, folder)
    with pytest.raises(PublishedError, match=r"unknown published table 'gpusq_table1'.*did you mean"):
        published_table("gpusq_table1", folder)
    path = folder / "gpusq_tlm_table3.csv"
    path.write_text(path.read_text(encoding="utf-8") + "GPUSQ,1\n", encoding="utf-8")
    with pytest.raises(PublishedError, match=r"gpusq_tlm_table3.csv, line 5: expected 5 cells, found 2"):
        published_table("gpusq_tlm_table3", folder)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(PublishedError, match=r"gpusq_tlm_table3.csv cannot be read"):
        published_table("gpusq_tlm_table3", folder)
    sources = json.loads((folder / "sources.json").read_text(encoding="utf-8"))
    sources["notes"][0]["columns"] = ["no such"]
    (folder / "sources.json").write_text(json.dumps(sources), encoding="utf-8")
    with pytest.raises(PublishedError, match="note 1 names no column of deep_compression_table4"):
        published_table("deep_compression_table4", folder)
    (folder / "sources.json").write_text("{", encoding="utf-8")
    with pytest.raises(PublishedError, match=r"sources.json cannot be read"):
        published_table("gpusq_tlm_table1", folder)
