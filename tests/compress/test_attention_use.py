"""Attached models are copied, saved, compiled and trained like any other."""

import copy
import pickle

import pytest
import torch
from maps import level, make_sharp, make_sparse, specs
from squeezoo.compress.attention_doors import attach_attention_, detach_attention_
from squeezoo.compress.attention_map import ATTENTION_MAP, activate_attention_, attention_maps
from squeezoo.models.dense import logits
from tiny import tiny_batch, tiny_loss


def scores(model, name):
    with torch.no_grad():
        return logits(model, tiny_batch(name))


@pytest.mark.parametrize("name", ["bert", "llama", "timm_vit"], scope="module")
class TestCopies:
    def test_a_copy_follows_its_own_compressors(self, name):
        model = make_sharp(name)
        attach_attention_(model, specs(model, q=1, k=1, p=1, v=1), level)
        other = copy.deepcopy(model)
        activate_attention_(other)
        for _, _, compressor in attention_maps(model):
            for which in "qkpv":
                getattr(compressor, which).active = False
        torch.testing.assert_close(scores(model, name), scores(make_sharp(name), name), atol=1e-5, rtol=0)
        assert (scores(other, name) - scores(model, name)).abs().max() > 1e-4
        detach_attention_(model)
        assert list(attention_maps(other))
        detach_attention_(other)
        assert torch.equal(scores(other, name), scores(make_sharp(name), name))

    def test_pickled_it_computes_the_same(self, name):
        model = make_sparse(name)
        again = pickle.loads(pickle.dumps(model))  # what spawning a process does
        assert torch.equal(scores(again, name), scores(model, name))

    def test_the_state_dict_carries_the_switch(self, name):
        model, other = make_sparse(name), make_sharp(name)
        attach_attention_(other, specs(other))
        state = model.state_dict()
        assert sum(key.endswith(f"{ATTENTION_MAP}.active_flag") for key in state) == 2
        other.load_state_dict(state)
        assert all(compressor.active for _, _, compressor in attention_maps(other))
        assert torch.equal(scores(other, name), scores(model, name))
        activate_attention_(model, active=False)
        other.load_state_dict(model.state_dict(), assign=True)
        assert not any(compressor.active for _, _, compressor in attention_maps(other))

    def test_training_under_it_lowers_the_loss(self, name):
        model = make_sharp(name)
        attach_attention_(model, specs(model, q=1, k=1, p=1, v=1), level)
        activate_attention_(model)
        model.train()
        assert all(compressor.training for _, _, compressor in attention_maps(model))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        batch, losses = tiny_batch(name), []
        for _ in range(6):
            losses.append(tiny_loss(model, name, batch))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.9 * losses[0]
        for _, module, compressor in attention_maps(model):
            assert all(getattr(compressor, which).scale.grad is not None for which in "qkpv")
            assert all(p.grad is not None for p in module.parameters())


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, saving = (make_sparse("bert").train() for _ in range(2))
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        torch.manual_seed(0)  # the same dropout
        tiny_loss(model, "bert", tiny_batch("bert")).backward()
    for one, other in zip(plain.parameters(), saving.parameters()):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(
    ("name", "block", "attention"),
    [("timm_vit", "blocks.1", "attn"), ("bert", "bert.encoder.layer.1", "attention.self")],
)
def test_a_compiled_block_computes_the_same(name, block, attention):
    """torch.compile breaks its graph at the map; forward and backward are those of the block as it was."""
    model, other = make_sparse(name), make_sparse(name)
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for run in (model.get_submodule(block), torch.compile(other.get_submodule(block), backend="eager")):
        out = run(x)
        out = out[0] if isinstance(out, tuple) else out
        out.square().sum().backward()
        results.append((out, [p.grad for p in run.parameters()]))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)
    assert next(attention_maps(other))[2].active


def test_under_the_trainer(tmp_path):
    """transformers.Trainer trains it, scales included, and its checkpoint has the switch and the scales."""
    from safetensors.torch import load_file
    from transformers import Trainer, TrainingArguments

    model = make_sharp("bert")
    attach_attention_(model, specs(model, q=1, k=1, p=1, v=1), level)
    activate_attention_(model)
    batch = tiny_batch("bert", n=8)
    samples = [{key: values[i] for key, values in batch.items()} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, save_steps=2, report_to=[],
        use_cpu=True, disable_tqdm=True, bf16=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=samples).train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    place = f"bert.encoder.layer.1.attention.self.{ATTENTION_MAP}."
    assert saved[place + "active_flag"]
    for which in "qkpv":
        assert saved[f"{place}{which}.scale"] != 1 / 16
