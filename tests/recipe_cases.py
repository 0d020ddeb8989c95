"""Built-in recipes with as little training as there can be, and data for it."""

from __future__ import annotations

import torch
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.train_data import TrainData
from tiny import tiny_batch


def short(name: str) -> Recipe:
    """The recipe with as little training as there can be: one epoch of two steps, events every two."""
    data = Recipe.load(name).model_dump(mode="json")
    for stage in data["stages"]:
        if stage["stage"] == "finetune":
            stage |= {"batch_size": 4, "learning_rate": 1e-3}
            if stage["policy"]["method"] == "iterative":
                stage["policy"]["interval"] = 2
            else:
                stage |= {"epochs": 1}
            if data["student"]:  # PKD-skip leaves out the last of two blocks, and there are no more
                stage["distill"]["blocks"] = [1]
    if data["student"]:
        data["student"]["blocks"] = 1
    return Recipe.parse(data)


def data_for(name: str) -> TrainData:
    batch = tiny_batch(name, 8)
    features = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    return TrainData(features, lambda rows: {key: torch.stack([row[key] for row in rows]) for key in rows[0]})
