"""The record of megatron-core's GPT, on a stand-in with the same names (tests/extras has the real one)."""

from __future__ import annotations

import pytest
import standins
from squeezoo.models import adapter_for, find_sites


@pytest.mark.parametrize("world_size", [1, 2])
def test_parallel_linears_are_gemms(world_size: int) -> None:
    """Column-parallel [out / p, in], row-parallel [out, in / p]: the shapes of what this process holds."""
    model = standins.GPTModel(world_size)
    sites = find_sites(model, adapter_for(model))
    shapes = {gemm.role: (gemm.out_features, gemm.in_features, gemm.layout, gemm.parts) for gemm in sites.gemms}
    assert shapes == {
        "qkv": (48 // world_size, 16, "out_in", 1),  # q, k, v of each query group in turn: no three slices
        "attn_out": (16, 16 // world_size, "out_in", 1),
        "ffn_up": (64 // world_size, 16, "out_in", 1),
        "ffn_down": (16, 64 // world_size, "out_in", 1),
    }
    assert len(sites.gemms) == 2 * 4
    assert [(entry.name, entry.head_dim) for entry in sites.attention] == [
        (f"decoder.layers.{i}.self_attention.core_attention", 8) for i in range(2)
    ]
    assert sites.final is not None
    assert sites.final.name == "output_layer"


def test_an_output_layer_that_shares_the_embedding_has_no_weight_of_its_own() -> None:
    model = standins.GPTModel(tied=True)
    assert find_sites(model, adapter_for(model)).final is None
