"""Compression of fairseq's live modules, and of its files: .pt in, Squeezoo checkpoint out, .pt back.

Runs in the environment that `make test-extras` builds; elsewhere it is skipped.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import standins
import torch
from extras.fairseq_models import VOCABULARY, audio, fairseq_bart, fairseq_ctc, fairseq_loads, fairseq_wav2vec2
from squeezoo.compress.attach import attach_, fold_, prune_
from squeezoo.compress.attention_doors import attach_attention_, detach_attention_
from squeezoo.compress.calibrate import calibrate_
from squeezoo.compress.checkpoint import load
from squeezoo.compress.engine import compress
from squeezoo.compress.masks import Pattern, check_nm
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.train_data import TrainData
from squeezoo.models import adapter_for, find_sites
from squeezoo.models.dense import Dense
from squeezoo.models.fairseq_build import build_fairseq, call_projections_
from squeezoo.models.fairseq_checkpoint import FairseqCheckpoint, load_fairseq_checkpoint, save_fairseq_checkpoint
from squeezoo.models.fairseq_convert import from_transformers, to_transformers
from squeezoo.models.torchvision_guard import ensure_torchvision_importable

ensure_torchvision_importable()
pytest.importorskip("fairseq", reason="fairseq is not installed: make test-extras builds an environment that has it")


@pytest.mark.parametrize("name", ["bart", "wav2vec2", "ctc"])
def test_live_modules_are_pruned_trained_and_folded(name: str) -> None:
    """attach on fairseq's own modules: 2:4 in the weights that its attention reads, kept by a training step."""
    model: Any
    waves, padding = audio()
    if name == "bart":
        model, (source, target) = fairseq_bart()[0], standins.tokens()
        call, counts = (lambda: model(source, None, target)[0]), 2 * 6 + 10
    elif name == "wav2vec2":
        model, counts = fairseq_wav2vec2()[0], 12
        call = lambda: model(waves, padding_mask=padding, mask=False, features_only=True)["x"]  # noqa: E731
    else:
        model, counts = fairseq_ctc()[0], 12
        call = lambda: model(source=waves, padding_mask=padding)["encoder_out"]  # noqa: E731
    sites = find_sites(model, adapter_for(model))
    assert len(sites.gemms) == counts
    assert (sites.final is not None) == (name != "wav2vec2")
    keys = model.state_dict().keys()
    with torch.no_grad():
        dense = call()
    recipe = Recipe.load("magnitude-2-4")
    attach_(model, make_plan(model, recipe))
    with torch.no_grad():
        assert torch.allclose(call(), dense, atol=1e-5)
    prune_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    call().square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        trained = call()
    assert not torch.allclose(trained, dense, atol=1e-3)
    fold_(model)
    assert model.state_dict().keys() == keys
    with torch.no_grad():
        assert torch.allclose(call(), trained, atol=1e-6)
    weights = dict(model.named_modules())
    assert all(check_nm(weights[gemm.name].weight, Pattern(2, 4)) for gemm in sites.gemms)


def test_live_input_quantizers() -> None:
    """int8 inputs and weights on a live BART equal those on the transformers model of the same weights."""
    model, args = fairseq_bart()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted = to_transformers(FairseqCheckpoint("bart", vars(args), {}, state))
    assert call_projections_(model) == 4
    source, target = standins.tokens()
    lsq = {"method": "lsq", "bits": 8}
    text = {"name": "t", "description": "t", "source": "t", "stages": [{"stage": "calibrate"}]}
    recipe = Recipe.parse({**text, "rules": [{"roles": ["block"], "weight": lsq, "input": lsq}]})
    inputs = {"input_ids": source[:1], "decoder_input_ids": target[:1]}
    outputs = []
    for m, call in (
        (model, lambda m, _: m(source[:1], None, target[:1])[0]),
        (converted, lambda m, _: m(**inputs).logits),
    ):
        attach_(m, make_plan(m, recipe))
        scales = calibrate_(m, [inputs], call=call)
        with torch.no_grad():
            outputs.append((call(m, None), sorted(scales.values())))
    (ours, scales), (theirs, their_scales) = outputs
    assert scales == pytest.approx(their_scales, rel=1e-5)
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_attention_maps_through_fairseqs_door(pattern: str) -> None:
    """N of M kept in fairseq's attention equals the same in the transformers model of the same weights."""
    model, args = fairseq_bart()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted = to_transformers(FairseqCheckpoint("bart", vars(args), {}, state))
    source, target = standins.tokens()
    none = dict(sparsity=pattern, renormalize=False, q=None, k=None, p=None, v=None)
    results = []
    with torch.no_grad():
        dense = model(source, None, target)[0]
        for m, call in (
            (model, lambda: model(source, None, target)[0]),
            (converted, lambda: converted(source, source.ne(1).long(), decoder_input_ids=target).logits),
        ):
            maps = [SimpleNamespace(name=entry.name, **none) for entry in find_sites(m, adapter_for(m)).attention]
            assert len(maps) == 4
            for compressor in attach_attention_(m, maps).values():
                compressor.active = True
            results.append(call())
        real = target.ne(standins.PAD)
        assert torch.allclose(results[0][real], results[1][real], atol=1e-5)
        assert not torch.allclose(results[0], dense, atol=1e-3)
        detach_attention_(model)
        assert torch.allclose(model(source, None, target)[0], dense, atol=1e-6)


@pytest.mark.parametrize("recipe_name", ["magnitude-2-4", "gpusq-gemm-int8"])
def test_a_fairseq_file_is_compressed_and_goes_back_to_fairseq(tmp_path: Path, recipe_name: str) -> None:
    """.pt in, Squeezoo checkpoint out, and its weights in a .pt that fairseq loads: 2:4, with the same outputs."""
    model, args = fairseq_bart(("mnli", 3))
    standins.save(model, tmp_path / "bart.pt", args=args)
    checkpoint = load_fairseq_checkpoint(tmp_path / "bart.pt")
    dense = Dense(to_transformers(checkpoint), None, "bart.pt", None, "transformers")
    recipe = Recipe.load(recipe_name)
    if recipe_name != "magnitude-2-4":
        recipe = recipe.override(epochs=1, learning_rate=1e-4, batch_size=4)
    made = compress(dense, recipe, training_data(), tmp_path / "out")
    compressed = load(made.folder, backend="dense")
    back = from_transformers(compressed, like=checkpoint)
    save_fairseq_checkpoint(back, tmp_path / "small.pt")
    live = build_fairseq(load_fairseq_checkpoint(tmp_path / "small.pt"))
    source, target = standins.tokens()
    with torch.no_grad():
        ours = compressed(input_ids=source, attention_mask=source.ne(standins.PAD).long()).logits
        theirs = live(source, None, target, classification_head_name="mnli")[0]
        before = model(source, None, target, classification_head_name="mnli")[0]
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(theirs, before, atol=1e-3)
    weights = dict(live.named_modules())
    blocks = [gemm.name for gemm in find_sites(live, adapter_for(live)).gemms]
    assert all(check_nm(weights[name].weight, Pattern(2, 4)) for name in blocks)
    fairseq_loads(tmp_path / "small.pt")


def training_data() -> TrainData:
    """16 random sources of 8 tokens and EOS, three labels."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(standins.SPECIAL, VOCABULARY, (16, 9), generator=generator)
    ids[:, 8] = standins.EOS
    labels = torch.randint(3, (16,), generator=generator)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": y} for row, y in zip(ids, labels)]
    return TrainData(rows, lambda features: {key: torch.stack([f[key] for f in features]) for key in features[0]})
