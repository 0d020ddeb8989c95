"""Calls into transformers and timm without their load reports, progress bars and remarks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """transformers and timm say nothing below an error inside; afterwards they speak as they did before."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging as hf_logging

    timm_logger = logging.getLogger("timm")
    timm_level, verbosity = timm_logger.level, hf_logging.get_verbosity()
    had_bars, had_no_hub_bars = hf_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    timm_logger.setLevel(logging.ERROR)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        timm_logger.setLevel(timm_level)
        hf_logging.set_verbosity(verbosity)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where the environment forbids the Hub's bars, restoring them warns
            if had_bars:
                hf_logging.enable_progress_bar()
            if had_no_hub_bars:
                disable_progress_bars()
