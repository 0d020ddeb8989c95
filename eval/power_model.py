"""codecarbon's estimates of power, offline, for terms that no sensor measures."""

from __future__ import annotations

import logging
import warnings
from importlib.metadata import version
from typing import Any

JOULES_PER_KWH = 3.6e6


class PowerModel:
    """codecarbon's offline tracker: processor's TDP times its load, watts per memory module. It writes no file and asks
    no server. A processor whose TDP it does not know gets no value, instead of its 4 watts a thread.

    Raises:
        ImportError: codecarbon is missing; the message names the extra.
    """

    def __init__(self, sample_seconds: float) -> None:
        try:
            from codecarbon import OfflineEmissionsTracker
        except ImportError as error:
            raise ImportError("estimating power needs codecarbon: pip install 'squeezoo[eval]'") from error
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # it speaks before it reads its own log_level
        self.name = f"estimate: codecarbon {version('codecarbon')}, power model"
        self.refused = {} if _tdp_is_known() else {"cpu": "codecarbon does not know this processor's TDP"}
        options: dict[str, Any] = {
            "country_iso_code": "USA", "measure_power_secs": sample_seconds, "save_to_file": False,
            "save_to_api": False, "save_to_logger": False, "log_level": "critical", "allow_multiple_runs": True,
            "pue": 1.0, "gpu_ids": [],
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # save_to_*, which its older versions need
            self._tracker: Any = OfflineEmissionsTracker(**options)

    def start(self) -> None:
        self._tracker.start()

    def stop(self) -> dict[str, float]:
        """Joules of ``cpu`` and ``dram``; without the terms that it has nothing to say about."""
        self._tracker.stop()
        data = self._tracker.final_emissions_data
        found = {"cpu": data.cpu_energy, "dram": data.ram_energy}
        return {term: kwh * JOULES_PER_KWH for term, kwh in found.items() if kwh and term not in self.refused}


def _tdp_is_known() -> bool:
    """Whether the processor stands in codecarbon's table: else its TDP is a constant per thread."""
    from codecarbon.core.cpu import DEFAULT_POWER_PER_CORE, TDP
    from codecarbon.core.util import count_cpus

    watts = TDP().tdp
    return watts is not None and watts != count_cpus() * DEFAULT_POWER_PER_CORE
