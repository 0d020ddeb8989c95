"""Pruning a whole model block by block: against a plain loop, on every tiny architecture, and what it refuses."""

import multiprocessing
import os
import threading

import pytest
import torch
from squeezoo.compress.attach import attach_, compressed_weights, fold_
from squeezoo.compress.hessian import Hessian
from squeezoo.compress.lockstep import HaltingCall
from squeezoo.compress.masks import Pattern, check_nm
from squeezoo.compress.oneshot import prune_oneshot_
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.rules import Unstructured
from squeezoo.compress.sparsegpt import sparsegpt
from squeezoo.compress.wanda import InputSquares, wanda_mask
from squeezoo.models.dense import logits
from tiny import ALL, tiny_batch

TWO_FOUR = Pattern(2, 4)
BATCHES = 3
# one of each kind: encoder, images of both libraries, Conv1D, grouped heads, encoder-decoder, speech, projected inputs
NAMES = ("bert", "vit", "timm_vit", "gpt2", "llama", "bart", "wav2vec2", "opt_projected")


def recipe(sparsity="2:4", roles="[block, final]"):
    return Recipe.model_validate(
        {
            "name": "test",
            "description": "one-shot pruning",
            "source": "none",
            "rules": [{"roles": roles.strip("[]").split(", "), "sparsity": sparsity}],
            "stages": [{"stage": "prune"}],
        }
    )


def attached(name, sparsity="2:4", **how):
    model = ALL[name]()
    attach_(model, make_plan(model, recipe(sparsity, **how)))
    return model


def batches(name, count=BATCHES):
    return [tiny_batch(name, seed=seed) for seed in range(count)]


def weights(model):
    return {
        name: (module.weight.t() if weight.transposed else module.weight).detach()
        for name, module, weight in compressed_weights(model)
    }


def by_plain_loop(model, method, data):
    """One GEMM at a time in the order of the forward pass: forget everything, run the whole model on all data, prune.

    That is the definition: inputs come from all GEMMs pruned before. Q, K and V read one tensor, so that none of them
    sees another pruned; BERT's names are in the order of the forward pass. Padding is told by hand.
    """
    found = list(compressed_weights(model))
    for _, module, weight in found:
        statistics = (InputSquares if method == "wanda" else Hessian)(weight.mask_OI.shape[1])

        def see(_, args, statistics=statistics):
            x = args[0]
            x_TI = x[current["attention_mask"].bool()] if x.dim() == 3 else x  # noqa: B023  (the batch of the moment is meant)
            statistics.add_(x_TI, len(x))

        handle = module.register_forward_pre_hook(see)
        with torch.no_grad():
            for current in data:
                logits(model, current)
            handle.remove()
            latent = module.parametrizations.weight.original
            if method == "wanda":
                weight.mask_OI.copy_(wanda_mask(latent, statistics.scaler_I, weight.sparsity))
            else:
                solved = sparsegpt(latent, statistics.value_II(), weight.sparsity)
                latent.copy_(solved.w_OI)
                weight.mask_OI.copy_(solved.mask_OI)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_it_equals_the_definition(method):
    """BERT with padded rows, pieces of two rows; float32 sums in another order."""
    model, plain = attached("bert"), attached("bert")
    report = prune_oneshot_(model, method, batches("bert"), tokens_at_a_time=24)
    by_plain_loop(plain, method, batches("bert"))
    expected = weights(plain)
    assert [record.name for record in report] == list(expected)
    for name, w_OI in weights(model).items():
        torch.testing.assert_close(w_OI, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_is_pruned_alike_with_and_without_recomputing(name):
    """2:4 everywhere, bit-equal in both ways of keeping activations, and again on a second run."""
    states, reports = [], []
    for recompute in (False, True):
        model = attached(name)
        reports.append(prune_oneshot_(model, "sparsegpt", batches(name), tokens_at_a_time=24, recompute=recompute))
        assert all(check_nm(w_OI, TWO_FOUR) for w_OI in weights(model).values())
        states.append(model.state_dict())
    assert {record.name for record in reports[0]} == set(weights(model))
    assert reports[0] == reports[1]
    assert all(tensor.equal(states[1][key]) for key, tensor in states[0].items())
    assert not model.training
    model.train()
    assert torch.isfinite(logits(model, tiny_batch(name))).all()


def test_padding_does_not_count():
    """The same tokens with and without padding beside them: equal masks. Rows 1 and 3 hold 8 real tokens of 12."""
    padded = tiny_batch("bert")
    short = {name: tensor[1::2, :8] if tensor.dim() == 2 else tensor[1::2] for name, tensor in padded.items()}
    long = {name: tensor[1::2] for name, tensor in padded.items()}
    models = [attached("bert", roles="[block]") for _ in range(2)]
    reports = [prune_oneshot_(m, "sparsegpt", [data]) for m, data in zip(models, (short, long), strict=True)]
    assert {record.tokens for report in reports for record in report} == {16}
    for name, w_OI in weights(models[0]).items():
        torch.testing.assert_close(weights(models[1])[name], w_OI, rtol=1e-3, atol=1e-5)


def test_decoder_tokens_are_told_from_encoder_tokens():
    """BART: 4 rows of 12 or 8 real tokens for the encoder, and for K and V of cross attention; 6 for the decoder."""
    report = prune_oneshot_(attached("bart", roles="[block]"), "wanda", [tiny_batch("bart")])
    tokens = {record.name: record.tokens for record in report}
    memory = (".encoder.", ".encoder_attn.k", ".encoder_attn.v")
    of_encoder = {name for name in tokens if any(part in name for part in memory)}
    assert {tokens[name] for name in of_encoder} == {40}
    assert {count for name, count in tokens.items() if name not in of_encoder} == {24}


def test_batches_may_come_in_any_cut():
    """Batches of one row and of twelve, pieces of one row and of all."""
    whole = {name: torch.cat([batch[name] for batch in batches("vit")]) for name in tiny_batch("vit")}
    rows = [{name: tensor[row : row + 1] for name, tensor in whole.items()} for row in range(12)]
    models = [attached("vit") for _ in range(2)]
    prune_oneshot_(models[0], "sparsegpt", [whole], tokens_at_a_time=1_000_000)
    prune_oneshot_(models[1], "sparsegpt", iter(rows), tokens_at_a_time=1)
    for name, w_OI in weights(models[0]).items():
        torch.testing.assert_close(weights(models[1])[name], w_OI, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "timm_vit"])
