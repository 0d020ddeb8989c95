"""The student with its loss on every kind of task: it learns, padding does not count, the teacher stays as it is."""

from copy import deepcopy

import pytest
import torch
from squeezoo.compress.heads import DistillError
from squeezoo.compress.objective import Objective, TrainingError
from squeezoo.compress.stages import Finetune
from squeezoo.models.cut import cut_student
from squeezoo.models.dense import logits
from tiny import ROWS, make, tiny_batch
from torch import Tensor, nn

MIXED = {"teacher": "dense"}
PATIENT = {"method": "patient", "token": "all", "beta": 10}
# One row per kind of task.
KINDS = ("bert", "timm_vit", "bert_token", "bert_qa", "bert_mlm", "gpt2", "bart", "wav2vec2_stable")
PADDED = ("bert", "bert_token", "bert_qa", "bert_mlm", "gpt2", "opt", "bart", "bart_qa", "wav2vec2_stable")


def stage(distill=None, **settings):
    return Finetune(stage="finetune", epochs=1, learning_rate=1e-3, distill=distill, **settings)


def teacher_of(student: nn.Module, amount: float = 0.05) -> nn.Module:
    """A model of the same class with other weights."""
    teacher = deepcopy(student)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return teacher


def pair(name: str, distill=MIXED, **settings) -> Objective:
    student = make(name)
    return Objective(student, stage(distill, **settings), teacher_of(student), None, 0)


def batch_of(name: str) -> dict[str, Tensor]:
    """`tiny_batch`; speech with an attention mask too, the odd waveforms padded from 140 values on."""
    batch = tiny_batch(name)
    if name == "wav2vec2_stable":
        mask = torch.ones_like(batch["input_values"], dtype=torch.long)
        mask[1::2, 140:] = 0
        batch |= {"input_values": batch["input_values"] * mask, "attention_mask": mask}
    return batch


def longer(name, batch):
    """The batch with more padding on the right: text and labels by 3 tokens, waveforms by 40 values."""
    batch = dict(batch)
    for key, value in batch.items():
        by = 40 if key == "input_values" or (key == "attention_mask" and "input_values" in batch) else 3
        if value.dim() == 2:
            filler = {"labels": -100, "input_ids": 1, "decoder_input_ids": 1}.get(key, 0)
            batch[key] = torch.nn.functional.pad(value, (0, by), value=filler)
    return batch


