"""The dropout schedule against `schedules.json` (ALGORITHMS E.2), and where models keep their probabilities."""

import pytest
import torch
from policy_cases import data_for, stage_for, student_for, vector
from squeezoo.compress.dropout import ScheduledDropout, dropout_at
from squeezoo.compress.finetune import finetune_
from squeezoo.compress.objective import TrainingError
from squeezoo.compress.stages import Dropout
from squeezoo.models.dense import logits
from tiny import ALL, tiny_batch


def test_the_schedule_of_the_vector():
    for step, p in vector("schedules")["dropout"].items():
        assert dropout_at(Dropout(), int(step)) == pytest.approx(p, abs=1e-9)


# What a forward pass in training mode meets: (dropouts of the backbone, of the head). Per block: attention map, output
# of attention, output of the FFN; before the blocks one on the embeddings.
PLACES = {
    "bert": (1 + 2 * 3, 1),
    "vit": (1 + 2 * 3, 0),
    "distilbert": (1 + 2 * 2, 1),  # none after attention
    "opt": (2 * 3, 0),  # none on the embeddings
    "gpt2": (1 + 2 * 3, 0),
    "bart": (1 + 2 * 4 + 1 + 2 * 6, 0),  # also after the activation; the decoder has cross-attention
    "wav2vec2": (1 + 1 + 2 * 4, 1),  # after the feature projection, on the embeddings, also after the activation
    "timm_vit": (1 + 2 * 3 + 1, 0),  # the map's is inside SDPA; timm tells no backbone from head, so all are set
}


@pytest.mark.parametrize("name", PLACES)
def test_every_dropout_of_the_backbone_is_set_and_given_back(name, monkeypatch):
    """What ``F.dropout`` is really called with in training mode after ``set_``."""
    model, batch = ALL[name](), tiny_batch(name)
    if name != "timm_vit":
        model.set_attn_implementation("eager")
        model.config.layerdrop = 0.0
    called, real = [], torch.nn.functional.dropout

    def spy(x, p=0.5, training=True, inplace=False):
        called.append(p)
        return real(x, p, training, inplace)

    monkeypatch.setattr(torch.nn.functional, "dropout", spy)
    model.train()
    before = {key: dict(vars(module)) for key, module in model.named_modules()}
    schedule = ScheduledDropout(model, Dropout(start=0.25, end=0.25))
    schedule.set_(0)
    logits(model, batch)
    assert (called.count(0.25), len(called) - called.count(0.25)) == PLACES[name]
    if name == "timm_vit":
        assert model.blocks[0].attn.attn_drop.p == 0.25  # what timm hands to SDPA
    schedule.restore_()
    assert {key: dict(vars(module)) for key, module in model.named_modules()} == before


def test_training_sets_it_before_each_step_and_restores_it(tmp_path, monkeypatch):
    student = student_for("bert", "fixed", "2:4")
    dropout = student.bert.encoder.layer[0].output.dropout
    used, inner = [], torch.nn.Dropout.forward

    def forward(self, x):
        if self is dropout:
            used.append(self.p)
        return inner(self, x)

    monkeypatch.setattr(torch.nn.Dropout, "forward", forward)
    stage = stage_for("fixed", dropout={"start": 0.4, "end": 0.1, "steps": 3})
    finetune_(student, stage, data_for("bert"), tmp_path)
    assert used == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.1, 0.1])
    assert dropout.p == student.dropout.p == 0.1


def test_a_model_without_dropout_is_refused():
    with pytest.raises(TrainingError, match="no dropout to schedule"):
        ScheduledDropout(torch.nn.Linear(2, 2), Dropout())
