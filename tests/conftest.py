"""Fixtures of the whole test tree: no network, one thread, the data folder, and when the gpu marker skips."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["SQUEEZOO_SELECT"] = "off"  # no measuring of kernels, and no table in the user's cache

import pytest
import torch
from emulated import emulating, install

if emulating():
    install()

DATA_ENV = "SQUEEZOO_DATA"


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the same sums in the same order everywhere, and quicker for tiny models


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reason = _why_no_gpu()
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets: $SQUEEZOO_DATA, or ../shared/data beside the repository."""
    stated = os.environ.get(DATA_ENV)
    folder = Path(stated) if stated else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data: {DATA_ENV} is {stated or 'not set'} and {folder} is no folder")
    return folder


def _why_no_gpu() -> str:
    """Why gpu tests cannot run here, or nothing."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"compute capability {major}.{minor}, needs 8.0 (2:4 tensor cores)"
