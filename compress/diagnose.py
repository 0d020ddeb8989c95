"""Where a loss that is not finite comes from: the batch, a weight, or the first module whose output is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

_PARAMETRIZED = ".parametrizations.weight"


@dataclass(frozen=True)
class Fault:
    """What was found first. ``where``: a sentence that names it; "" where everything up to the loss is finite."""

    kind: Literal["data", "weights", "outputs", "loss"]
    where: str


@torch.no_grad()
def find_fault(batch: Mapping[str, Tensor], models: Sequence[tuple[str, nn.Module, Callable[[], Any]]]) -> Fault:
    """Look at a batch that gave a loss which is not finite, then at the models' weights, then run the models again.

    Args:
        batch: as the models see it.
        models: (what it is called, the model, what runs it on that batch).
    """
    for name, tensor in batch.items():
        if not _is_finite(tensor):
            rows = (~tensor.isfinite()).flatten(1).any(1) if tensor.dim() > 1 else ~tensor.isfinite()
            return Fault(
                "data", f"`{name}` of row {int(rows.flatten().nonzero()[0])} of the batch holds {_kind(tensor)}"
            )
    for called, model, _ in models:
        for name, parameter in model.named_parameters():
            if not _is_finite(parameter):
                return Fault("weights", f"{_readable(name)} of the {called} holds {_kind(parameter)}")
    for called, model, run in models:
        if found := _first_output(model, run):
            return Fault("outputs", f"the first output of the {called} that is not finite is that of {found}")
    return Fault("loss", "")


def _first_output(model: nn.Module, run: Callable[[], Any]) -> str:
    """The first module, in the order of the forward pass, whose output is not finite, its class, and what it gave."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            broken = None if found else next((t for t in _tensors(output) if not _is_finite(t)), None)
            if broken is not None:
                sizes = [float(t.abs().max()) for t in _tensors(inputs) if t.is_floating_point() and t.numel()]
                reach = f", from inputs of up to {max(sizes):.3g}" if sizes else ""
                found.append(f"{_readable(name) or 'the whole'} ({type(module).__name__}): {_kind(broken)}{reach}")

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        run()
    except Exception:  # something stumbles over the values that are looked for: what was found until then counts
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _kind(tensor: Tensor) -> str:
    return "NaN" if bool(tensor.isnan().any()) else "infinity"


def _readable(name: str) -> str:
    """``x.parametrizations.weight.original`` is ``x.weight``, what lies on the weight of ``x`` is told in words."""
    owner, parametrized, rest = name.partition(_PARAMETRIZED)
    if not parametrized:
        return name
    return f"{owner}.weight" if rest in ("", ".original") else f"{owner}.weight{rest.removeprefix('.0')} as compressed"
