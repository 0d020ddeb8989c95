"""Initialise every quantizer of an attached model from ranges: the PTQ step before quantization-aware training.

Weights: s = max|w_o| / Qp over the masked weight. Inputs: s = max|x| / Qp over a few batches seen by the model with
float inputs (GPUSQ-TLM, section 3.2; the number of batches is not published, 10 is the default).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..models.dense import logits
from .attach import INPUT_QUANTIZER, compressed_weights, deactivate_, latent_OI
from .quantizers import LsqQuantizer


class CalibrationError(ValueError):
    """Calibration data that gives no range."""


@torch.no_grad()
def calibrate_(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], percentile: float | None = None
) -> dict[str, float]:
    """Set all scales from data and switch the quantizers on. Returns the input scales by GEMM name.

    Raises:
        CalibrationError: no batch, or NaN in some input (names the GEMM and the batch). Quantizers stay off then.
    """
    deactivate_(model)
    inputs = {
        name: module._modules[INPUT_QUANTIZER]
        for name, module, _ in compressed_weights(model)
        if INPUT_QUANTIZER in module._modules
    }
    seen = _observe(model, inputs, batches, percentile)
    if inputs and not seen:
        raise CalibrationError("calibration needs at least one batch, found none: pass training data")
    for _, module, parametrization in compressed_weights(model):
        if parametrization.quantizer is not None:
            w_OI = latent_OI(module, parametrization)
            if parametrization.mask_OI is not None:
                w_OI = w_OI * parametrization.mask_OI
            parametrization.quantizer.init_from_amax_(w_OI.abs().amax(dim=1, keepdim=True))
    scales = {}
    for name, quantizer in inputs.items():
        assert isinstance(quantizer, LsqQuantizer)
        quantizer.finish_calibration_()
        scales[name] = float(quantizer.scale)
    return scales


def _observe(
    model: nn.Module,
    inputs: Mapping[str, nn.Module | None],
    batches: Iterable[Mapping[str, Tensor]],
    percentile: float | None,
) -> int:
    """Run the model over the batches in evaluation mode while each input quantizer records its range."""
    count = 0

    def recorder(name: str, quantizer: LsqQuantizer):  # type: ignore[no-untyped-def]
        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            try:
                quantizer.observe(args[0], percentile)
            except ValueError as error:
                raise CalibrationError(f"input of {name}, calibration batch {count}: {error}") from error

        return record

    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_pre_hook(recorder(name, quantizer))
        for name, quantizer in inputs.items()
        if isinstance(quantizer, LsqQuantizer)
    ]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            logits(model, batch)
            count += 1
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return count
