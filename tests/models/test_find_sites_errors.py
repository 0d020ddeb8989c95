"""find_sites: every mistake in a record, or between a record and a model, that it must catch and name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
from squeezoo.compress.attach import attach_
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.models import AdapterError, adapter_for, find_sites
from squeezoo.models.adapter import Adapter, AttentionSite, Permutable
from squeezoo.models.bert import BERT
from torch import nn


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
    "kinds without numbers": (
        replace(BERT, block=r"(?P<kind>bert)\.encoder\.layer\.(\d+)"),
        ["per_block=6 do not go together", "(?P<kind>...)"],
    ),
    "numbers without kinds": (replace(BERT, per_block={"encoder": 6}), ["do not go together", "blocks of one kind"]),
    "unknown kind": (
        replace(BERT, block=r"(?P<kind>bert)\.encoder\.layer\.(\d+)", per_block={"encoder": 6}),
        ["finds blocks of kind 'bert', per_block knows encoder"],
    ),
    "two attention maps in a block": (
        replace(BERT, attention=(AttentionSite(r"attention\.self"), AttentionSite(r"attention\.output"))),
        ["`bert.encoder.layer.0` has 2 self-attention maps", "expected 1 by its q/qkv GEMMs"],
    ),
    "cross attention where there is none": (
        replace(BERT, attention=(AttentionSite(r"attention\.self", "cross"),)),
        ["has 1 cross-attention maps", "expected 0"],
    ),
    "unknown role to permute": (replace(BERT, permutable=(Permutable("final", ("ffn_up",)),)), ["'final'", "ffn_up"]),
    "embeddings match nothing": (
        replace(BERT, embeddings=r"bert\.embedings\.word_embeddings"),
        ["embeddings pattern", "matches no module", "bert.embeddings.word_embeddings"],
    ),
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


def renamed(name: str, renames: dict[str, str]) -> nn.Module:
    """A tiny model in which the children of those names have others, as after a new release of the library."""
    model = tiny.ALL[name]()
    for module in list(model.modules()):
        module._modules = {renames.get(child, child): m for child, m in module._modules.items()}
    return model


@pytest.mark.parametrize(
    ("name", "renames", "words"),
    [
        (
            "bert",
            {"query": "q_proj", "key": "k_proj", "intermediate_act_fn": "act", "word_embeddings": "words"},
            [r"'attention\\.self\\.query'", r"'attention\\.self\\.key'", "GEMM pattern", "activation pattern"],
        ),
        ("gpt2", {"c_attn": "qkv", "mlp": "ffn"}, [r"'attn\\.c_attn'", r"'mlp\\.c_fc'", r"'mlp\\.c_proj'", "ffn.c_fc"]),
        ("bart", {"encoder_attn": "cross"}, ["'encoder_attn'", r"'encoder_attn\\.q_proj'", "cross.q_proj"]),
        ("wav2vec2", {"layers": "blocks"}, ["block pattern", "wav2vec2.encoder.blocks.0"]),
        ("timm_vit", {"blocks": "stages"}, ["block pattern", "stages.0"]),
    ],
)
def test_renamed_modules_are_all_listed_and_nothing_is_attached(
    name: str, renames: dict[str, str], words: list[str]
) -> None:
    """Every pattern that matches nothing, the nearest names, the installed version; the model is as it was."""
    model = renamed(name, renames)
    before = [(child, type(module)) for child, module in model.named_modules()]
    with pytest.raises(AdapterError) as caught:
        attach_(model, make_plan(model, Recipe.load("magnitude-2-4")))
    for word in (*words, "matches no module", "nearest names", "is installed, the names were checked against"):
        assert word in str(caught.value), str(caught.value)
    assert [(child, type(module)) for child, module in model.named_modules()] == before
    assert str(caught.value).count("matches no module") >= len([word for word in words if word.startswith("'")])


def test_one_lost_pattern_of_many_is_the_only_one_named() -> None:
    """What still fits is not listed."""
    with pytest.raises(AdapterError) as caught:
        find_sites(renamed("opt", {"fc2": "down"}), adapter_for(tiny.ALL["opt"]()))
    assert str(caught.value).count("matches no module") == 1
    assert "'fc2'" in str(caught.value)
