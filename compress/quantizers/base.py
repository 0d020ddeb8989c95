"""What all quantizers share: on and off, calibration, export. Everything is computed in float32 (float64 stays).

A quantizer is the identity until it is calibrated: a weight's by ``init_from_weight_``, an input's by
``start_observing_``, forward passes, ``finish_calibration_``. Whether it has been can be told from its state dict.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from .rounding import refuse_nan

Granularity = Literal["channel", "tensor"]


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight as integers: ``q_OI * scale_O1`` is what the fake-quantized forward pass saw.

    Args:
        q_OI: int8 [out_features, in_features]. scale_O1: float32 [out_features, 1], positive.
    """

    q_OI: Tensor = field(repr=False)
    scale_O1: Tensor = field(repr=False)


@dataclass(frozen=True)
class InputQuantization:
    """How an input becomes integers: ``x ~ (q - zero_point) * scale`` with q in qmin..qmax.

    Args:
        kind: ``static``: ``scale`` and ``zero_point`` hold for every input. ``dynamic``: they come from the range of
            each input and are None here; a ``zero_point`` of 0 says that the range is symmetric, scale = max|x| / qmax.
    """

    kind: Literal["static", "dynamic"]
    bits: int
    scale: float | None
    zero_point: int | None
    qmin: int
    qmax: int


class ObservationError(ValueError):
    """Values that give no range. ``quantizer``: who met them."""

    def __init__(self, quantizer: Quantizer, message: str) -> None:
        super().__init__(message)
        self.quantizer = quantizer


class Quantizer(nn.Module):
    """Base of all quantizers. Subclasses fill in ``fake_quantize`` and what they support of the rest.

    Attributes:
        bits: 2 to 8.
        active: False: the forward pass returns its input. A loaded state dict sets it.
        observing: True: the forward pass records its input's range and returns it unchanged.
        record: the recipe's record it was made from, for comparing plans.
        needs_batches: whether its range comes from data.
    """

    needs_batches: ClassVar[bool] = False

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.active = False
        self.observing = False
        self.record: Mapping[str, Any] | None = None
        self._observe_at: float | None = None
        # The last input and output, not kept alive, and whether gradients were on.
        self._last: tuple[weakref.ref[Tensor], weakref.ref[Tensor], bool] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x``; returned in its dtype."""
        if self.observing:
            try:
                self.observe(x.detach(), self._observe_at)
            except ValueError as error:
                raise ObservationError(self, str(error)) from error
            return x
        if not self.active:
            return x
        x_q = self.fake_quantize(x)
        compiling = torch.compiler.is_compiling()
        self._last = None if compiling else (weakref.ref(x), weakref.ref(x_q), torch.is_grad_enabled())
        return x_q

    def follow(self, x: Tensor) -> Tensor:
        """As ``forward``, for an input that ``forward`` has seen in this pass already: it is not counted twice.

        While a graph for the gradient keeps the result of ``forward`` alive, that very tensor is returned: Q, K and V
        then cost one rounding, and one backward pass through it.
        """
        if self.observing or not self.active:
            return x
        if self._last is not None and not torch.compiler.is_compiling():
            last_x, last_x_q, with_grad = self._last
            x_q = last_x_q()
            if x_q is not None and last_x() is x and with_grad == torch.is_grad_enabled():
                return x_q
        return self.fake_quantize(x, update=False)

    def fake_quantize(self, x: Tensor, update: bool = True) -> Tensor:
        """What the forward pass does while active. ``update``: in training mode a running range takes ``x`` in."""
        raise NotImplementedError

    # -- calibration ---------------------------------------------------------------------------------------------------

    def init_from_weight_(self, w_OI: Tensor, mask_OI: Tensor | None = None) -> None:
        """Take the range of a weight and activate. ``mask_OI`` bool: False entries will not be used.

        Raises:
            ValueError: the weight is empty or holds NaN or infinity.
        """
        raise self._wrong_side("weights")

    def observe(self, x: Tensor, percentile: float | None = None) -> None:
        """Take one calibration batch into the range.

        Raises:
            ValueError: ``x`` is empty or holds NaN or infinity; the range is left as it was.
        """
        raise self._wrong_side("inputs")

    def start_observing_(self, percentile: float | None = None) -> None:
        """Until ``finish_calibration_`` or ``stop_observing_`` the forward pass observes and changes nothing."""
        self.stop_observing_()
        self.active, self.observing, self._observe_at = False, True, percentile

    def stop_observing_(self) -> None:
        """Give up a calibration: forget what was observed. The quantizer stays inactive."""
        self.observing = False
        self._forget()

    def finish_calibration_(self) -> None:
        """Turn the observed range into the quantizer's own and activate.

        Raises:
            RuntimeError: nothing was observed, though ``needs_batches``.
        """
        raise self._wrong_side("inputs")

    def clamp_(self) -> None:
        """Put learned parameters back into their range; to be called after each optimizer step."""

    # -- export --------------------------------------------------------------------------------------------------------

    @overload
    def export(self) -> InputQuantization: ...
    @overload
    def export(self, w_OI: Tensor) -> QuantizedWeight: ...
    def export(self, w_OI: Tensor | None = None) -> InputQuantization | QuantizedWeight:
        """The integers of a weight, or how to make those of an input.

        Raises:
            RuntimeError: the quantizer was never calibrated.
            ValueError: the weight holds NaN, or the quantizer has no integers.
        """
        if not self.active:
            raise RuntimeError("this quantizer was never calibrated: run the calibrate stage before the export")
        if w_OI is None:
            return self._input_levels()
        refuse_nan(w_OI, "the weight to quantize")
        with torch.no_grad():
            return self._integers(w_OI.detach())

    def rounder(self, w_OI: Tensor) -> Callable[[Tensor, int], Tensor]:
        """A function (column_O, its index) -> the column rounded to levels whose scales come from ``w_OI``.

        For pruning that spreads rounding errors too (SparseGPT's joint mode): ``w_OI`` is the weight before it. The
        quantizer is initialised from ``w_OI`` and active afterwards. LSQ keeps those scales (``calibrate_`` with
        ``keep_weights``); quantizers that follow the weight of the moment take theirs from the pruned one.
        """
        self.init_from_weight_(w_OI)
        scale_O = self.export(w_OI).scale_O1.squeeze(1).to(w_OI.dtype)
        low, high = self._weight_levels()
        return lambda column_O, _: (column_O / scale_O).round_().clamp_(low, high).mul_(scale_O)

    # -- for subclasses ------------------------------------------------------------------------------------------------

    def _input_levels(self) -> InputQuantization:
        raise self._wrong_side("inputs")

    def _integers(self, w_OI: Tensor) -> QuantizedWeight:
        raise self._wrong_side("weights")

    def _weight_levels(self) -> tuple[int, int]:
        raise self._wrong_side("weights")

    def _forget(self) -> None:
        """Drop what was observed."""

    def _calibrated(self) -> bool:
        """Whether the state that was just loaded is that of a calibrated quantizer."""
        raise NotImplementedError

    def _wrong_side(self, side: str) -> TypeError:
        return TypeError(f"{type(self).__name__} does not quantize {side}")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        own = {**self._parameters, **self._buffers}
        if any(prefix + name in state_dict for name in own) and not any(
            t is not None and t.is_meta for t in own.values()
        ):
            self.active = self._calibrated()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # weak references cannot be copied

    def extra_repr(self) -> str:
        return f"bits={self.bits}, active={self.active}"
