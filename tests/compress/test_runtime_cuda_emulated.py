"""Some tests of tests/gpu on the emulated GPU, in a process of their own. All of them: ``make test-gpu-emulated``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from squeezoo.compress.runtime import triton_support
from squeezoo.compress.runtime.native.compiler import BuildError, find_compiler

TESTS = Path(__file__).parents[1]
CHOSEN = (
    "test_models.py::test_a_loaded_model_agrees_with_the_reference[vit-gpusq-gemm-int8]",
    "test_models.py::test_a_cuda_graph_replays_with_new_inputs[bert-gpusq-gemm-int8]",
    "test_models.py::test_a_call_never_waits_for_the_device[bert-gpusq-gemm-int8]",
    "test_models.py::test_a_call_never_waits_for_the_device[timm_vit-gpusq-gemm-mha-int8]",
    "test_gemms.py::test_16_bit_kernels[shape0-dtype1-17]",
    "test_gemms.py::test_what_cusparselt_fuses_here",
    "test_nm_attention.py::test_in_a_cuda_graph",
    "test_nm_attention.py::test_nan_in_a_score_stays_nan[reference-2:4]",
    "test_nm_attention.py::test_nan_in_a_score_stays_nan[reference-2:16]",
    "test_masks.py::test_a_gpu_keeps_what_the_cpu_keeps[5:16-61]",
    "test_triton_quantize.py::test_they_run_on_the_device",
)


def _why_not() -> str:
    if torch.version.cuda is not None:
        return "PyTorch is built with CUDA: make test-gpu"
    try:
        find_compiler()
    except BuildError as error:
        return str(error)
    return triton_support.triton_missing()


@pytest.mark.skipif(bool(_why_not()), reason=_why_not())
def test_some_gpu_tests_pass_on_the_emulated_gpu() -> None:
    environment = {**os.environ, "SQUEEZOO_EMULATED_GPU": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    chosen = [str(TESTS / "gpu" / name) for name in CHOSEN]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) == len(CHOSEN)
