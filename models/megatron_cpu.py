"""Run megatron-core on a machine without CUDA: for tests, and to prune or convert a model where no GPU is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch


@contextmanager
def cpu_megatron() -> Iterator[None]:
    """Inside, forward and backward of megatron-core run on the CPU.

    megatron-core 0.16 asks CUDA for two things even for CPU tensors: the current device, and a random state of its own
    for dropout. Here the device is the CPU, and dropout uses PyTorch's random state, so with dropout the processes of a
    tensor-parallel group draw alike only if they are seeded alike. Both are put back afterwards.

    The model's config must say ``use_cpu_initialization=True`` and False for ``masked_softmax_fusion``,
    ``gradient_accumulation_fusion``, ``bias_dropout_fusion``; the process groups are gloo's.

    Raises:
        ImportError: megatron-core is not installed (CONTRIBUTING, "Extras").
    """
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    def fork(self: Any, name: str = "") -> nullcontext[None]:
        return nullcontext()

    with (
        patch.object(torch.cuda, "current_device", lambda: "cpu"),
        patch.object(CudaRNGStatesTracker, "fork", fork),
    ):
        yield