def unlabelled(name: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without targets; a decoder then needs its inputs."""
    rest = {key: value for key, value in batch.items() if key not in ("labels", "start_positions", "end_positions")}
    if ROWS[name].kind == "seq2seq-lm":
        rest["decoder_input_ids"] = make(name).prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    return rest


LEARNING = [*((name, "mixed") for name in KINDS), *((name, "patient") for name in ("bert", "bert_token", "bart"))]


@pytest.mark.parametrize(("name", "method"), LEARNING)
def test_a_student_learns_and_its_teacher_does_not_change(name, method):
    """Every kind of task, in training mode: the loss of the first batch falls, the teacher is the same bit for bit,
    gets no gradient and stays in evaluation mode. Patient students have one block, the teacher two."""
    student = make(name)
    teacher = teacher_of(student)
    if method == "patient":
        student = cut_student(student, 1)
    config = MIXED if method == "mixed" else {**PATIENT, "blocks": (1,) if ROWS[name].adapter != "bart" else (1, 3)}
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    objective = Objective(student, stage(config), teacher, None, 0)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    batch = batch_of(name)
    objective.eval()
    first = objective(**batch)["loss"].item()
    objective.train()
    torch.manual_seed(0)
    for _ in range(3):
        optimizer.zero_grad()
        objective(**batch)["loss"].backward()
        optimizer.step()
    assert objective.eval()(**batch)["loss"].item() < first
    assert set(objective.terms) == ({"hard", "soft", "feature"} if method == "mixed" else {"hard", "soft", "patience"})
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    assert all(name.startswith("student.") for name in objective.state_dict())


TOKENS = ("bert_token", "bart", "wav2vec2_stable")
PADDING = [*((name, MIXED) for name in PADDED), *((name, PATIENT) for name in TOKENS)]


@pytest.mark.parametrize(("name", "config"), PADDING, ids=lambda value: value if isinstance(value, str) else None)
def test_padding_does_not_count(name, config):
    """The same samples in a longer batch have the same loss, with labels and without."""
    objective = pair(name, config).eval()
    batch = batch_of(name)
    for given in (batch, unlabelled(name, batch)):
        expected = objective(**given)["loss"].item()
        assert objective(**longer(name, given))["loss"].item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("name", KINDS)
def test_labels_are_optional(name):
    """Without labels the hard loss takes the teacher's prediction (ALGORITHMS E.1): no labels, `labels: false`, and the
    predictions written down as labels are the same."""
    student = make(name)
    teacher = teacher_of(student)
    batch = batch_of(name)
    bare = unlabelled(name, batch)
    expected = Objective(student, stage(MIXED), teacher, None, 0).eval()(**bare)["loss"].item()
    if ROWS[name].kind != "seq2seq-lm":  # there labels also make the decoder's inputs and mask
        without = Objective(student, stage({**MIXED, "labels": False}), teacher, None, 0).eval()
        assert without(**batch)["loss"].item() == pytest.approx(expected, rel=1e-6)
    if ROWS[name].kind in ("classification", "token", "masked-lm"):
        with torch.no_grad():
            named = {**bare, "labels": logits(teacher, bare).argmax(-1)}
        again = Objective(student, stage(MIXED), teacher, None, 0).eval()
        assert again(**named)["loss"].item() == pytest.approx(expected, rel=1e-6)


def test_without_distillation_the_loss_is_the_supervised_one():
    student = make("bert")
    batch = tiny_batch("bert")
    objective = Objective(student, stage(), None, None, 0).eval()
    torch.testing.assert_close(objective(**batch)["loss"], student(**batch).loss)
    assert set(objective.terms) == {"hard"}
    with pytest.raises(DistillError, match="no labels"):
        objective(**unlabelled("bert", batch))


def test_a_penalty_is_part_of_the_loss():
    """A policy's addition has its gradient, shows up in the terms, and may be nothing at some step."""
    objective = Objective(make("bert"), stage(), None, None, 0).eval()
    batch = tiny_batch("bert")
    plain = objective(**batch)["loss"].item()
    weight = objective.student.classifier.weight
    objective.penalty = lambda: 3 * weight.square().sum()
    loss = objective(**batch)["loss"]
    assert loss.item() == pytest.approx(plain + 3 * weight.square().sum().item(), rel=1e-6)
    with_penalty = torch.autograd.grad(loss, weight)[0]
    objective.penalty = lambda: None
    alone = torch.autograd.grad(objective(**batch)["loss"], weight)[0]
    torch.testing.assert_close(with_penalty, alone + 6 * weight.detach())
    objective.penalty = lambda: torch.tensor(float("nan"))
    objective.step = 7
    with pytest.raises(TrainingError, match=r"loss is nan at step 7 \(hard .*, penalty nan\)"):
        objective(**batch)


def test_students_of_another_architecture_learn_from_scores_alone():
    """DistilBERT from BERT: same label space, feature 0; its forward pass takes no token_type_ids."""
    student, teacher = make("distilbert"), make("bert")
    batch = {**tiny_batch("distilbert"), "token_type_ids": torch.zeros(4, 12, dtype=torch.long)}
    objective = Objective(student, stage({**MIXED, "feature": 0}), teacher, None, 0)
    objective(**batch)["loss"].backward()
    assert objective.student.classifier.weight.grad.any()


def test_students_of_another_architecture_and_equal_width_share_feature_maps():
    student, teacher = make("distilbert"), make("bert")
    objective = Objective(student, stage(MIXED), teacher, None, 0)
    objective(**tiny_batch("distilbert"))["loss"].backward()
    assert len(objective._observe_student.points) == 4


def narrow(width: int = 16, depth: int = 2) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    changes = {"hidden_size": width, "num_hidden_layers": depth}
    return BertForSequenceClassification(BertConfig(**(ROWS["bert"].config | changes))).eval()


def test_a_projection_compares_narrow_students():
    """`project: true`: maps from 16 to 32 per point, trained with the student and no part of it."""
    student = narrow()
    with pytest.raises(DistillError, match=r"teacher has 32, .* of the student 16; .*project: true.*feature: 0"):
        Objective(student, stage(MIXED), make("bert"), None, 0)
    objective = Objective(student, stage({**MIXED, "project": True}), make("bert"), None, 0)
    objective(**tiny_batch("bert"))["loss"].backward()
    assert [tuple(p.weight.shape) for p in objective.projections] == [(32, 16)] * 4
    assert all(projection.weight.grad.any() for projection in objective.projections)
    keys = objective.state_dict().keys()
    assert {key.split(".")[0] for key in keys} == {"student", "projections"}
    assert not any("projection" in key for key in student.state_dict())


def test_models_that_cannot_be_compared_are_refused_before_anything_changes():
    teacher = make("bert").train()
    with pytest.raises(DistillError, match=r"teacher has 2 blocks, the student 1: .*blocks: \[2, 4"):
        Objective(narrow(32, 1), stage(MIXED), teacher, None, 0)
    with pytest.raises(DistillError, match=r"width.*set beta: 0"):
        Objective(narrow(), stage({"method": "patient"}), teacher, None, 0)
    with pytest.raises(DistillError, match="compares no block of this student"):
        Objective(narrow(32, 1), stage({"method": "patient"}), teacher, None, 0)
    with pytest.raises(DistillError, match="pass the teacher"):
        Objective(narrow(32, 1), stage(MIXED), None, None, 0)
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    unknown = narrow()
    unknown.config.model_type = "mystery"
    with pytest.raises(DistillError, match=r"set feature: 0\. no adapter for model type 'mystery'"):
        Objective(unknown, stage(MIXED), teacher, None, 0)
    assert Objective(unknown, stage({**MIXED, "feature": 0}), teacher, None, 0)


def test_named_blocks_are_compared():
    """`blocks: [2]`: the student's first block with the teacher's second, and nothing else."""
    student, teacher = make("bert"), teacher_of(make("bert"))
    objective = Objective(student, stage({**MIXED, "blocks": [2], "features": ["block_out"]}), teacher, None, 0).eval()
    batch = tiny_batch("bert")
    objective(**batch)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    ours, theirs = student(**inputs, output_hidden_states=True), teacher(**inputs, output_hidden_states=True)
    real = batch["attention_mask"].bool()
    expected = (ours.hidden_states[1] - theirs.hidden_states[2])[real].square().mean()
    expected = expected + (ours.logits - theirs.logits).square().mean()
    torch.testing.assert_close(objective.terms["feature"], expected)


def test_layerdrop_leaves_a_block_out_of_the_loss():
    """Wav2vec 2.0 trains with it; the other terms go on."""
    objective = pair("wav2vec2_stable").train()
    objective.student.config.layerdrop = 1.0
    objective(**batch_of("wav2vec2_stable"))["loss"].backward()
    assert set(objective.terms) == {"hard", "soft", "feature"}


def test_bfloat16_autocast_has_losses_in_float32():
    objective = pair("bert").eval()
    batch = tiny_batch("bert")
    exact = objective(**batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(**batch)["loss"]
    assert loss.dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in objective.terms.values())
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


def test_augmentation_depends_on_seed_and_step_alone():
    """Student and teacher see the same augmented batch."""

    def augment(batch, generator):
        noise = torch.randn(batch["pixel_values"].shape, generator=generator)
        return {**batch, "pixel_values": batch["pixel_values"] + noise}

    student = make("vit")
    objective = Objective(student, stage(MIXED), deepcopy(student), augment, 3).eval()
    batch = tiny_batch("vit")
    losses = []
    for step in (0, 1, 0):
        objective.step = step
        losses.append(objective(**batch)["loss"].item())
        assert objective.terms["soft"].item() == pytest.approx(0, abs=1e-6)
        assert objective.terms["feature"].item() == pytest.approx(0, abs=1e-6)
    assert losses[0] == losses[2] != losses[1]


def test_distributed_training_has_the_same_gradients(tmp_path):
    """Under DistributedDataParallel, one process: the hooks of the taps are set inside its forward pass."""
    from torch import distributed

    objective, batch = pair("bert").eval(), tiny_batch("bert")
    objective(**batch)["loss"].backward()
    expected = {key: value.grad.clone() for key, value in objective.named_parameters()}
    objective.zero_grad()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(objective)
        parallel(**batch)["loss"].backward()
    finally:
        distributed.destroy_process_group()
    for key, value in objective.named_parameters():
        torch.testing.assert_close(value.grad, expected[key])
