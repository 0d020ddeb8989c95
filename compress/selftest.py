"""Does an adapter fit a model, and does compression of this model hold its promises? For a new architecture or version.

``squeezoo adapters --check MODEL`` prints what `self_test` finds; nothing is trained, and the model is not changed.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models import AdapterError, adapter_for, find_sites
from ..models.adapter import Sites
from ..models.dense import DenseError, library_of, load_dense, logits
from ..models.errors import nearest
from ..models.example import example_batch
from .attach import attach_, compressed_weights, fold_, prune_
from .checkpoint import load, save_checkpoint
from .masks import Pattern, check_nm
from .plan import Plan, make_plan
from .recipe import Recipe

_RECIPE = {
    "name": "selftest",
    "description": "2:4 by magnitude in every GEMM of the blocks, stored as float32, so that all comparisons are exact",
    "source": "squeezoo adapters --check",
    "rules": [{"roles": ["block"], "sparsity": "2:4"}],
    "stages": [{"stage": "prune", "method": "magnitude"}],
    "storage": {"values": "float32", "other": "float32"},
}
_PATTERN = Pattern.parse("2:4")
TOLERANCE = 1e-5  # float32


@dataclass(frozen=True)
class Check:
    """One finding. ``passed`` is None where this model cannot be asked, and ``detail`` says why."""

    name: str
    passed: bool | None
    detail: str


def self_test(source: nn.Module | str | os.PathLike[str], batch: Mapping[str, Tensor] | None = None) -> list[Check]:
    """What can be proved about a model and its adapter in seconds.

    Args:
        source: a model in memory (left as it is), or anything that `load_dense` takes, which is loaded with the head
            that it was saved with; a bare backbone gets a new classification head.
        batch: inputs; made by `example_batch` when left out, which knows the models of transformers and timm.

    Returns:
        The checks in order: sites, scores, attached, sparsity, gradients, folded, saved. When the sites are not found,
        their error is the only one.

    Raises:
        DenseError: the source cannot be loaded.
    """
    original = source if isinstance(source, nn.Module) else _load(source)
    model = copy.deepcopy(original).eval()
    try:
        sites = find_sites(model, adapter_for(model))
    except AdapterError as error:
        return [Check("sites", False, str(error))]
    checks = [Check("sites", True, _counts(sites))]
    try:
        inputs = example_batch(model) if batch is None else dict(batch)
        expected = _scores(model, inputs)
    except (DenseError, RuntimeError, ValueError, TypeError, AttributeError) as error:  # whatever its forward raises
        return [*checks, Check("scores", False, f"{type(error).__name__}: {error}")]
    checks.append(_final(model, sites, expected))
    recipe = Recipe.parse(_RECIPE, where="the self-test's recipe")
    plan = make_plan(model, recipe, sites.adapter)
    attach_(model, plan)
    checks.append(_close("attached", _scores(model, inputs), expected, "the attached model's scores"))
    prune_(model)
    checks += [_sparsity(model), _gradients(model, inputs)]
    sparse = _scores(model, inputs)
    checks.append(_saved(model, plan, recipe, inputs, sparse))
    fold_(model)
    return [*checks[:-1], _folded(model, original, _scores(model, inputs), sparse), checks[-1]]


def _load(source: str | os.PathLike[str]) -> nn.Module:
    model = load_dense(source, kind="auto").model
    if library_of(model) == "transformers" and type(model) is type(model.base_model):
        return load_dense(source, kind="classification").model
    return model


@torch.no_grad()
def _scores(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return logits(model, inputs).float()


def _counts(sites: Sites) -> str:
    parts = []
    for kind, per_block in sites.adapter.kinds.items():
        blocks = [block for block in sites.blocks if block.kind == kind]
        parts.append(f"{len(blocks)} {kind}s of {per_block} GEMMs" if blocks else f"no {kind}s")
    tied = " (tied to the input embedding)" if sites.final_tied else ""
    final = f"final projection {sites.final.name}{tied}" if sites.final else "no final projection"
    return (
        f"adapter {sites.adapter.name}: {', '.join(parts)}; {len(sites.attention)} attention maps, {final}, "
        f"{len(sites.pooler)} poolers, {len(sites.embeddings)} embedding tables"
    )


def _final(model: nn.Module, sites: Sites, expected: Tensor) -> Check:
    """Scores are finite, and the matrix that makes them is known."""
    if not expected.isfinite().all():
        return Check("scores", False, f"{int((~expected.isfinite()).sum())} scores are NaN or infinite")
    if sites.final is None:
        inside = tuple(f"{block.name}." for block in sites.blocks)
        names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and not name.startswith(inside)]
        pattern = sites.adapter.final_projection or ""
        return Check(
            "scores", False,
            f"the model gives scores, but final_projection {pattern!r} matches no module, nearest names: "
            f"{nearest(pattern, names)}",
        )  # fmt: skip
    return Check("scores", True, f"{tuple(expected.shape)}, finite")


def _close(name: str, found: Tensor, expected: Tensor, what: str) -> Check:
    distance = float((found - expected).abs().max())
    return Check(name, distance <= TOLERANCE, f"{what} differ by {distance:.1e} at most, allowed {TOLERANCE:.0e}")


def _sparsity(model: nn.Module) -> Check:
    kept = total = allowed = 0
    for name, _, parametrization in compressed_weights(model):
        w_OI = _weight_OI(model, name, parametrization.transposed)
        if not check_nm(w_OI, _PATTERN):
            return Check("sparsity", False, f"{name} has a group with more than 2 of 4 weights")
        tail = w_OI.shape[1] % _PATTERN.m
        allowed += w_OI.shape[0] * (w_OI.shape[1] // _PATTERN.m * _PATTERN.n + min(_PATTERN.n, tail))
        # Of the mask: a kept weight may be zero already, as many of a model that came from 4 bits are.
        assert parametrization.mask_OI is not None
        kept, total = kept + int(parametrization.mask_OI.count_nonzero()), total + w_OI.numel()
    return Check(
        "sparsity", kept == allowed, f"2:4 everywhere, density {kept / total:.4f} (expected {allowed / total:.4f})"
    )


def _weight_OI(model: nn.Module, name: str, transposed: bool) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return (weight.t() if transposed else weight).detach()


def _gradients(model: nn.Module, inputs: Mapping[str, Tensor]) -> Check:
    """Of the mean square of the scores: none under a mask, some in every GEMM."""
    model.zero_grad(set_to_none=True)
    logits(model, inputs).float().square().mean().backward()
    without = []
    for name, module, parametrization in compressed_weights(model):
        gradient = module.parametrizations["weight"].original.grad  # type: ignore[index, union-attr]
        if not isinstance(gradient, Tensor) or not gradient.any():
            without.append(name)
            continue
        gradient_OI = gradient.t() if parametrization.transposed else gradient
        assert parametrization.mask_OI is not None
        if gradient_OI[~parametrization.mask_OI].any():
            return Check("gradients", False, f"{name}: pruned weights get a gradient")
    model.zero_grad(set_to_none=True)
    if without:
        return Check("gradients", False, f"no gradient reaches {without[0]} ({len(without)} GEMMs): is it used at all?")
    return Check("gradients", True, "zero under every mask, not zero beside it")


def _folded(model: nn.Module, original: nn.Module, found: Tensor, expected: Tensor) -> Check:
    """Keys, classes and shapes of the original, scores of the pruned model."""
    state, before = model.state_dict(), original.state_dict()
    if state.keys() != before.keys():
        return Check("folded", False, f"keys differ: {', '.join(sorted(state.keys() ^ before.keys())[:3])}")
    for name, value in before.items():
        if state[name].shape != value.shape:
            return Check("folded", False, f"{name} is {tuple(state[name].shape)}, was {tuple(value.shape)}")
    for (name, module), (_, was) in zip(model.named_modules(), original.named_modules(), strict=True):
        if type(module).__qualname__ != type(was).__qualname__:
            return Check("folded", False, f"{name} is a {type(module).__name__}, was a {type(was).__name__}")
    distance = float((found - expected).abs().max())
    return Check(
        "folded", distance == 0, f"{len(before)} tensors and their classes restored, scores moved by {distance:.1e}"
    )


def _saved(model: nn.Module, plan: Plan, recipe: Recipe, inputs: Mapping[str, Tensor], expected: Tensor) -> Check:
    """Every tensor and score of the checkpoint equals those in memory, bit for bit."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            base: dict[str, str | None] = {"name": "selftest", "revision": None}
            folder = save_checkpoint(model, plan, recipe, Path(scratch) / "c", name="selftest", base=base)
            loaded = load(folder, backend="dense")
        except DenseError as error:
            return Check("saved", None, f"not tried: {error}")
        except (RuntimeError, ValueError, KeyError) as error:
            return Check("saved", False, f"{type(error).__name__}: {error}")
        state = loaded.state_dict()
        attached = {name: parametrization for name, _, parametrization in compressed_weights(model)}
        differing = [
            name for name, parametrization in attached.items()
            if not torch.equal(_weight_OI(loaded, name, parametrization.transposed),
                               _weight_OI(model, name, parametrization.transposed))
        ]  # fmt: skip
        plain = {n: t for n, t in model.state_dict().items() if n in state}
        differing += [name for name, tensor in plain.items() if not torch.equal(state[name], tensor)]
        if differing:
            return Check("saved", False, f"{differing[0]} came back changed ({len(differing)} tensors)")
        distance = float((_scores(loaded, inputs) - expected).abs().max())
        return Check("saved", distance == 0, f"saved, loaded, scores moved by {distance:.1e}")
