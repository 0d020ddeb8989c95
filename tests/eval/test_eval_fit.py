"""A model that cannot do a task is refused before anything is read; expected texts: what the models of tiny.py are."""

from __future__ import annotations

import pytest
from squeezoo.eval import get_task
from squeezoo.eval.fit import check_head, check_labels, check_reads, head_kind, reads, tasks_for
from squeezoo.pipeline import training_data
from tiny import ALL, ROWS, TINY


def test_what_the_model_reads() -> None:
    check_reads(TINY["bert"](), get_task("glue/sst2"))
    check_reads(TINY["vit"](), get_task("digits"))
    with pytest.raises(ValueError, match="digits is a task on images, but BertForSequenceClassification reads text"):
        check_reads(TINY["bert"](), get_task("digits"))
    with pytest.raises(ValueError, match="glue/mrpc is a task on text, but VisionTransformer reads images"):
        check_reads(TINY["timm_vit"](), get_task("glue/mrpc"))


def test_how_many_labels_it_has() -> None:
    """The tiny models have 3 labels, digits has 10."""
    message = r"digits has 10 labels, VisionTransformer has a head for 3: .*squeezoo finetune MODEL --task digits"
    with pytest.raises(ValueError, match=message):
        check_labels(TINY["timm_vit"](), get_task("digits"))
    with pytest.raises(ValueError, match=message):
        training_data("digits", None, model=TINY["timm_vit"]())


@pytest.mark.parametrize("name", list(ROWS))
def test_head_of_every_architecture(name: str) -> None:
    """Expected: what each tiny model is for, as tests/tiny.py lists it."""
    model = ALL[name]()
    assert head_kind(model) == ROWS[name].kind
    images, sound = ("vit", "timm_vit", "dinov2"), ("wav2vec2",)
    adapter = ROWS[name].adapter
    assert reads(model) == ("images" if adapter in images else "sound" if adapter in sound else "text")


def test_wrong_head() -> None:
    """A model is told what it is and what the task needs."""
    with pytest.raises(ValueError, match="wnut17 needs a model of kind 'token', BertForSequenceClassification is of"):
        check_head(TINY["bert"](), get_task("wnut17"))
    with pytest.raises(ValueError, match="BertForMaskedLM reads in both directions and has no perplexity"):
        check_head(ALL["bert_mlm"](), get_task("wikitext2/token"))
    with pytest.raises(ValueError, match="wnut17 has 13 labels, BertForTokenClassification has a head for 3"):
        training_data("wnut17", None, model=ALL["bert_token"]())


def test_families_mean_the_members_that_fit() -> None:
    """The tiny BERT has 3 labels, as MNLI; the tiny GPT-2 is a causal language model; names stand for themselves."""
    three = [task.name for task in tasks_for(TINY["bert"](), "glue, glue/sst2")]
    assert three == ["glue/sst2", "glue/mnli", "glue/mnli-mm"]  # in the order of the family
    causal = [task.name for task in tasks_for(ALL["gpt2"](), "wikitext2")]
    assert causal == ["wikitext2/token", "wikitext2/sliding", "wikitext2/word"]
    assert [task.name for task in tasks_for(ALL["bert_mlm"](), "wikitext2")] == ["wikitext2/masked"]
    with pytest.raises(ValueError, match="no task of the family 'glue' fits GPT2LMHeadModel, which is of kind"):
        tasks_for(ALL["gpt2"](), "glue")
    named = ALL["bert"]()
    named.config.id2label = {0: "contradiction", 1: "neutral", 2: "entailment"}
    assert [task.name for task in tasks_for(named, "glue")] == ["glue/mnli", "glue/mnli-mm"]
    named.config.id2label = {0: "red", 1: "green", 2: "blue"}
    with pytest.raises(ValueError, match="no task of the family 'glue' fits BertForSequenceClassification"):
        tasks_for(named, "glue")
    with pytest.raises(ValueError, match="unknown task 'gleu/sst2'"):
        tasks_for(TINY["bert"](), "gleu/sst2")
