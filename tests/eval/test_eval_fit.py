"""A model that cannot do a task is refused before anything is read; expected texts: what the models of tiny.py are."""

from __future__ import annotations

import pytest
from squeezoo.eval import get_task
from squeezoo.eval.fit import check_labels, check_reads
from squeezoo.pipeline import training_data
from tiny import TINY


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
