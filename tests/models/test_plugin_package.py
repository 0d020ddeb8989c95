"""A plug-in as people will write it: a package of its own (tests/plugin_example), installed by pip, used end to end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from squeezoo.compress.checkpoint import load
from squeezoo.models.dense import DenseError

EXAMPLE = Path(__file__).resolve().parents[1] / "plugin_example"

# Runs in a process of its own, in which the package is installed and nothing has imported it.
USE = """
import sys
import torch
from squeezoo.compress.attach import attach_, compressed_weights, prune_
from squeezoo.compress.calibrate import calibrate_
from squeezoo.compress.checkpoint import load, save_checkpoint
from squeezoo.compress.masks import Pattern, check_nm
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.selftest import self_test
from squeezoo.models import adapter_for, all_adapters, find_sites
from squeezoo.models.dense import example_batch, load_dense, logits, save_dense

folder = sys.argv[1]
assert "squeezoo_parallel_net" not in sys.modules
assert "parallel_net" in all_adapters()
from squeezoo_parallel_net import ParallelNet, ParallelNetConfig

torch.manual_seed(0)
model = ParallelNet(ParallelNetConfig(num_labels=3)).eval()
adapter = adapter_for(model)
sites = find_sites(model, adapter)
assert adapter.name == "parallel_net"
assert [gemm.role for gemm in sites.gemms] == ["qkv", "attn_out", "ffn_up", "ffn_down"] * 2
assert sites.final.name == "readout" and sites.attention[0].head_dim == 16
assert [block.activation for block in sites.blocks] == ["trunk.0.ffn.1", "trunk.1.ffn.1"]

save_dense(model, None, f"{folder}/dense")
dense = load_dense(f"{folder}/dense")
assert type(dense.model) is ParallelNet
batch = example_batch(model)
assert torch.equal(logits(dense.model, batch), logits(model, batch))

recipe = Recipe.load("gpusq-gemm-int8")
plan = make_plan(model, recipe)
assert len(plan.gemms) == 9
attach_(model, plan)
prune_(model)
calibrate_(model, [batch])
for name, module, _ in compressed_weights(model):
    assert check_nm(module.weight, Pattern(2, 4)), name
save_checkpoint(model, plan, recipe, f"{folder}/small", name="n", base={"name": "plug", "revision": None})
loaded = load(f"{folder}/small", backend="reference")
assert type(loaded) is ParallelNet
with torch.no_grad():
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), atol=2e-3, rtol=0)  # float16 storage

checks = self_test(f"{folder}/dense")
assert [check.name for check in checks][:2] == ["sites", "scores"], checks
assert all(check.passed for check in checks), checks
print("used", len(checks))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example installed by pip into a folder of its own, without network, build isolation or dependencies."""
    work = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, work / "source")  # a build leaves folders beside the sources
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--target", str(work / "site"), str(work / "source")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return work / "site"


def test_installed_plugin_is_found_and_used_end_to_end(installed: Path, tmp_path: Path) -> None:
    """Sites, plan, attach, prune, calibrate, save, load, self-test: nothing in the project knows this architecture."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", USE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["used", "7"]
    # and without the package, as in this process, its checkpoint says what is missing
    with pytest.raises(DenseError, match="no model class 'ParallelNet', and no plug-in has registered one"):
        load(tmp_path / "small", backend="reference")
