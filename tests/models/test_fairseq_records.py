"""The records of fairseq's own modules, on stand-ins with the same names (tests/extras has the real ones)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import standins
import torch
from squeezoo.compress.attach import attach_, compressed_weights, fold_, prune_
from squeezoo.compress.calibrate import calibrate_
from squeezoo.compress.masks import Pattern, check_nm
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.models import adapter_for, find_sites
from squeezoo.models.fairseq_build import build_fairseq, call_projections_
from squeezoo.models.fairseq_checkpoint import FairseqCheckpoint


def recipe(**rule: Any) -> Recipe:
    stages = [{"stage": "prune"}, *([{"stage": "calibrate"}] if rule else [])]
    text = {"name": "test", "description": "test", "source": "test", "stages": stages}
    return Recipe.parse({**text, "rules": [{"roles": ["block", "final"], "sparsity": "2:4", **rule}]})


def test_bart() -> None:
    """2 encoder blocks of 6 GEMMs, 1 decoder block of 10 (ALGORITHMS A.3); the output projection is the embedding."""
    model = standins.bart(head=("mnli", 3))
    adapter = adapter_for(model)
    sites = find_sites(model, adapter)
    assert adapter.name == "fairseq_bart"
    assert Counter(block.kind for block in sites.blocks) == {"encoder": 2, "decoder": 1}
    assert len(sites.gemms) == 2 * 6 + 10
    assert Counter(gemm.role for gemm in sites.gemms)["cross_out"] == 1
    assert Counter(entry.kind for entry in sites.attention) == {"self": 3, "cross": 1}
    assert sites.attention[0].head_dim == 8
    assert sites.final is not None
    assert sites.final_tied
    assert [gemm.name for gemm in sites.pooler] == [f"classification_heads.mnli.{n}" for n in ("dense", "out_proj")]


@pytest.mark.parametrize("ctc", [False, True])
def test_wav2vec2(ctc: bool) -> None:
    """Six GEMMs a block; the projection after the convolutions is no site, CTC's own projection is the final one."""
    model, _ = standins.wav2vec_ctc() if ctc else standins.wav2vec2()
    sites = find_sites(model, adapter_for(model))
    assert sites.adapter.name == "fairseq_wav2vec2"
    assert len(sites.gemms) == 2 * 6
    assert (sites.final.name if sites.final else None) == ("w2v_encoder.proj" if ctc else None)
    assert not any("post_extract" in gemm.name for gemm in sites.gemms)


def test_masks_reach_attention_that_reads_weights_without_calling_the_linears() -> None:
    """fairseq's attention hands `.weight` to a function; the parametrization is seen there, trained under its mask."""
    model, batch = standins.bart(), standins.tokens()
    with torch.no_grad():
        dense = model(*batch)
    attach_(model, make_plan(model, recipe()))
    with torch.no_grad():
        assert torch.allclose(model(*batch), dense, atol=1e-5)  # masks are all true so far
    prune_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: module.weight.detach().clone() for name, module, _ in compressed_weights(model)}
    model(*batch).square().mean().backward()
    optimizer.step()
    for name, module, _ in compressed_weights(model):
        assert check_nm(module.weight, Pattern(2, 4)), name
        if name.endswith("q_proj"):
            assert not torch.equal(module.weight, before[name]), name
    with torch.no_grad():
        pruned = model(*batch)
    fold_(model)
    with torch.no_grad():
        assert torch.equal(model(*batch), pruned)
    assert model.state_dict().keys() == standins.bart().state_dict().keys()


def test_input_quantizers_need_the_linears_to_be_called() -> None:
    """Without `call_projections_` the inputs of the attention's linears would silently stay float."""
    model, batch = standins.bart(), standins.tokens()
    assert call_projections_(model) == 4
    lsq = {"method": "lsq", "bits": 4}
    attach_(model, make_plan(model, recipe(weight=lsq, input=lsq)))
    prune_(model)
    scales = calibrate_(model, [{"x": batch[0]}], call=lambda m, _: m(*batch))
    assert len(scales) == 3 * (4 - 2) + (4 - 1) + 3 * 2  # q, k, v of a block share one scale, cross k and v another
    with torch.no_grad():
        quantized = model(*batch)
        for name, module in model.named_modules():
            if name.endswith("self_attn"):
                module.skip_embed_dim_check = False
        assert not torch.allclose(model(*batch), quantized)


def test_fairseq_is_an_extra() -> None:
    """Where it is not installed, the error says how to get it and what works without."""
    try:
        import fairseq  # noqa: F401
    except ImportError:
        with pytest.raises(Exception, match=r"CONTRIBUTING.md, section Extras.*to_transformers"):
            build_fairseq(FairseqCheckpoint("bart", {}, {}, {}))
    else:
        pytest.skip("fairseq is installed: tests/extras builds its models")
