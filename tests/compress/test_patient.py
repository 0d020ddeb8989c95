"""Patient distillation against `distillation.json` (intersun/PKD-for-BERT-Model-Compression, src/KD_loss.py)."""

import json
from pathlib import Path

import pytest
import torch
from squeezoo.compress.distill import Pair
from squeezoo.compress.heads import DistillError, Supervision
from squeezoo.compress.objective import Objective
from squeezoo.compress.observe import Observer, available_points
from squeezoo.compress.patient import check_token, one_state, patience_loss, patient_terms
from squeezoo.compress.stages import Finetune, Patient
from tiny import ALL, tiny_batch

VECTOR = json.loads((Path(__file__).parents[1] / "vectors" / "distillation.json").read_text())
CASES = {"alpha0.2_T5": (0.2, 5.0), "alpha0.7_T10": (0.7, 10.0), "alpha0.5_T20": (0.5, 20.0)}


def tensor(name: str) -> torch.Tensor:
    return torch.tensor(VECTOR[name], dtype=torch.float64)


STUDENT, TEACHER = tensor("student_logits"), tensor("teacher_logits")
GIVEN = Supervision("classification", torch.tensor(VECTOR["labels"]), None)


def states() -> list[Pair]:
    """`patience_student`, `patience_teacher` [batch, layers, hidden] as one pair of [B, 1, D] per layer."""
    student, teacher = tensor("patience_student"), tensor("patience_teacher")
    return [Pair(student[:, k : k + 1], teacher[:, k : k + 1]) for k in range(student.shape[1])]


@pytest.mark.parametrize("case", CASES)
def test_output_terms(case):
    """`pkd`: the public code's total with its elementwise KL; the batch mean is our default."""
    alpha, temperature = CASES[case]
    expected = VECTOR["pkd"][case]
    config = Patient(method="patient", alpha=alpha, temperature=temperature, beta=0, kl_reduction="elementwise")
    terms = patient_terms(config, STUDENT, TEACHER, GIVEN)
    assert sum(terms.values()).item() == pytest.approx(expected["total"], rel=1e-6)
    assert terms["hard"].item() == pytest.approx((1 - alpha) * expected["ce"], rel=1e-6)
    assert terms["soft"].item() == pytest.approx(alpha * expected["kd_elementwise_mean_T2"], rel=1e-6)
    batch = patient_terms(config.model_copy(update={"kl_reduction": "batch"}), STUDENT, TEACHER, GIVEN)
    assert batch["soft"].item() == pytest.approx(alpha * expected["kd_batchmean_T2"], rel=1e-6)


def test_patience():
    """`patience_normalised`, and the paper's sum over layers: `patience_sum_over_layers_mean_over_batch`."""
    pairs = states()
    loss = patience_loss(pairs)
    assert loss.item() == pytest.approx(VECTOR["pkd"]["patience_normalised"], rel=1e-6)
    summed = loss.item() * len(pairs) * pairs[0].student.shape[-1]
    assert summed == pytest.approx(VECTOR["pkd"]["patience_sum_over_layers_mean_over_batch"], rel=1e-6)
    config = Patient(method="patient", alpha=0.2, temperature=5, beta=100, kl_reduction="elementwise")
    total = sum(patient_terms(config, STUDENT, TEACHER, GIVEN, pairs).values()).item()
    expected = VECTOR["pkd"]["alpha0.2_T5"]["total"] + 100 * VECTOR["pkd"]["patience_normalised"]
    assert total == pytest.approx(expected, rel=1e-6)


