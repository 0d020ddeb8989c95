"""`squeezoo quickstart`: a real model through the whole machine in three minutes on two cores, with no download.

A small ViT learns the 1,797 scans of handwritten digits that scikit-learn carries, is squeezed with gpusq-gemm-int8,
saved, loaded as int8, scored and timed beside its dense self. Every step is the ordinary one; only settings are here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .compress.engine import compress, is_trained, train_dense
from .compress.recipe import Recipe
from .eval.environment import device_name
from .models.dense import load_dense
from .pipeline import measure_card, training_data
from .zoo_cards.card import Card

TASK = "digits"
NAME = "digits-vit.digits.gpusq-gemm-int8"
ARCHITECTURE = "timm/vit_tiny_patch16_224"
# 4 patches of 4 x 4 pixels; wide enough that its GEMMs, not Python, take the time.
MODEL_ARGS = {
    "img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 256, "depth": 3, "num_heads": 4,
}  # fmt: skip
# The papers' rates are for pre-trained language models; a ViT from random weights takes larger ones.
DENSE_SETTINGS = {"epochs": 50, "learning_rate": 1e-3, "batch_size": 32, "weight_decay": 0.05}
COMPRESS_SETTINGS = {"epochs": 8, "learning_rate": 3e-4, "batch_size": 32, "weight_decay": 0.05}
BATCHES = (1, 32, 128)
LIMITS = (
    "A demonstration model: 8 x 8 pixel scans, 1,435 of them to learn from. It recognises single, centred digits.",
    "The settings (width, depth, patch size, rate, epochs, augmentation) were chosen by accuracy on the 355 validation "
    "scans, over some 20 dense configurations and two of compression; the 362 test scans took no part in it. Trained "
    "with these settings on the 1,080 training scans alone, dense and compressed both score 95.58 % on the test scans; "
    "after that the validation scans joined the training, the one decision made with a test figure in view.",
    "The test scans may be by the same writers as the training scans; scikit-learn's data does not name them.",
)


def run_quickstart(
    folder: Path, say: Callable[[str], None] = lambda _: None, progress: bool = True, restart: bool = False
) -> Card:
    """Train, squeeze, score, time; writes ``folder/dense`` and ``folder/<NAME>`` with its card.

    Resumes when killed; ``restart`` throws an unfinished run away."""
    dense_folder, out = folder / "dense", folder / NAME
    hardware = device_name()
    fresh = load_dense(ARCHITECTURE, model_args=MODEL_ARGS)
    parts = [training_data(TASK, None, model=fresh.model, split=split) for split in ("train", "validation")]
    # The settings are chosen, so the validation scans are for learning now.
    data = replace(parts[0], features=[sample for part in parts for sample in part.features])
    dense_recipe = Recipe.load("dense").override(**DENSE_SETTINGS)
    # A dense model of an earlier version may have learnt from other scans, those of today's test among them.
    if not is_trained(fresh, dense_recipe, data, dense_folder):
        say(
            f"training the dense model: {ARCHITECTURE}, {DENSE_SETTINGS['epochs']} epochs on {len(data.features)} scans"
        )
        train_dense(fresh, dense_recipe, data, dense_folder, restart=restart, hardware=hardware, say=say)
    say("squeezing it with gpusq-gemm-int8")
    recipe = Recipe.load("gpusq-gemm-int8").override(**COMPRESS_SETTINGS)
    compress(load_dense(dense_folder), recipe, data, out, name=NAME, restart=restart, hardware=hardware, say=say)
    return measure_card(
        out, dense_folder, TASK,
        commands=("squeezoo quickstart",), batches=BATCHES, included=True, limits=LIMITS, progress=progress, say=say,
    )  # fmt: skip
