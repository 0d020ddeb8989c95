"""The thesis's workflow from a language model to an int8 classifier: imp-70, a dense folder, imp-70-task, imp-dq.

Expected zeros: ALGORITHMS B.6, over the six linears of every block together, `pruned_by_events` below.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipe_cases import data_for, short
from squeezoo.compress.checkpoint import load, load_manifest
from squeezoo.compress.engine import Compressed, compress
from squeezoo.compress.export import export
from squeezoo.compress.magnitude import MaskError
from squeezoo.models import adapter_for, find_sites
from squeezoo.models.dense import Dense, DenseError, load_dense, logits, save_dense
from tiny import ALL, LABELS, ROWS, tiny_batch
from torch import Tensor, nn

# language model, classifier of the same backbone, the classifier's matrix that the language model does not have
CHAINS = (
    ("bert_mlm", "bert", "bert.pooler.dense"),
    ("roberta_mlm", "roberta", "classifier.dense"),
    ("distilbert_mlm", "distilbert", "pre_classifier"),
)


def pruned_by_events(total: int, events: int) -> int:
    """Zeros after events of ten points: event p takes round(survivors / (10 - p)) (B.6)."""
    survivors = total
    for p in range(events):
        survivors -= round(survivors / (10 - p))
    assert abs(total - survivors - events / 10 * total) <= events
    return total - survivors


def block_matrices(model: nn.Module) -> dict[str, Tensor]:
    """Weights [O, I] of the six linears, by their names below the backbone's, which differs from head to head."""
    return {
        gemm.name.split("layer.", 1)[1]: gemm.weight_OI.detach() for gemm in find_sites(model, adapter_for(model)).gemms
    }


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: w_OI == 0 for name, w_OI in block_matrices(model).items()}


def dense_form(made: Compressed, out: Path, **how: object) -> Dense:
    export(made.folder, "dense", out)
    return load_dense(out, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(("language", "classifier", "new"), CHAINS)
def test_from_a_language_model_to_an_int8_classifier(language: str, classifier: str, new: str, tmp_path: Path) -> None:
    """The same zeros all the way, to the weight; the classifier's own matrix is new, trained dense, and said."""
    save_dense(ALL[language](), None, tmp_path / "language")
    pruned = compress(
        load_dense(tmp_path / "language", kind="auto"), short("imp-70"), data_for(language), tmp_path / "imp-70"
    )
    start = dense_form(pruned, tmp_path / "pruned", kind="classification", num_labels=LABELS)
    assert f"{new}.weight" in start.new
    assert f"{new}.weight" in start.new_note
    expected = zeros(start.model)
    total = sum(mask.numel() for mask in expected.values())
    assert sum(int(mask.sum()) for mask in expected.values()) == pruned_by_events(total, 7)

    tuned = compress(start, short("imp-70-task"), data_for(classifier), tmp_path / "task")
    task = dense_form(tuned, tmp_path / "tuned", kind="auto")
    assert task.new == ()
    assert task.new_note == ""
    found = zeros(task.model)
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    before, after = (block_matrices(model) for model in (start.model, task.model))
    assert all(not torch.equal(before[name], after[name]) for name in before)
    matrix = task.model.get_submodule(new).weight
    assert isinstance(matrix, Tensor)
    assert bool((matrix != 0).all())
    assert not torch.equal(matrix, start.model.get_submodule(new).weight)  # trained

    made = compress(task, short("imp-dq"), None, tmp_path / "dq")
    model = load(made.folder, backend="reference")
    quantized = zeros(model)
    # int8 makes zeros of the smallest weights, and none of a zero
    assert all(bool((mask <= quantized[name]).all()) for name, mask in expected.items())
    weights = {gemm.name: gemm.weight for gemm in load_manifest(made.folder).plan.gemms}
    assert weights.keys() == {*(g.name for g in tuned.plan.gemms), new, ROWS[classifier].final}
    assert {gemm.sparsity for gemm in tuned.plan.gemms} == {"70%"}
    assert "none to inherit" in dict(tuned.plan.skipped)[new]
    assert all(weight is not None and weight["method"] == "dynamic" for weight in weights.values())
    with torch.inference_mode():
        assert logits(model, tiny_batch(classifier)).isfinite().all()


def test_gpt2_by_30_and_its_int8_form(tmp_path: Path) -> None:
    """B.6: GPT-2's six linears to round(0.3 * weights) zeros; dynamic quantization keeps them."""
    model = ALL["gpt2"]()
    save_dense(model, None, tmp_path / "gpt2")
    made = compress(load_dense(tmp_path / "gpt2", kind="auto"), short("imp-30"), data_for("gpt2"), tmp_path / "imp-30")
    dense = dense_form(made, tmp_path / "pruned", kind="auto")
    matrices = {gemm.name: gemm.weight_OI for gemm in find_sites(dense.model, adapter_for(dense.model)).gemms}
    total = sum(w.numel() for w in matrices.values())
    assert sum(int((w == 0).sum()) for w in matrices.values()) == pruned_by_events(total, 3)
    small = load(compress(dense, "dq", None, tmp_path / "dq").folder, backend="reference")
    for gemm in find_sites(small, adapter_for(small)).gemms:
        assert bool((gemm.weight_OI[matrices[gemm.name] == 0] == 0).all()), gemm.name


def test_a_dense_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    save_dense(ALL["bert_mlm"](), None, tmp_path / "dense")
    dense = load_dense(tmp_path / "dense", num_labels=LABELS)
    with pytest.raises(MaskError, match=r"expected 70\.0000% zeros to inherit, found 0\.0000%"):
        compress(dense, short("imp-dq"), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_no_dense_model_and_is_not_written_over(tmp_path: Path) -> None:
    """The message is the command that makes one of it; the command works as it stands."""
    save_dense(ALL["bert_mlm"](), None, tmp_path / "dense")
    made = compress(load_dense(tmp_path / "dense", kind="auto"), "dq", None, tmp_path / "dq")
    with pytest.raises(DenseError, match=r"is a Squeezoo checkpoint.*`squeezoo export .*/dq --to dense -o DENSE`"):
        load_dense(made.folder, num_labels=LABELS)
    before = {path.name: path.read_bytes() for path in made.folder.iterdir() if path.is_file()}
    with pytest.raises(DenseError, match="holds a Squeezoo checkpoint: give a new or an empty directory"):
        export(made.folder, "dense", made.folder)
    assert {path.name: path.read_bytes() for path in made.folder.iterdir() if path.is_file()} == before
