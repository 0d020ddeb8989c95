"""A loss that is not finite: which sample, weight or module broke first, and a cure that fits."""

import pytest
import torch
from policy_cases import data_for, stage_for, student_for
from squeezoo.compress.diagnose import find_fault
from squeezoo.compress.finetune import finetune_
from squeezoo.compress.objective import Objective, TrainingError
from squeezoo.compress.train_data import TrainData
from tiny import TINY, tiny_batch
from torch import nn


def test_a_broken_sample_is_named_by_its_place_in_the_data(tmp_path):
    """10 images in batches of 4; one of them holds NaN. Its number and the batch's are told, not a learning rate."""
    data = data_for("timm_vit")
    features = [dict(feature) for feature in data.features]
    features[6]["pixel_values"] = features[6]["pixel_values"].clone()
    features[6]["pixel_values"][0, 0, 0] = float("nan")
    stage = stage_for("fixed", batch_size=4)
    with pytest.raises(
        TrainingError, match=r"`pixel_values` of row \d of the batch holds NaN.*mend the training"
    ) as told:
        finetune_(student_for("timm_vit", "fixed", "2:4"), stage, TrainData(features, data.collate), tmp_path)
    message = str(told.value)
    samples = [int(n) for n in message.split("batch of samples ")[1].split(":")[0].split(", ")]
    row = int(message.split("of row ")[1].split()[0])
    assert samples[row] == 6
    assert "learning rate" not in message


def test_the_samples_of_a_step_are_those_that_were_trained_on(tmp_path):
    """Over three epochs of batches with a rest: what the sampler says of each step is what the collator got."""
    from squeezoo.compress.train_data import EpochSampler

    data, seen = data_for("timm_vit"), []
    place = {feature["pixel_values"].sum().item(): i for i, feature in enumerate(data.features)}

    def collate(rows):
        seen.append([place[row["pixel_values"].sum().item()] for row in rows])
        return data.collate(rows)

    stage = stage_for("fixed", batch_size=4, epochs=3)
    finetune_(student_for("timm_vit", "fixed", "2:4"), stage, TrainData(data.features, collate), tmp_path, seed=5)
    sampler = EpochSampler([1] * 10, 4, 5)
    assert [sampler.at_step(step) for step in range(9)] == seen


@pytest.mark.parametrize("masked", [True, False])
def test_a_broken_weight_is_named_and_at_the_first_step_no_rate_is_blamed(masked, tmp_path):
    """A latent weight below mask and quantizer by the GEMM's own name; also one that nothing is done to."""
    student = student_for("bert", "fixed", "2:4")
    name = "bert.encoder.layer.1.output.dense" if masked else "bert.encoder.layer.0.output.LayerNorm"
    module = student.get_submodule(name)
    with torch.no_grad():
        (module.parametrizations.weight.original if masked else module.weight).view(-1)[3] = float("nan")
    message = (
        rf"loss is nan at step 0 \(hard nan\), batch of samples .*: {name}\.weight of the model holds NaN before any"
    )
    with pytest.raises(TrainingError, match=message) as told:
        finetune_(student, stage_for("fixed"), data_for("bert"), tmp_path)
    assert "learning rate" not in str(told.value)


class Overflowing(nn.Module):
    """exp of large values: infinity from finite weights and inputs."""

    def forward(self, x):
        return x.exp()


def test_the_first_module_whose_output_is_not_finite_is_named():
    """Expected, in the order of the forward pass: 4 * 100 is finite, exp of it is not, all after it neither."""
    model = nn.Sequential(nn.Linear(4, 4), Overflowing(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.fill_(100.0)
    x = torch.ones(1, 4)
    fault = find_fault({"x": x}, [("model", model, lambda: model(x))])
    assert fault.kind == "outputs"
    assert (
        "of the model that is not finite is that of 1 (Overflowing): infinity, from inputs of up to 400" in fault.where
    )
    assert not any(module._forward_hooks for module in model.modules())
    sound = nn.Sequential(nn.Linear(4, 4))
    assert find_fault({"x": x}, [("model", sound, lambda: sound(x))]).kind == "loss"

    def fails():
        model(x)
        raise ValueError("stumbled over infinity")

    assert find_fault({"x": x}, [("model", model, fails)]).where == fault.where


def test_a_broken_teacher_is_not_taken_for_a_broken_student():
    teacher = TINY["bert"]()
    objective = Objective(TINY["bert"](), stage_for("fixed", distill={"teacher": "dense"}), teacher, None, 0)
    with torch.no_grad():
        teacher.bert.embeddings.word_embeddings.weight.fill_(float("inf"))
    with pytest.raises(TrainingError, match=r"word_embeddings\.weight of the teacher holds infinity.*hand in a sound"):
        objective(**tiny_batch("bert"))
