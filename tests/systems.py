"""Tiny models attached to one-rule recipes of every published quantizer, for the tests of attach and calibrate."""

import torch
from squeezoo.compress.attach import attach_, prune_
from squeezoo.compress.calibrate import calibrate_
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.models.dense import logits
from tiny import ALL, tiny_batch

SYSTEMS = {
    "deepcomp-int8": ({"method": "sawb", "bits": 8}, {"method": "minmax", "bits": 8}),
    "deepcomp-int4": ({"method": "sawb", "bits": 4}, {"method": "pact", "bits": 4}),
    "q8bert": ({"method": "q8bert", "bits": 8}, {"method": "q8bert", "bits": 8}),
    "dynamic": ({"method": "dynamic"}, {"method": "dynamic"}),
    "weights only": ({"method": "absmax", "bits": 8}, None),
}
MAPS = {"q": {"method": "minmax"}, "k": {"method": "pact"}, "p": {"method": "minmax"}, "v": {"method": "lsq"}}


def recipe(weight=None, inputs=None, sparsity="2:4", roles=("block",), **more):
    rule = {"roles": list(roles), "sparsity": sparsity, "weight": weight, "input": inputs}
    stages = [{"stage": "prune"}] * (sparsity is not None) + [{"stage": "calibrate"}]
    body = {"name": "r", "description": "d", "source": "s", "rules": [rule], "stages": stages}
    return Recipe.parse(body | more)


def outputs(model, name):
    with torch.no_grad():
        return logits(model, tiny_batch(name))


def attached(name, *sides, **more):
    """A tiny model and the plan attached to it; nothing is pruned or calibrated yet."""
    model = ALL[name]()
    plan = make_plan(model, recipe(*sides, **more))
    attach_(model, plan)
    return model, plan


def ready(name, *sides, **more):
    """Attached, pruned by magnitude and calibrated on one batch."""
    model, plan = attached(name, *sides, **more)
    prune_(model)
    calibrate_(model, [tiny_batch(name)])
    return model, plan
