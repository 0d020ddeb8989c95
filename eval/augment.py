"""Random changes of training images. Each function draws from the given generator alone and returns a new batch.

Legend: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .task import Batch


def shift_one_pixel(batch: Batch, generator: torch.Generator) -> Batch:
    """Move each image by -1, 0 or 1 pixel in each direction; edges are repeated (in digits: the empty background)."""
    return {**batch, "pixel_values": _crop(batch["pixel_values"], 1, "replicate", generator)}


def flip_and_crop(batch: Batch, generator: torch.Generator) -> Batch:
    """Mirror half of the images left to right, then crop at random after padding by an eighth of the height.

    The padding of 4 pixels for 32 of He et al. 2016, section 4.2, with mirrored instead of black pixels.
    """
    import torch

    x_BCHW = batch["pixel_values"]
    flip_B = torch.rand(len(x_BCHW), generator=generator) < 0.5
    x_BCHW = torch.where(flip_B.to(x_BCHW.device)[:, None, None, None], x_BCHW.flip(-1), x_BCHW)
    return {**batch, "pixel_values": _crop(x_BCHW, max(1, x_BCHW.shape[-2] // 8), "reflect", generator)}


def _crop(x_BCHW: torch.Tensor, margin: int, mode: str, generator: torch.Generator) -> torch.Tensor:
    """Pad by ``margin`` on each side, then cut a window of the old size at a random place, one per image."""
    import torch

    count, _, height, width = x_BCHW.shape
    padded_BCHW = torch.nn.functional.pad(x_BCHW, (margin,) * 4, mode=mode)
    offset_2B = torch.randint(0, 2 * margin + 1, (2, count), generator=generator)
    row_BH = offset_2B[0, :, None] + torch.arange(height)
    column_BW = offset_2B[1, :, None] + torch.arange(width)
    image_B = torch.arange(count)
    # index tensors on both sides of the channel slice put the channels last
    window_BHWC = padded_BCHW[image_B[:, None, None], :, row_BH[:, :, None], column_BW[:, None, :]]
    return window_BHWC.permute(0, 3, 1, 2).contiguous()
