"""The adapter test: what must hold for every record, on a tiny random model per architecture and head (tests/tiny.py).

Adding an architecture adds rows there; nothing here names one, except where it alone has a property.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from squeezed import FIRST, GPUSQ, PRUNE, TWO_FOUR, attached, pruned, scores
from squeezoo.compress.attach import attach_, compressed_weights, fold_, prune_
from squeezoo.compress.checkpoint import load, save_checkpoint
from squeezoo.compress.masks import check_nm
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.stages import Storage
from squeezoo.models import ADAPTERS, adapter_for, find_sites, model_type_of
from torch import Tensor, nn

GENERATE = [name for name, row in tiny.ROWS.items() if row.kind in ("causal-lm", "seq2seq-lm")]
every = pytest.mark.parametrize("name", list(tiny.ALL))
one_each = pytest.mark.parametrize("name", sorted(FIRST.values()))
pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(model: Any, name: str) -> Tensor:
    ids = tiny.tiny_batch(name)["input_ids"][::2]  # the rows without padding
    return model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=6, max_new_tokens=6, do_sample=False)


def test_every_adapter_has_a_row() -> None:
    """Those of fairseq and megatron have models of their own, in tests/models/test_fairseq*.py and others."""
    others = {a.name for a in ADAPTERS if a.library.startswith(("fairseq", "megatron"))}
    assert {row.adapter for row in tiny.ROWS.values()} | others == {adapter.name for adapter in ADAPTERS}
    served = {kind for adapter in ADAPTERS if adapter.name not in others for kind in adapter.model_types}
    assert {model_type_of(make()) for make in tiny.ALL.values()} == served


@every
def test_counts_heads_and_tables(name: str) -> None:
    """GEMMs and attention maps as the record declares them, 2 blocks of each kind; head and pooler as tiny.py says."""
    row, model = tiny.ROWS[name], tiny.ALL[name]()
    sites = find_sites(model, adapter_for(model))
    assert sites.adapter.name == row.adapter
    kinds = sites.adapter.kinds
    assert [block.index for block in sites.blocks] == list(range(2 * len(kinds)))
    assert Counter(block.kind for block in sites.blocks) == dict.fromkeys(kinds, 2)
    for block in sites.blocks:
        gemms = [gemm for gemm in sites.gemms if gemm.block == block.index]
        assert len(gemms) == kinds[block.kind]
        assert all(gemm.name.startswith(f"{block.name}.") for gemm in gemms)
        maps = [entry.kind for entry in sites.attention if entry.block == block.index]
        assert maps == (["self", "cross"] if block.kind == "decoder" else ["self"])
    assert {entry.head_dim for entry in sites.attention} == {16}  # width 32, 2 heads
    assert sites.final is not None
    assert (sites.final.name, sites.final_tied) == (row.final, row.tied)
    assert [(gemm.name, gemm.role, gemm.block) for gemm in sites.pooler] == [(n, "pooler", None) for n in row.pooler]
    tables = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding) and name != "model.shared"]
    assert [table.name for table in sites.embeddings] == tables


@every
def test_every_named_module_takes_part_in_the_forward_pass(name: str) -> None:
    """GEMMs, attention modules, tables, pooler and head are called; the activation lies between the two FFN matrices:
    what it puts out is what ffn_down reads."""
    model = tiny.ALL[name]()
    sites = find_sites(model, adapter_for(model))
    seen: dict[str, tuple[Any, Any]] = {}
    gemms = (*sites.gemms, *sites.pooler, *((sites.final,) if sites.final else ()))
    named = {entry.name: entry.module for entry in (*gemms, *sites.attention, *sites.embeddings)}
    named |= {block.activation: model.get_submodule(block.activation) for block in sites.blocks if block.activation}
    for key, module in named.items():
        module.register_forward_hook(lambda m, i, o, key=key: seen.update({key: (i, o)}))
    scores(model, name)
    assert set(seen) == set(named)
    for block in sites.blocks:
        ffn = {gemm.role: gemm.name for gemm in sites.gemms if gemm.block == block.index}
        assert (block.activation is None) == ("ffn_gate" in ffn)
        if block.activation:
            (entered,), out = seen[block.activation]
            assert torch.equal(entered, seen[ffn["ffn_up"]][1])
            assert torch.equal(out, seen[ffn["ffn_down"]][0][0])


@one_each
def test_permutations_that_the_record_allows_change_no_output(name: str) -> None:
    """Columns of the consumer and rows (with bias) of the producers in another order: equal up to the order of sums."""
    model = tiny.ALL[name]()
    expected = scores(model, name)
    sites = find_sites(model, adapter_for(model))
    assert all(block.permutable for block in sites.blocks)
    for block in sites.blocks:
        by_role = {gemm.role: gemm for gemm in sites.gemms if gemm.block == block.index}
        assert {entry.consumer_role for entry in block.permutable} >= {"ffn_down", "attn_out"}
        for entry in block.permutable:
            consumer = by_role[entry.consumer_role]
            rows = min(by_role[role].out_features // by_role[role].parts for role in entry.producer_roles)
            order = torch.randperm(16 if entry.within == "head" else rows, generator=torch.Generator().manual_seed(1))
            permute_columns_(consumer.weight_OI.data, order)
            for role in entry.producer_roles:
                permute_rows_(by_role[role], order)
    torch.testing.assert_close(scores(model, name), expected, atol=2e-5, rtol=1e-5)


def permute_columns_(w_OI: Tensor, order: Tensor) -> None:
    w_OI.copy_(w_OI.unflatten(1, (-1, len(order)))[:, :, order].flatten(1))


def permute_rows_(gemm: Any, order: Tensor) -> None:
    """The last of ``parts`` only: of a fused QKV matrix the rows of V."""
    for tensor in (gemm.weight_OI.data, gemm.module.bias):
        if tensor is not None:
            rows = tensor.data[-(gemm.out_features // gemm.parts) :]
            rows.copy_(rows.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1))


@every
def test_attached_equals_the_original(name: str) -> None:
    """An empty recipe attaches nothing; masks that are all true and quantizers without a scale change nothing."""
    original = tiny.ALL[name]()
    expected = scores(original, name)
    assert make_plan(original, Recipe.load("dense")).gemms == ()
    torch.testing.assert_close(scores(attached(name, GPUSQ), name), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", GENERATE)
def test_attached_model_generates_the_same(name: str) -> None:
    """Greedy decoding with a key-value cache, token by token; and folding a pruned one changes no token."""
    expected = tokens(tiny.ALL[name](), name)
    assert expected.shape[1] >= 6
    model = attached(name)
    assert torch.equal(tokens(model, name), expected)
    prune_(model)
    sparse = tokens(model, name)
    fold_(model)
    assert torch.equal(tokens(model, name), sparse)


@every
def test_pruned_everywhere_trained_and_folded(name: str) -> None:
    """2:4 and density 0.5 in every GEMM of the blocks; a training step leaves the zeros; folding restores keys, classes
    and shapes and changes no output."""
    original, model = tiny.ALL[name](), pruned(name)
    sites = find_sites(model, adapter_for(model))
    for gemm in sites.gemms:
        assert check_nm(gemm.weight_OI, TWO_FOUR)
        assert gemm.weight_OI.count_nonzero() * 2 == gemm.weight_OI.numel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    before = {n: module.weight.detach().clone() for n, module, _ in compressed_weights(model)}
    tiny.tiny_loss(model, name, tiny.tiny_batch(name)).backward()
    for n, module, parametrization in compressed_weights(model):
        gradient = module.parametrizations["weight"].original.grad
        gradient = gradient.t() if parametrization.transposed else gradient
        assert not gradient[~parametrization.mask_OI].any(), n
        assert gradient.any(), n
    optimizer.step()
    for n, module, _ in compressed_weights(model):
        assert not torch.equal(module.weight, before[n]), n
        assert torch.equal(module.weight == 0, before[n] == 0), n
    expected = scores(model, name)
    fold_(model)
    assert torch.equal(scores(model, name), expected)
    assert model.state_dict().keys() == original.state_dict().keys()
    assert classes(model) == classes(original)
    assert all(model.state_dict()[key].shape == value.shape for key, value in original.state_dict().items())
    assert find_sites(model, adapter_for(model)).final_tied == tiny.ROWS[name].tied


def classes(model: nn.Module) -> list[tuple[str, str]]:
    """By name: the class of Wav2vec2's convolution, weight-normalized by torch, is made anew for each instance."""
    return [(name, f"{type(m).__module__}.{type(m).__qualname__}") for name, m in model.named_modules()]


@one_each
def test_copies_and_state_dicts(name: str) -> None:
    """A deep copy is independent; a state dict brings masks and scales to a freshly attached model."""
    model = pruned(name, GPUSQ)
    expected = scores(model, name)
    twin = copy.deepcopy(model)
    fold_(twin)
    assert torch.equal(scores(model, name), expected)
    fresh = attached(name, GPUSQ)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(scores(fresh, name), expected)


@every
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """With float32 storage the loaded model has the folded one's tensors, bit for bit, and generates the same."""
    recipe = PRUNE.model_copy(update={"storage": Storage(values="float32", other="float32")})
    model = tiny.ALL[name]()
    plan = make_plan(model, recipe)
    attach_(model, plan)
    prune_(model)
    save_checkpoint(model, plan, recipe, tmp_path / "c", name="n", base={"name": "tiny", "revision": None})
    loaded = load(tmp_path / "c", backend="dense")
    fold_(model)
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(scores(loaded, name), scores(model, name))
    if name in GENERATE:
        assert torch.equal(tokens(loaded, name), tokens(model, name))
