"""fairseq itself: conversions both ways, and its own loader on the files we write. Expected outputs are fairseq's.

Runs in the environment that `make test-extras` builds; elsewhere it is skipped.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from extras.fairseq_models import (
    audio,
    audio_task,
    fairseq_bart,
    fairseq_ctc,
    fairseq_loads,
    fairseq_wav2vec2,
    same,
)  # fmt: skip
from squeezoo.models.fairseq_build import build_fairseq
from squeezoo.models.fairseq_checkpoint import load_fairseq_checkpoint, save_fairseq_checkpoint
from squeezoo.models.fairseq_convert import from_transformers, to_transformers
from squeezoo.models.torchvision_guard import ensure_torchvision_importable
from torch import Tensor

ensure_torchvision_importable()
pytest.importorskip("fairseq", reason="fairseq is not installed: make test-extras builds an environment that has it")

VARIANTS = [("default", False, 16), ("layer_norm", True, 24), ("default", True, 24), ("layer_norm", False, 16)]


@pytest.mark.parametrize("head", [None, ("mnli", 3)])
def test_bart_both_ways(tmp_path: Path, head: tuple[str, int] | None) -> None:
    model, args = fairseq_bart(head)
    standins.save(model, tmp_path / "bart.pt", args=args)
    checkpoint = load_fairseq_checkpoint(tmp_path / "bart.pt")
    converted = to_transformers(checkpoint)
    source, target = standins.tokens()
    mask = source.ne(standins.PAD).long()
    if head is None:
        inputs = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}
        call, real = (lambda m: m(source, None, target)[0]), target.ne(standins.PAD)
    else:
        inputs, real = {"input_ids": source, "attention_mask": mask}, torch.ones(2, dtype=torch.bool)
        call = lambda m: m(source, None, target, classification_head_name="mnli")[0]  # noqa: E731
    with torch.no_grad():
        expected, found = call(model), converted(**inputs).logits
    assert torch.allclose(found[real], expected[real], atol=1e-5)
    for made in (from_transformers(converted, like=checkpoint), from_transformers(converted)):
        if head is None or made.args is checkpoint.args:
            assert same(made.state, dict(model.state_dict()))
        save_fairseq_checkpoint(made, tmp_path / "back.pt")
        if made.args is not checkpoint.args and head is not None:
            continue  # the head has another name now
        rebuilt = build_fairseq(load_fairseq_checkpoint(tmp_path / "back.pt"))
        with torch.no_grad():
            assert torch.equal(call(rebuilt), expected)
            if head is None:  # fairseq's loader keeps heads only with load_checkpoint_heads, as its hub interface does
                assert torch.equal(call(fairseq_loads(tmp_path / "back.pt")), expected)


@pytest.mark.parametrize(("mode", "norm_first", "width"), VARIANTS)
def test_wav2vec2_both_ways(tmp_path: Path, mode: str, norm_first: bool, width: int) -> None:
    model, config = fairseq_wav2vec2(mode, norm_first, width)
    waves, padding = audio()

    def call(m: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            return m(waves, padding_mask=padding, mask=False, features_only=True)

    standins.save(model, tmp_path / "w.pt", cfg={"model": config, "task": audio_task(mode == "layer_norm")})
    checkpoint = load_fairseq_checkpoint(tmp_path / "w.pt")
    converted = to_transformers(checkpoint)
    expected = call(model)
    with torch.no_grad():
        found = converted(waves, attention_mask=(~padding).long()).last_hidden_state
    assert torch.allclose(found[~expected["padding_mask"]], expected["x"][~expected["padding_mask"]], atol=1e-5)
    with_pretraining = from_transformers(converted, like=checkpoint)
    assert same(with_pretraining.state, dict(model.state_dict()))
    for made, complete in ((with_pretraining, True), (from_transformers(converted), False)):
        save_fairseq_checkpoint(made, tmp_path / "back.pt")
        assert torch.equal(call(build_fairseq(load_fairseq_checkpoint(tmp_path / "back.pt")))["x"], expected["x"])
        assert torch.equal(call(fairseq_loads(tmp_path / "back.pt", strict=complete))["x"], expected["x"])


@pytest.mark.parametrize(("mode", "norm_first", "width"), VARIANTS[:2])
def test_ctc_both_ways(tmp_path: Path, mode: str, norm_first: bool, width: int) -> None:
    """The file holds fairseq's Dictionary object, as fairseq's CTC checkpoints do."""
    model, config, dictionary = fairseq_ctc(mode=mode, norm_first=norm_first, width=width)
    waves, padding = audio()

    def call(m: Any) -> Any:
        with torch.no_grad():
            return m(source=waves, padding_mask=padding)

    task = {**config["w2v_args"]["task"], "_name": "audio_finetuning", "labels": "ltr"}
    state = {"target_dictionary": dictionary}
    standins.save(model, tmp_path / "c.pt", cfg={"model": config, "task": task}, task_state=state)
    checkpoint = load_fairseq_checkpoint(tmp_path / "c.pt")
    assert checkpoint.symbols == standins.SYMBOLS
    converted, expected = to_transformers(checkpoint), call(model)
    with torch.no_grad():
        found = converted(waves, attention_mask=(~padding).long()).logits
    real = ~expected["padding_mask"]
    assert torch.allclose(found[real], expected["encoder_out"].transpose(0, 1)[real], atol=1e-5)
    assert same(from_transformers(converted, like=checkpoint).state, dict(model.state_dict()))
    for made in (from_transformers(converted, like=checkpoint), from_transformers(converted)):
        save_fairseq_checkpoint(made, tmp_path / "back.pt")
        rebuilt = build_fairseq(load_fairseq_checkpoint(tmp_path / "back.pt"))
        assert torch.equal(call(rebuilt)["encoder_out"], expected["encoder_out"])
        assert torch.equal(call(fairseq_loads(tmp_path / "back.pt"))["encoder_out"], expected["encoder_out"])


def test_old_ctc_files_with_namespaces(tmp_path: Path) -> None:
    """fairseq 0.9 wrote one Namespace inside another; what comes out is what fairseq of today loads."""
    model, config, _ = fairseq_ctc()
    inner = Namespace(**{k: v for k, v in config["w2v_args"]["model"].items() if k != "_name"})
    inner.arch, inner.task, inner.normalize, inner.data = "wav2vec2", "audio_pretraining", False, ""
    outer = {k: v for k, v in config.items() if k not in ("_name", "w2v_args")}
    flat = Namespace(**outer, arch="wav2vec_ctc", task="audio_pretraining", labels="ltr", w2v_args=inner)
    standins.save(model, tmp_path / "old.pt", args=flat)
    checkpoint = load_fairseq_checkpoint(tmp_path / "old.pt")
    save_fairseq_checkpoint(checkpoint, tmp_path / "new.pt")
    waves, padding = audio()
    with torch.no_grad():
        expected = model(source=waves, padding_mask=padding)["encoder_out"]
        for rebuilt in (build_fairseq(checkpoint), fairseq_loads(tmp_path / "new.pt")):
            assert torch.equal(rebuilt(source=waves, padding_mask=padding)["encoder_out"], expected)


def test_real_omegaconf_containers(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    model, config = fairseq_wav2vec2()
    cfg = OmegaConf.create({"model": config, "task": audio_task(False)})
    standins.save(model, tmp_path / "w.pt", cfg=cfg)
    found = load_fairseq_checkpoint(tmp_path / "w.pt")
    assert found.args == OmegaConf.to_container(cfg.model)
    assert found.task == audio_task(False)