def test_unstructured(name):
    """Wanda: half of each row. SparseGPT: per matrix, of a fused one per Q, K and V (A.3), one more than the count."""
    model = attached(name, "50%")
    prune_oneshot_(model, "wanda", batches(name))
    for w_OI in weights(model).values():
        assert ((w_OI == 0).sum(1) == w_OI.shape[1] // 2).all()
    model = attached(name, "50%", roles="[block]")
    prune_oneshot_(model, "sparsegpt", batches(name))
    for gemm, module, weight in compressed_weights(model):
        for mask_OI in weight.mask_OI.chunk(3 if gemm.endswith("qkv") else 1):
            assert int((~mask_OI).sum()) == mask_OI.numel() // 2 + 1
        assert isinstance(weight.sparsity, Unstructured)
        assert module.weight.count_nonzero() <= weight.mask_OI.sum()


def test_pruning_beats_magnitude_on_the_data_it_saw():
    from squeezoo.compress.attach import prune_

    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        model = attached("llama")
        prune_(model) if method == "magnitude" else prune_oneshot_(model, method, batches("llama"))
        with torch.no_grad():
            gaps = [logits(model, batch) - logits(ALL["llama"](), batch) for batch in batches("llama")]
        errors[method] = float(torch.cat(gaps).square().mean())
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_columns_are_rounded_by_the_given_quantizer():
    """Joint pruning and quantization: every weight on the grid of its own GEMM."""
    model, scales = attached("bert"), {}

    def levels(weight, w_OI):
        scales[id(weight)] = w_OI.abs().amax(1) / 7
        return lambda column_O, _: (column_O / scales[id(weight)]).round().clamp(-7, 7) * scales[id(weight)]

    prune_oneshot_(model, "sparsegpt", batches("bert"), quantize=levels)
    for _, module, weight in compressed_weights(model):
        level_OI = module.weight / scales[id(weight)][:, None]
        torch.testing.assert_close(level_OI, level_OI.round(), rtol=0, atol=1e-4)
        assert check_nm(module.weight, TWO_FOUR)


def test_memory_does_not_grow_with_depth():
    """No Hessian and no activation outlives its group: tensors alive in front of the last block, as in front of the
    second, weigh the same but for the packed masks."""
    import gc

    def alive():
        storages = [t.untyped_storage() for t in gc.get_objects() if type(t) is torch.Tensor]
        found = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(found.values())

    from squeezoo.models.torchvision_guard import ensure_torchvision_importable

    ensure_torchvision_importable()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, vocab_size=128)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=8, **config))
    attach_(model, make_plan(model, recipe(roles="[block]")))
    seen = []
    prune_oneshot_(model, "sparsegpt", batches("llama"), progress=lambda done, of: seen.append((done, alive())))
    after_block = [size for done, size in seen if done % 7 == 0]
    assert len(after_block) == 8
    masks = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64) // 8  # bytes of one block's packed masks, twice for slack
    assert after_block[6] - after_block[1] <= 5 * masks


