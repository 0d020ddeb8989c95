"""Fine-tuning with every mask policy on tiny models: exact resume, evaluation, logs, schedules, what trains.

A run is cut between two steps, with a checkpoint after every step; test_engine.py kills a real process.
"""

import copy
import gc
import json

import pytest
import torch
from policy_cases import LSQ8, data_for, stage_for, student_for, vector
from squeezoo.compress.attach import compressed_weights, latent_OI, prune_, quantizers
from squeezoo.compress.finetune import LOG, finetune_
from squeezoo.compress.journal import read_journal
from squeezoo.compress.masks import Pattern, check_nm
from squeezoo.compress.objective import TrainingError
from squeezoo.compress.policies import Policy
from tiny import ALL

ADMM = {"method": "admm", "rho": 0.05}
DEEP4 = {"weight": {"method": "sawb", "bits": 4}, "input": {"method": "pact", "bits": 4}}
CASES = {  # policy, sparsity, further settings of the stage, quantized, steps after which the run is cut
    "fixed": ("fixed", "2:4", {"dropout": {"start": 0.4, "end": 0.1, "steps": 5}}, LSQ8, (3,)),
    "sr_ste": ({"method": "sr_ste", "decay": 1e-2}, "2:4", {}, None, (3, 5)),
    "sr_ste decoupled, quantized": ({"method": "sr_ste", "decay": 1e-2, "decoupled": True}, "2:4", {}, LSQ8, (4,)),
    "admm": (ADMM | {"steps": 2}, "2:4", {}, None, (2, 3, 5)),
    "admm decoupled, unstructured, SGD": (
        ADMM | {"decoupled": True, "steps": 2}, "50%", {"optimizer": "sgd"}, None, (3,)
    ),
    "admm, masked at the end, quantized": (ADMM | {"masked_epochs": 1}, "2:4", {}, DEEP4, (2, 4)),
    "fixed, Q8BERT": ("fixed", "2:4", {}, {"weight": {"method": "q8bert"}, "input": {"method": "minmax"}}, (4,)),
    "iterative": ({"method": "iterative", "step": 0.25, "interval": 2}, "75%", {}, None, (1, 2, 3)),
    "iterative, rewound": (
        {"method": "iterative", "step": 0.25, "interval": 2, "start_from": "rewound"}, "75%", {}, None, (5,)
    ),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Tiny models: a second thread only costs, and so does the Trainer's garbage collection over imported modules."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def begin(case):
    policy, sparsity, settings, quantized, _ = CASES[case]
    student = student_for("bert", policy, sparsity, quantized)
    if policy == "fixed":
        prune_(student)
    return student, stage_for(policy, **settings)


def cut_run(student, stage, folder, step):
    """Train until ``step`` optimizer steps are done and saved, then stop as a kill would."""
    from squeezoo.compress.progress import TrainingProgress

    def stop(self, args, state, control, **_):
        if state.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingProgress, "on_step_begin", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune_(student, stage, data_for("bert"), folder, save_seconds=0)


def states_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.mark.parametrize("case", CASES)
def test_a_cut_and_resumed_run_ends_with_the_same_bits_and_the_same_log(case, tmp_path):
    """Every policy, also cut right at an ADMM update, a prune event, or the change to the masked epoch."""
    student, stage = begin(case)
    whole = finetune_(student, stage, data_for("bert"), tmp_path / "whole")
    assert whole["steps"] == 6
    assert whole["resumed_at"] == 0
    folder, cuts = tmp_path / "cut", CASES[case][4]
    for cut in cuts:  # each goes on from the one before
        cut_run(begin(case)[0], stage, folder, cut)
    again, _ = begin(case)
    resumed = finetune_(again, stage, data_for("bert"), folder, save_seconds=0)
    assert resumed["resumed_at"] == cuts[-1]
    assert states_equal(student, again)
    assert resumed["history"] == whole["history"]
    assert read_journal(folder / LOG) == whole["history"]


def test_admm_ends_nearer_to_two_of_four_than_it_began(tmp_path):
    """The primal residual falls, the penalty pulls dense weights to their projection, pruning at the end is exact; what
    no rule names trains as usual, and the teacher never changes."""
    teacher = ALL["bert"]()
    before = copy.deepcopy(teacher.state_dict())
    policy = ADMM | {"rho": 1.0, "steps": 10}
    student = student_for("bert", policy, "2:4")
    stage = stage_for(policy, steps=60, learning_rate=3e-3, distill={"teacher": "dense"})
    result = finetune_(student, stage, data_for("bert"), tmp_path, teacher=teacher)
    primal = [record["primal"] for record in result["history"] if record["kind"] == "admm"]
    assert len(primal) == 7  # the beginning and 6 iterations
    assert primal[-1] < 0.5 * primal[0]
    assert all(check_nm(module.weight, Pattern(2, 4)) for _, module, _ in compressed_weights(student))
    assert 0.5 < result["mask_similarity"] <= 1
    parameters = dict(student.named_parameters())
    for name in ("bert.embeddings.word_embeddings.weight", "classifier.weight", "bert.pooler.dense.weight"):
        assert not torch.equal(parameters[name], before[name])
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    record = json.loads((tmp_path / LOG).read_text().splitlines()[-1])
    assert record.keys() == {"step", "kind", "iteration", "primal", "dual", "penalty", "similarity", "layers"}
    assert record["layers"].keys() == {name for name, _, _ in compressed_weights(student)}


def test_sr_ste_moves_masks_and_leaves_two_of_four(tmp_path):
    student = student_for("bert", {"method": "sr_ste"}, "2:4")
    fixed = copy.deepcopy(student)
    prune_(fixed)
    result = finetune_(student, stage_for({"method": "sr_ste"}, learning_rate=1e-2), data_for("bert"), tmp_path)
    moved = [not torch.equal(p.mask_OI, q.mask_OI) for (_, _, p), (_, _, q) in zip(
        compressed_weights(student), compressed_weights(fixed))]  # fmt: skip
    assert any(moved)
    assert all(check_nm(module.weight, Pattern(2, 4)) for _, module, _ in compressed_weights(student))
    assert [record["step"] for record in result["history"]] == [3, 6]
    assert result["mask_similarity"] < 1


@pytest.mark.parametrize("policy", [ADMM, {"method": "sr_ste"}], ids=["admm", "sr_ste"])
def test_transposed_weights_are_pruned_along_in_features(policy, tmp_path):
    """GPT-2's Conv1D holds [in, out]; its loss is that of a language model."""
    student = student_for("gpt2", policy, "1:4")
    finetune_(student, stage_for(policy), data_for("gpt2"), tmp_path)
    for _, module, parametrization in compressed_weights(student):
        assert parametrization.transposed
        assert check_nm(module.weight.t(), Pattern(1, 4))
        assert not check_nm(module.weight, Pattern(1, 4))


@pytest.mark.parametrize("start_from", ["trained", "rewound"])
def test_imp_prunes_to_the_weight_and_rewinds_all_but_the_head(start_from, tmp_path):
    """70 % of BERT's six linears and pooler as ALGORITHMS B.6 counts it; tied embeddings belong to the backbone."""
    policy = {"method": "iterative", "step": 0.1, "interval": 2, "start_from": start_from}
    student = student_for("bert_mlm", policy, "70%")
    first = copy.deepcopy(student.state_dict())
    result = finetune_(student, stage_for(policy), data_for("bert_mlm"), tmp_path)
    assert result["steps"] == 14
    total = sum(p.mask_OI.numel() for _, _, p in compressed_weights(student))
    left = total
    for done in range(7):
        left -= round(left / (10 - done))
    assert [record["zeros"] for record in result["history"]][-1] == total - left
    assert sum(int((module.weight == 0).sum()) for _, module, _ in compressed_weights(student)) == total - left
    assert abs(total - left - 0.7 * total) <= 2
    state = student.state_dict()
    same = {key for key in state if torch.equal(state[key], first[key]) and "mask" not in key}
    backbone = {key for key in state if key.startswith("bert.") and "mask" not in key}
    if start_from == "rewound":
        assert backbone <= same
    else:
        assert not any(key.endswith("original") for key in same)
    assert "cls.predictions.transform.dense.weight" not in same


def test_evaluation_each_epoch_is_hard_pruned_and_changes_nothing(tmp_path):
    """With ADMM the callback sees N:M weights in evaluation mode; training goes on dense, as if it had not looked."""
    seen = []

    def look(model):
        assert not model.training
        torch.rand(3)  # it may draw random numbers
        seen.append(all(check_nm(m.weight, Pattern(2, 4)) for _, m, _ in compressed_weights(model)))
        return {"score": float(len(seen))}

    stage = stage_for(ADMM | {"steps": 4}, epochs=2.5)
    plain, watched = (student_for("bert", ADMM, "2:4") for _ in range(2))
    finetune_(plain, stage, data_for("bert"), tmp_path / "plain")
    result = finetune_(watched, stage, data_for("bert"), tmp_path / "watched", evaluate=look)
    assert seen == [True] * 3
    evaluations = [record for record in result["history"] if record["kind"] == "evaluation"]
    assert [(r["step"], r["epoch"], r["score"]) for r in evaluations] == [(3, 1, 1), (6, 2, 2), (8, 8 / 3, 3)]
    assert states_equal(plain, watched)


def test_a_log_cut_off_by_a_kill_is_taken_up_where_it_is_whole(tmp_path):
    stage = stage_for(ADMM | {"steps": 2})
    whole = finetune_(student_for("bert", ADMM, "2:4"), stage, data_for("bert"), tmp_path / "a")
    cut_run(student_for("bert", ADMM, "2:4"), stage, tmp_path / "b", 3)
    with (tmp_path / "b" / LOG).open("a") as file:
        file.write('{"step": 6, "kind": "adm')
    resumed = finetune_(student_for("bert", ADMM, "2:4"), stage, data_for("bert"), tmp_path / "b")
    assert resumed["history"] == whole["history"] == read_journal(tmp_path / "b" / LOG)


class Recorder(Policy):
    """The fixed policy, which writes down what the optimizer did."""

    def after_backward_(self):
        if self.weights:
            self.grad = self.weights[0].weight.grad.clone()
            self.before = self.weights[0].weight.detach().clone()

    def after_step_(self, step, optimizer, epoch_ends):
        moved = (self.before - self.weights[0].weight.detach()) if self.weights else None
        seen.append((optimizer.param_groups[0]["lr"], moved, getattr(self, "grad", None)))
        return []


seen = []


@pytest.fixture
def recorded(monkeypatch):
    def make(student, stage, total, *_):
        return Recorder(student, total)

    monkeypatch.setattr("squeezoo.compress.finetune.make_policy", make)
    seen.clear()
    return seen


def test_linear_warmup_and_decay(recorded, tmp_path):
    """`schedules.json`: the rate used by the k-th optimizer step; `steps` and `warmup_steps` instead of epochs."""
    expected = vector("schedules")["linear_warmup_decay"]
    stage = stage_for(
        "fixed",
        steps=expected["total"],
        warmup_steps=expected["warmup"],
        learning_rate=expected["base_lr"],
        batch_size=8,
    )
    result = finetune_(student_for("timm_vit", "fixed", "2:4"), stage, data_for("timm_vit", 8), tmp_path)
    assert result["steps"] == len(recorded) == 100
    for step, rate in expected["lr"].items():
        if int(step) < 100:  # step 100 is after the end
            assert recorded[int(step)][0] == pytest.approx(rate, rel=1e-6, abs=1e-12)


def test_sgd_has_momentum(recorded, tmp_path):
    """v <- 0.9 v + g, w <- w - lr v, at a constant rate without decay and clipping: the second step holds the first."""
    stage = stage_for(
        "fixed", steps=2, optimizer="sgd", schedule="constant", warmup=0, weight_decay=0, max_grad_norm=1e9
    )
    finetune_(student_for("timm_vit", "fixed", "2:4"), stage, data_for("timm_vit"), tmp_path)
    (_, first, g1), (_, second, g2) = recorded
    torch.testing.assert_close(first, 1e-3 * g1, rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(second, 1e-3 * (0.9 * g1 + g2), rtol=1e-3, atol=1e-8)


def test_imp_starts_the_learning_rate_anew_after_each_event(tmp_path, monkeypatch):
    policy = {"method": "iterative", "step": 0.25, "interval": 4}
    rates = []
    from squeezoo.compress.policies import IterativePolicy

    inner = IterativePolicy.after_step_

    def after(self, step, optimizer, epoch_ends):
        rates.append(optimizer.param_groups[0]["lr"])
        return inner(self, step, optimizer, epoch_ends)

    monkeypatch.setattr(IterativePolicy, "after_step_", after)
    finetune_(student_for("timm_vit", policy, "50%"), stage_for(policy, warmup=0), data_for("timm_vit"), tmp_path)
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4] * 2)


