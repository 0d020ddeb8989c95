"""Which blocks run as one native call, and that whole models use them."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from squeezoo import bench_models
from squeezoo.compress.runtime import native
from squeezoo.compress.runtime.native.block import FusedForward
from squeezoo.models.dense import logits

AVAILABLE, WHY_NOT = native.available()
pytestmark = pytest.mark.skipif(not AVAILABLE, reason=WHY_NOT)

# Encoder blocks of two; of BART the decoder's have a second attention. DINOv2 scales its branches, GPT-2 is causal.
FUSED = {
    "bert": 2, "roberta": 2, "distilbert": 2, "vit": 2, "timm_vit": 2, "deit": 2, "bart": 2, "mbart": 2, "wav2vec2": 2,
    "wav2vec2_stable": 2, "hubert": 2, "dinov2": 0, "gpt2": 0, "opt": 0, "llama": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_encoder_blocks_run_as_one_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expected: as many calls as there are encoder blocks, and what the same model computes module by module, but for
    the rounding of bfloat16 and inputs that fall to a neighbouring level."""
    dense = tiny.make(name).eval()
    batch = {key: value for key, value in tiny.tiny_batch(name).items() if "label" not in key}
    model = bench_models.squeeze(dense, [batch]).build("int8")
    calls: list[int] = []
    whole: Any = FusedForward.fused
    monkeypatch.setattr(FusedForward, "fused", lambda self, *given: (calls.append(1), whole(self, *given))[1])
    with torch.inference_mode():
        found = logits(model, batch)
        assert len(calls) == FUSED[name]
        for module in model.modules():
            if isinstance(vars(module).get("forward"), FusedForward):
                del module.forward
        expected = logits(model, batch)
    assert len(calls) == FUSED[name]
    assert float((found - expected).norm()) <= 0.03 * float(expected.norm())
