"""Initialise every quantizer of an attached model: the PTQ step before quantization-aware training.

Weights from the weights. Inputs and attention maps from a few batches seen by the model in evaluation mode with all
quantizers off (GPUSQ-TLM, section 3.2; the number of batches is not published, 10 is the default): the largest |x| for
LSQ, the running range for MinMax, percentiles for PACT. What needs no data (dynamic quantization) gets none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..models.dense import logits
from .attached import (
    INPUT_QUANTIZER,
    compressed_weights,
    deactivate_,
    latent,
    latent_OI,
    quantized_tables,
    quantizers,
)
from .quantizers import ObservationError, Quantizer


class CalibrationError(ValueError):
    """Calibration data, or weights, that give no range."""


@torch.no_grad()
def calibrate_(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    percentile: float | None = None,
    call: Callable[[nn.Module, Mapping[str, Tensor]], Any] = logits,
    *,
    keep_weights: bool = False,
) -> dict[str, float]:
    """Initialise all quantizers and switch them on.

    Args:
        batches: not looked at when no quantizer needs data.
        percentile: of |x|, instead of the maximum; PACT has percentiles of its own.
        call: runs the model on a batch; for models that `logits` does not know how to call.
        keep_weights: leave weight quantizers that are active as they are, for weights that were rounded to their levels
            while pruning (SparseGPT's ``quantize``).

    Returns:
        The static scales of inputs by GEMM name, and of attention maps by ``<module>.attention_map.<q, k, p or v>``.

    Raises:
        CalibrationError: no batch though one is needed, NaN in some input (names the module and the batch) or weight,
            or a module that no batch reached. All quantizers are off then.
    """
    weights = dict(_weights(model))
    kept = [entry for entry in weights if entry.active] if keep_weights else []
    inputs = {quantizer: name for name, quantizer in quantizers(model) if quantizer not in weights}
    deactivate_(model)
    try:
        seen = _observe(model, inputs, batches, percentile, call)
        for quantizer, name in inputs.items():
            try:
                quantizer.finish_calibration_()
            except RuntimeError as error:
                raise CalibrationError(f"{_where(name)} was not reached in {seen} calibration batches") from error
        for quantizer, (name, weight, mask_OI) in weights.items():
            if quantizer in kept:
                quantizer.active = True
                continue
            try:
                quantizer.init_from_weight_(weight, mask_OI)
            except ValueError as error:
                raise CalibrationError(f"weight of {name}: {error}") from error
    except BaseException:
        for quantizer in inputs:
            quantizer.stop_observing_()
        deactivate_(model)
        raise
    scales = {name.removesuffix(f".{INPUT_QUANTIZER}"): quantizer.export().scale for quantizer, name in inputs.items()}
    return {name: scale for name, scale in scales.items() if scale is not None}


def _weights(model: nn.Module) -> Iterable[tuple[Quantizer, tuple[str, Tensor, Tensor | None]]]:
    """Each weight quantizer with the name, the latent weight and the mask of its matrix or table."""
    for name, module, parametrization in compressed_weights(model):
        if parametrization.quantizer is not None:
            yield parametrization.quantizer, (name, latent_OI(module, parametrization), parametrization.mask_OI)
    for name, module, table in quantized_tables(model):
        yield table.quantizer, (name, latent(module), None)


def _observe(
    model: nn.Module,
    inputs: Mapping[Quantizer, str],
    batches: Iterable[Mapping[str, Tensor]],
    percentile: float | None,
    call: Callable[[nn.Module, Mapping[str, Tensor]], Any],
) -> int:
    """Run the model over the batches in evaluation mode while each quantizer records its range; their number."""
    needy = [name for quantizer, name in inputs.items() if quantizer.needs_batches]
    if not needy:
        return 0
    count, training = 0, model.training
    for quantizer in inputs:
        quantizer.start_observing_(percentile)
    model.eval()
    try:
        for batch in batches:
            call(model, batch)
            count += 1
    except ObservationError as error:
        where = _where(inputs[error.quantizer])
        raise CalibrationError(f"{where}, calibration batch {count}: {error}") from error
    finally:
        model.train(training)
    if not count:
        raise CalibrationError(
            f"calibration needs at least one batch, found none: pass training data ({len(needy)} quantizers take their "
            f"range from it, the first is that of the {_where(needy[0])})"
        )
    return count


def _where(name: str) -> str:
    """``input of <GEMM>``, or ``<q, k, p or v> of <attention map>``."""
    owner, _, last = name.rpartition(".")
    return f"input of {owner}" if last == INPUT_QUANTIZER else f"{last} of {owner}"