def test_the_empty_calibration_set_is_refused():
    with pytest.raises(ValueError, match="calibration set is empty"):
        prune_oneshot_(attached("bert"), "wanda", [])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_nan_in_an_activation_names_gemm_batch_and_row_and_restores_masks(method):
    model, data = attached("vit"), batches("vit")
    data[1]["pixel_values"][2, 0, 3, 3] = torch.nan
    threads = threading.active_count()
    with pytest.raises(ValueError, match=r"vit\.layers\.0\.attention\.q_proj, calibration batch 1, row 2"):
        prune_oneshot_(model, method, data)
    assert all(weight.mask_OI.all() for _, _, weight in compressed_weights(model))
    assert threading.active_count() == threads
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_masks_of_an_earlier_stage_come_back_after_an_error():
    model = attached("vit")
    prune_oneshot_(model, "wanda", batches("vit"))
    before = {name: weight.mask_OI.clone() for name, _, weight in compressed_weights(model)}
    data = batches("vit")
    data[2]["pixel_values"][:] = torch.inf
    with pytest.raises(ValueError, match="calibration batch 2, row 0"):
        prune_oneshot_(model, "sparsegpt", data)
    assert all(weight.mask_OI.equal(before[name]) for name, _, weight in compressed_weights(model))


def test_other_bad_input_is_named():
    with pytest.raises(ValueError, match="'wanda' or 'sparsegpt', found 'magic'"):
        prune_oneshot_(attached("bert"), "magic", batches("bert"))
    with pytest.raises(ValueError, match="no attached GEMM has a sparsity"):
        prune_oneshot_(ALL["bert"](), "wanda", batches("bert"))
    with pytest.raises(ValueError, match=r"batch 0: expected tensors with the same number of rows.*'labels': 3"):
        prune_oneshot_(attached("bert"), "wanda", [{**tiny_batch("bert"), "labels": torch.zeros(3)}])
    model = attached("bert")
    next(compressed_weights(model))[1].parametrizations.weight.original.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer\.0\.attention\.self\.query holds NaN"):
        prune_oneshot_(model, "wanda", batches("bert"))
    model = attached("bert")
    model.unused = attached("bert").classifier
    with pytest.raises(ValueError, match="never calls unused"):
        prune_oneshot_(model, "wanda", batches("bert"))


def test_settings_of_the_model_are_restored():
    model = attached("llama").train()
    model.model.layers[0].mlp.eval()
    assert model.config.use_cache
    prune_oneshot_(model, "wanda", batches("llama"))
    assert model.training
    assert not model.model.layers[0].mlp.training
    assert model.config.use_cache


def test_folding_gives_plain_sparse_weights():
    model = attached("gpt2")
    prune_oneshot_(model, "sparsegpt", batches("gpt2"))
    expected = logits(model, tiny_batch("gpt2"))
    fold_(model)
    assert logits(model, tiny_batch("gpt2")).equal(expected)


def _one_of_two(rank, path, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = attached("bert")
    prune_oneshot_(model, "sparsegpt", batches("bert", 4)[rank::2])
    queue.put((rank, {name: w_OI.numpy() for name, w_OI in weights(model).items()}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_with_half_the_data_each_get_what_one_gets_with_all(tmp_path):
    context = multiprocessing.get_context("fork" if os.name == "posix" and not torch.cuda.is_initialized() else "spawn")
    queue = context.Queue()
    processes = [context.Process(target=_one_of_two, args=(rank, tmp_path / "store", queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    model = attached("bert")
    prune_oneshot_(model, "sparsegpt", batches("bert", 4))
    for name, w_OI in weights(model).items():
        assert (results[0][name] == results[1][name]).all()
        torch.testing.assert_close(torch.from_numpy(results[0][name]), w_OI, rtol=1e-3, atol=1e-5)


def test_a_halting_call_goes_on_where_it_stood_and_hands_on_errors():
    steps = []

    def run():
        steps.append("a")
        call.halt()
        steps.append("b")
        call.halt()
        raise KeyError("c")

    call = HaltingCall(run)
    assert call.resume()
    assert steps == ["a"]
    assert call.resume()
    assert steps == ["a", "b"]
    with pytest.raises(KeyError, match="c"):
        call.resume()
    assert not call.resume()
    call.cancel()


def test_a_cancelled_call_unwinds():
    left = []

    def run():
        try:
            call.halt()
        finally:
            left.append(True)

    call, never_started = HaltingCall(run), HaltingCall(run)
    call.resume()
    call.cancel()
    never_started.cancel()
    assert left == [True]
    assert not call.resume()
