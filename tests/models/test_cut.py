"""Students cut from the first blocks: the same weights, the same states up to there, and a config that says so."""

import pytest
import torch
from squeezoo.models import adapter_for, find_sites
from squeezoo.models.cut import cut_student
from squeezoo.models.dense import build, describe, load_dense, logits, save_dense
from squeezoo.models.errors import DenseError
from squeezoo.models.torchvision_guard import ensure_torchvision_importable
from tiny import ROWS, make, tiny_batch
from torch import nn
from torch.nn.utils import parametrize

# One row per adapter, and every head that needs something of its own.
NAMES = (
    "bert", "roberta_mlm", "distilbert_token", "opt", "opt_projected", "gpt2", "llama", "qwen2", "bart", "bart_qa",
    "vit", "deit_teacher", "dinov2", "timm_vit", "timm_deit", "wav2vec2_stable", "hubert",
)  # fmt: skip


def block_outputs(model, batch):
    """Outputs of all blocks in model order, by hooks of this test's own."""
    found = []
    hooks = [
        block.module.register_forward_hook(lambda _, __, out: found.append(out if torch.is_tensor(out) else out[0]))
        for block in find_sites(model, adapter_for(model)).blocks
    ]
    logits(model, batch)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_first_block_is_the_models_own(name):
    """Every architecture of the table: one block of two is left on each side; encoders compute what the model's first
    block computes. The model keeps its weights and shares no memory."""
    model, batch = make(name), tiny_batch(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    student = cut_student(model, 1)
    assert type(student) is type(model)
    assert not student.training
    blocks = find_sites(student, adapter_for(student)).blocks
    kinds = {block.kind for block in find_sites(model, adapter_for(model)).blocks}
    assert sorted(block.kind for block in blocks) == sorted(kinds)
    ours = student.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in ours.items())
    assert {value.data_ptr() for value in ours.values()}.isdisjoint(v.data_ptr() for v in model.state_dict().values())
    assert torch.equal(block_outputs(student, batch)[0], block_outputs(model, batch)[0])
    for parameter in student.parameters():
        parameter.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_cut_student_is_an_ordinary_model(name, tmp_path):
    """Described, rebuilt, saved and loaded like any other; tied weights stay tied."""
    student, batch = cut_student(make(name), 1), tiny_batch(name)
    rebuilt = build(describe(student))
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
        k: v.shape for k, v in student.state_dict().items()
    }
    expected = find_sites(student, adapter_for(student))
    assert expected.final_tied == find_sites(make(name), adapter_for(make(name))).final_tied
    save_dense(student, None, tmp_path / "student")
    loaded = load_dense(tmp_path / "student", kind="auto").model
    assert torch.equal(logits(loaded, batch), logits(student, batch))


@torch.no_grad()
def test_all_blocks_give_a_copy():
    model, batch = make("gpt2"), tiny_batch("gpt2")
    student = cut_student(model, 2)
    assert torch.equal(logits(student, batch), logits(model, batch))
    assert student.generation_config.to_dict() == model.generation_config.to_dict()
    assert student.generation_config is not model.generation_config


@torch.no_grad()
def test_generation_with_a_cache_works_after_the_cut():
    """The blocks' indices into the cache of keys and values are those of a shorter model."""
    student = cut_student(make("llama"), 1)
    ids = tiny_batch("llama")["input_ids"][:1]
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    cached = student.generate(ids, use_cache=True, **greedy)
    assert torch.equal(cached, student.generate(ids, use_cache=False, **greedy))


def test_lists_with_an_entry_per_block_are_cut_too():
    """Qwen 2 keeps `layer_types` in its config."""
    student = cut_student(make("qwen2"), 1)
    assert describe(student)["config"]["layer_types"] == ["full_attention"]


def test_attention_kernel_and_dtype_are_kept():
    model = make("bert").to(torch.bfloat16)
    model.set_attn_implementation("eager")
    student = cut_student(model, 1)
    assert student.config._attn_implementation == "eager"
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}


def test_what_cannot_be_cut_says_why():
    model = make("bert")
    for blocks in (0, 3):
        with pytest.raises(
            DenseError, match=rf"student of {blocks} blocks cannot be cut from 2 blocks: expected 1 to 2"
        ):
            cut_student(model, blocks)
    with pytest.raises(DenseError, match="2 encoder blocks and 2 decoder blocks: expected 1 to 2"):
        cut_student(make("bart"), 3)
    model.config.num_hidden_layers = 5
    with pytest.raises(DenseError, match=r"has 2 blocks and its config no field that says so"):
        cut_student(model, 1)
    attached = make("bert")
    parametrize.register_parametrization(attached.bert.encoder.layer[0].intermediate.dense, "weight", nn.Identity())
    with pytest.raises(DenseError, match="compression attached: cut the student from the dense model"):
        cut_student(attached, 1)


def test_weights_that_depend_on_the_depth_are_refused():
    """Wav2vec 2.0 can classify by a weighted sum over all blocks: those weights have no meaning for a shorter model."""
    ensure_torchvision_importable()
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(**ROWS["wav2vec2_classification"].config, use_weighted_layer_sum=True)
    with pytest.raises(DenseError, match=r"other tensors than its first blocks, such as layer_weights \(2,\)"):
        cut_student(Wav2Vec2ForSequenceClassification(config), 1)