def test_scales_learn_without_weight_decay(tmp_path):
    """With a rate for the weights of nearly zero and a huge decay, weights shrink and scales do not."""
    student = student_for("bert", ADMM, "2:4", LSQ8)
    scales = {name: quantizer.scale.detach().clone() for name, quantizer in quantizers(student)}
    weights = {name: latent_OI(m, p).detach().clone() for name, m, p in compressed_weights(student)}
    stage = stage_for(ADMM, learning_rate=1e-5, weight_decay=1e4, schedule="constant", warmup=0)
    finetune_(student, stage, data_for("bert"), tmp_path)
    for name, module, parametrization in compressed_weights(student):
        assert latent_OI(module, parametrization).norm() < 0.7 * weights[name].norm()  # (1 - 0.1)^6 = 0.53
    for name, quantizer in quantizers(student):
        assert not torch.equal(quantizer.scale, scales[name])
        torch.testing.assert_close(quantizer.scale.detach(), scales[name], rtol=1e-2, atol=0)


@pytest.mark.parametrize("policy", [ADMM | {"steps": 1}, {"method": "sr_ste"}])
def test_weights_that_cannot_be_ranked_stop_the_run(policy, tmp_path):
    """Infinite steps make NaN before the next loss could tell."""
    student = student_for("bert", policy, "2:4")
    stage = stage_for(policy, learning_rate=1e38, optimizer="sgd", max_grad_norm=1e30, warmup=0)
    with pytest.raises(
        TrainingError, match=r"(cannot rank the weights after step|loss is nan at step).*ower the learning"
    ):
        finetune_(student, stage, data_for("bert"), tmp_path)
    assert not any(p.apply_mask for _, _, p in compressed_weights(student))