def test_patience_of_all_tokens_leaves_padding_out():
    """The mean over real tokens alone, against the same states without padding."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 4, 6, generator=generator).unbind()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    expected = patience_loss([Pair(student[mask][None], teacher[mask][None])])
    torch.testing.assert_close(patience_loss([Pair(student, teacher, mask)]), expected)


def test_patience_does_not_see_the_length_of_states():
    """Both are divided by their norm, so a state and its double are equal; zeros give no NaN."""
    state = torch.ones(2, 1, 4)
    assert patience_loss([Pair(state, 2 * state)]).item() == pytest.approx(0.0, abs=1e-12)
    zero = torch.zeros(2, 1, 4, requires_grad=True)
    patience_loss([Pair(zero, state)]).backward()
    assert torch.isfinite(zero.grad).all()


def test_one_state_is_that_of_the_first_or_last_real_token():
    """[CLS] stands behind padding on the left, the last token before padding on the right."""
    state = torch.arange(8.0).view(2, 4, 1)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert one_state(state, mask).flatten().tolist() == [0.0, 6.0]
    assert one_state(state, None).flatten().tolist() == [0.0, 4.0]
    assert one_state(state, mask, causal=True).flatten().tolist() == [2.0, 7.0]
    assert one_state(state, None, causal=True).flatten().tolist() == [3.0, 7.0]


def read_by_head(model, state_BD):
    """Scores from the last block's state that a model's own head reads, without its blocks."""
    if hasattr(model, "classification_head"):  # BART: the last </s> of the decoder
        return model.classification_head(state_BD)
    for name in ("transformer.ln_f", "model.norm", "model.decoder.project_out"):  # GPT-2, Llama, OPT
        try:
            return model.score(model.get_submodule(name)(state_BD))
        except AttributeError:
            continue
    hidden_B1D = state_BD.unsqueeze(1)
    return model.classifier(model.bert.pooler(hidden_B1D))


CAUSAL = ("gpt2_classification", "llama_classification", "opt_projected")


@pytest.mark.parametrize(
    ("name", "side"),
    [
        *((name, side) for name in CAUSAL for side in ("right", "left")),
        ("bart_classification", "right"),
        ("bert", "right"),
    ],
)
def test_the_compared_state_is_the_one_that_the_head_reads(name, side):
    """Of the last block, put through the model's own head: its scores. The first token's state in a causal model would
    be the same whatever the text says."""
    model, batch = ALL[name](), tiny_batch(name)
    if side == "left":
        length = batch["attention_mask"].sum(dim=1)
        for key in ("input_ids", "attention_mask"):
            rows = [row.roll(int(row.numel() - n)) for row, n in zip(batch[key], length, strict=True)]
            batch[key] = torch.stack(rows)
    config = Patient(method="patient")
    last = available_points(model, config)[-1]
    with torch.no_grad():
        seen = Observer(model, [last], only_first=True)(batch)
        (state_B1D,) = seen.features
        assert state_B1D.shape[:2] == (4, 1)
        torch.testing.assert_close(read_by_head(model, state_B1D[:, 0]), seen.scores)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_classifier_learns_from_its_text(name):
    """Another text after the same first token: another patience term, against the same teacher."""
    model, batch = ALL[name](), tiny_batch(name)
    stage = Finetune(stage="finetune", epochs=1, learning_rate=1e-3, distill={"method": "patient", "blocks": [1, 2]})
    teacher = ALL[name]()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.2)
    objective = Objective(model, stage, teacher, None, 0)
    other = batch | {"input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, 1:6] = other["input_ids"][:, 1:6].flip(0)
    terms = []
    for given in (batch, other):
        objective(**given)
        terms.append(float(objective.terms["patience"]))
    assert terms[0] != pytest.approx(terms[1], rel=1e-4)


@pytest.mark.parametrize("kind", ["token", "causal", "masked", "seq2seq", "ctc"])
def test_tasks_of_tokens_compare_every_token(kind):
    given = Supervision(kind, None, None)
    with pytest.raises(DistillError, match=f"{kind} task compares every token: write token: all"):
        check_token(Patient(method="patient"), given)
    check_token(Patient(method="patient", token="all"), given)
    check_token(Patient(method="patient", beta=0), given)


def test_elementwise_reduction_needs_a_number_of_classes():
    config = Patient(method="patient", kl_reduction="elementwise")
    with pytest.raises(DistillError, match="spans have none: use batch"):
        check_token(config, Supervision("span", None, None))


def test_states_of_different_width_are_refused():
    with pytest.raises(DistillError, match="equal widths: set beta: 0, or use method: mixed with project: true"):
        patience_loss([Pair(torch.zeros(2, 1, 4), torch.zeros(2, 1, 6))])
