"""How a table says what a speed was measured on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from squeezoo.eval.speed import Speed
from squeezoo.zoo_cards.tables import condition, input_shape


@pytest.mark.parametrize(
    ("size", "text"),
    [
        ({"sequence": 128}, "sequence 128"),
        ({"image_size": (8, 12)}, "8 x 12 pixels"),
        ({"audio_seconds": 10.0}, "10 s of audio"),
        ({"audio_seconds": 2.5}, "2.5 s of audio"),
    ],
)
def test_input_shape(new_speed: Callable[..., Speed], size: dict[str, Any], text: str) -> None:
    """One of the three, as `Speed` documents them."""
    speed = new_speed(2.0, 1.0, **{"sequence": None, **size})
    assert input_shape(speed) == text
    assert f", {text}, " in condition(speed)
