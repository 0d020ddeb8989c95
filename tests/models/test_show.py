"""The record of an adapter as text."""

from __future__ import annotations

import pytest
from squeezoo.models import ADAPTERS
from squeezoo.models.adapter import Adapter
from squeezoo.models.bart import BART
from squeezoo.models.show import show
from squeezoo.models.vit import TIMM_VIT


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.name)
def test_everything_in_the_record_is_shown(adapter: Adapter) -> None:
    """Every pattern, every role, every model type and the versions; lines of a terminal's width."""
    text = show(adapter)
    for pattern in adapter.patterns():
        assert pattern in text
    for word in (adapter.name, adapter.library, *adapter.model_types, *(site.role for site in adapter.gemms)):
        assert word in text
    assert max(map(len, text.splitlines())) <= 140


def test_what_the_entries_mean() -> None:
    """In words where the record has flags."""
    assert "6 in each encoder" in show(BART)
    assert "10 in each decoder" in show(BART)
    assert "cross map    encoder_attn" in show(BART)
    assert r"attn\.qkv  (Q, K and V)" in show(TIMM_VIT)
    assert r"columns of ffn_down freely, with the rows of ffn_up, unless mlp\.norm is there" in show(TIMM_VIT)
