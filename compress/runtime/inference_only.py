"""Models for inference: ``train()`` is refused at every module that holds one of the runtime's, before it changes any.

Without this the modules above would already be in training mode when the first of the runtime's refuses.
"""

from __future__ import annotations

from torch import nn

REFUSED = (
    "an int8 model is for inference only and stays in evaluation mode; train the model that it was made from (its "
    "checkpoint as a dense model: squeezoo export)"
)


class EvaluationOnly:
    """Stands in a module's instance attribute ``train``."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, mode: bool = True) -> nn.Module:
        if mode:
            raise RuntimeError(REFUSED)
        return type(self.module).train(self.module, False)


def refuse_training_(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Let ``model``, in evaluation mode, and every module in it that holds one of ``kinds`` refuse ``train()``."""
    above = {""}
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            parts = name.split(".")
            above |= {".".join(parts[:depth]) for depth in range(len(parts))}
    for name in above:
        module = model.get_submodule(name)
        module.__dict__["train"] = EvaluationOnly(module)