def test_a_stage_stops_at_its_loss_and_a_cut_run_at_the_same_step(tmp_path, monkeypatch):
    """GPUSQ-TLM's thresholds (ALGORITHMS E.1): the loop ends at that running loss, or at its epochs."""
    from squeezoo.compress.running_loss import RunningLoss

    seen: list[float] = []
    add_ = RunningLoss.add_
    monkeypatch.setattr(RunningLoss, "add_", lambda self, loss: (add_(self, loss), seen.append(self.value)))
    student, stage = begin("fixed")
    never = stage.model_copy(update={"stop_at_loss": 1e-9})
    assert finetune_(student, never, data_for("bert"), tmp_path / "never")["steps"] == 6
    stop = next(step for step in range(2, 6) if seen[step - 1] < min(seen[: step - 1]))  # 1-based
    stage = stage.model_copy(update={"stop_at_loss": seen[stop - 1]})
    said: list[str] = []
    student, _ = begin("fixed")
    whole = finetune_(student, stage, data_for("bert"), tmp_path / "whole", say=said.append)
    assert whole["steps"] == stop
    assert whole["history"] == [{"step": stop, "kind": "stopped", "loss": seen[stop - 1]}]
    assert f"stops after {stop} of 6 steps" in said[-1]
    cut_run(begin("fixed")[0], stage, tmp_path / "cut", stop - 1)
    again, _ = begin("fixed")
    resumed = finetune_(again, stage, data_for("bert"), tmp_path / "cut", save_seconds=0)
    assert (resumed["resumed_at"], resumed["steps"]) == (stop - 1, stop)
    assert states_equal(student, again)
    assert resumed["history"] == whole["history"]


def test_the_running_loss_is_the_decaying_mean_and_goes_into_checkpoints():
    from squeezoo.compress.running_loss import DECAY, RunningLoss

    losses, running = [3.0, 1.0, 0.5], RunningLoss()
    for loss in losses:
        running.add_(torch.tensor(loss))
    weights = [DECAY**age for age in (2, 1, 0)]
    expected = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert running.value == pytest.approx(expected)
    again = RunningLoss()
    again.load_state_dict(running.state_dict())
    assert again.value == running.value


def test_policies_that_need_all_their_steps_refuse_to_stop_early():
    data = stage_for("fixed").model_dump() | {"policy": ADMM, "stop_at_loss": 1.0}
    with pytest.raises(ValueError, match="stop_at_loss: policy admm needs all its steps"):
        type(stage_for("fixed")).model_validate(data)
