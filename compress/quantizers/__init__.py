"""Quantizers: fake quantization while training, integers when exported. Rounding is half to even everywhere."""

from .absmax import AbsmaxQuantizer, absmax_fake_quantize, absmax_scale
from .base import Granularity, InputQuantization, ObservationError, QuantizedWeight, Quantizer
from .dynamic import DynamicQuantizer
from .factory import input_quantizer, map_quantizer, weight_note, weight_quantizer
from .lsq import LsqQuantizer, lsq_fake_quantize
from .minmax import MinMaxQuantizer, minmax_fake_quantize
from .pact import PactQuantizer, pact_fake_quantize
from .q8bert import Q8BertQuantizer, q8bert_fake_quantize
from .rounding import MIN_SCALE, affine_step, grouped, largest_level, quantize_int8
from .sawb import SawbQuantizer, sawb_alpha, sawb_coefficients, sawb_fake_quantize

__all__ = [
    "MIN_SCALE",
    "AbsmaxQuantizer",
    "DynamicQuantizer",
    "Granularity",
    "InputQuantization",
    "LsqQuantizer",
    "MinMaxQuantizer",
    "ObservationError",
    "PactQuantizer",
    "Q8BertQuantizer",
    "QuantizedWeight",
    "Quantizer",
    "SawbQuantizer",
    "absmax_fake_quantize",
    "absmax_scale",
    "affine_step",
    "grouped",
    "input_quantizer",
    "largest_level",
    "lsq_fake_quantize",
    "map_quantizer",
    "minmax_fake_quantize",
    "pact_fake_quantize",
    "q8bert_fake_quantize",
    "quantize_int8",
    "sawb_alpha",
    "sawb_coefficients",
    "sawb_fake_quantize",
    "weight_note",
    "weight_quantizer",
]
