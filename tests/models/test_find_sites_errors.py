"""find_sites: every mistake in a record, or between a record and a model, that it must catch and name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
from squeezoo.models import AdapterError, find_sites
from squeezoo.models.adapter import Adapter, AttentionSite
from squeezoo.models.bert import BERT


def with_site(which: str, **changes: Any) -> Adapter:
    """BERT's record with the site of that pattern changed."""
    sites = tuple(replace(site, **changes) if site.pattern == which else site for site in BERT.gemms)
    assert sites != BERT.gemms
    return replace(BERT, gemms=sites)


QUERY = r"attention\.self\.query"
MISTAKES = {
    "pattern matches nothing": (
        with_site(QUERY, pattern=r"attention\.self\.querry"),
        [r"'attention\\.self\\.querry'", "matches no module", "attention.self.query", "transformers 5", ">=5.10,<6"],
    ),
    "no block": (
        replace(BERT, block=r"bert\.encoder\.layers\.(\d+)"),
        ["block pattern", "matches no module", "bert.encoder.layer.0", "transformers>=5.10,<6"],
    ),
    "attention pattern matches nothing": (
        replace(BERT, attention=(AttentionSite(r"attention\.core"),)),
        ["attention pattern", "matches no module", "attention.self"],
    ),
    "activation pattern matches nothing": (
        replace(BERT, activation=r"intermediate\.act"),
        ["activation pattern", "intermediate.intermediate_act_fn"],
    ),
    "patterns are matched to the end": (
        with_site(r"output\.dense", pattern="output"),
        ["`bert.encoder.layer.0.output` is a BertOutput", "no linear"],
    ),
    "two claims": (
        with_site(r"attention\.self\.key", pattern=r"attention\.self\.(?:key|query)"),
        ["`bert.encoder.layer.0.attention.self.query` is claimed by two patterns", "narrower"],
    ),
    "wrong layout": (
        with_site(QUERY, layout="in_out"),
        ["`bert.encoder.layer.0.attention.self.query` is a Linear", "write layout='out_in'"],
    ),
    "not a matrix": (
        with_site(QUERY, pattern=r"output\.LayerNorm"),
        ["is a LayerNorm, which is no linear", "2-D"],
    ),
    "wrong count": (replace(BERT, per_block=7), ["`bert.encoder.layer.0` has 6 GEMMs, expected 7"]),
    "forgotten linear": (
        replace(BERT, gemms=BERT.gemms[:-1], per_block=5),
        ["no pattern claims output.dense", "left_dense"],
    ),
    "not three parts": (
        with_site(QUERY, parts=3),
        ["32 rows cannot be cut in three", "parts=1"],
    ),
    "unknown role": (with_site(QUERY, role="query"), ["'query'", "ffn_up"]),
    "unknown layout": (with_site(QUERY, layout="oi"), ["'oi'", "out_in, in_out"]),
    "unknown parts": (with_site(QUERY, parts=2), ["says 2", "1, 3"]),
    "not a regular expression": (with_site(QUERY, pattern="attention.(self"), ["no regular expression"]),
    "no group in block": (replace(BERT, block=r"bert\.encoder\.layer\.\d+"), ["has 0 groups", r"(\d+)"]),
    "two groups in block": (replace(BERT, block=r"(bert\.)?encoder\.layer\.(\d+)"), ["has 2 groups", "(?:...)"]),
    "two final projections": (
        replace(BERT, final_projection=r"classifier|bert\.pooler\.dense"),
        ["matches bert.pooler.dense, classifier", "expected one"],
    ),
    "final is no matrix": (replace(BERT, final_projection="dropout"), ["`dropout` is a Dropout"]),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_mistakes_are_named(mistake: str) -> None:
    """Each message must hold what was expected, what was found and what to write: the words beside the mistake."""
    record, words = MISTAKES[mistake]
    model = tiny.TINY["bert"]()
    with pytest.raises(AdapterError) as caught:
        find_sites(model, record)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_left_dense_names_a_linear_that_stays() -> None:
    """The documented way out of the forgotten-linear error."""
    record = replace(BERT, gemms=BERT.gemms[:-1], per_block=5, left_dense=(r"output\.dense",))
    sites = find_sites(tiny.TINY["bert"](), record)
    assert "ffn_down" not in {gemm.role for gemm in sites.gemms}
    assert {block.activation for block in sites.blocks} == {None}


def test_block_that_lacks_a_gemm() -> None:
    """One block differs from the others: the message names the block and the pattern without a match in it."""
    model = tiny.TINY["bert"]()
    del model.bert.encoder.layer[1].output.dense
    with pytest.raises(AdapterError, match=r"encoder\.layer\.1` has 5 GEMMs, expected 6; no module matches 'output"):
        find_sites(model, BERT)


def test_cross_attention_is_not_left_out_in_silence() -> None:
    """A BERT decoder has 4 more linears in each block (transformers' BertLayer), which the record does not claim."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        is_decoder=True,
        add_cross_attention=True,
    )
    with pytest.raises(AdapterError, match=r"no pattern claims crossattention\.self\.query"):
        find_sites(BertModel(config), BERT)


def test_library_that_is_not_installed_is_said() -> None:
    """The note on versions must not fail where the library itself is missing."""
    record = replace(BERT, library="no-such-library>=1", block=r"x(\d+)")
    with pytest.raises(AdapterError, match=r"no-such-library is not installed.*no-such-library>=1"):
        find_sites(tiny.TINY["bert"](), record)
