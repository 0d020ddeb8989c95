"""N:M masks made on a GPU, where ties are resolved without asking the device which groups have them."""

from __future__ import annotations

import pytest
import torch
from cuda_models import DEVICE
from squeezoo.compress.masks import Pattern, magnitude_mask, nm_mask

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("columns", [64, 61])
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(3, 8), Pattern(5, 16), Pattern(30, 32)], ids=str)
def test_a_gpu_keeps_what_the_cpu_keeps(pattern: Pattern, columns: int) -> None:
    """Many ties, and tails: the lower index wins there too. NaN in a weight is refused there too."""
    score_OI = torch.randint(-4, 5, (300, columns), generator=torch.Generator().manual_seed(1)).float()
    for of in (nm_mask, magnitude_mask):
        assert torch.equal(of(score_OI.to(DEVICE), pattern).cpu(), of(score_OI, pattern))
    score_OI[7, 3] = float("nan")
    with pytest.raises(ValueError, match="found 1 NaN of"):
        magnitude_mask(score_OI.to(DEVICE), pattern)
