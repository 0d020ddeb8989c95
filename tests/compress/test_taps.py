"""Points of feature maps, their pairing, and the taps on real tiny models."""

import pytest
import torch
from squeezoo.compress.heads import DistillError
from squeezoo.compress.taps import FeatureTap, Point, check_widths, pair_points, points_of, skip_blocks
from squeezoo.models import adapter_for, find_sites
from squeezoo.models.dense import logits
from tiny import ROWS, make, tiny_batch
from torch import nn

BOTH = ("attn_out", "block_out")


def points(depth: int, side: str = "block", start: int = 1, width: int = 8) -> list[Point]:
    return [Point(start + k, "block_out", side, width) for k in range(depth)]


def numbers(pairs) -> list[tuple[int, int]]:
    return [(ours.block, theirs.block) for ours, theirs in pairs]


@pytest.mark.parametrize(
    ("teacher", "student", "blocks"),
    [(12, 6, (2, 4, 6, 8, 10)), (12, 3, (4, 8)), (6, 3, (2, 4)), (12, 12, tuple(range(1, 12))), (12, 1, ())],
)
def test_skip(teacher, student, blocks):
    """12 to 6 is I_pt of the thesis and of Sun et al. (ALGORITHMS E.4), the others their "every k" rule."""
    assert skip_blocks(teacher, student) == blocks
    assert skip_blocks(teacher, student, last=True) == (*blocks, teacher)


def test_skip_needs_a_divisor():
    with pytest.raises(DistillError, match=r"5 student blocks do not divide 12.*blocks: \[2, 5"):
        skip_blocks(12, 5)


def test_pairs():
    assert numbers(pair_points(points(3), points(3), "all")) == [(1, 1), (2, 2), (3, 3)]
    assert numbers(pair_points(points(6), points(12), "skip")) == [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]
    assert numbers(pair_points(points(3), points(12), (3, 9))) == [(1, 3), (2, 9)]
    seq2seq = [points(n, "encoder") + points(n, "decoder", n + 1) for n in (2, 4)]
    assert numbers(pair_points(*seq2seq, "skip")) == [(1, 2), (2, 4), (3, 6)]  # only the decoder's last is left out


def test_pairs_that_do_not_exist():
    with pytest.raises(DistillError, match=r"teacher has 12 blocks, the student 6: .*blocks: \[2, 4.*feature: 0"):
        pair_points(points(6), points(12), "all")
    with pytest.raises(DistillError, match="13 is none of the teacher's blocks 1 to 12"):
        pair_points(points(6), points(12), (2, 13))
    with pytest.raises(DistillError, match="3 teacher blocks for a student of 2"):
        pair_points(points(2), points(12), (2, 4, 6))
    with pytest.raises(DistillError, match="blocks of kind encoder, decoder, the student block"):
        pair_points(points(2), points(2, "encoder") + points(2, "decoder", 3), "all")
    with pytest.raises(DistillError, match="teacher has 8, block_out of block 1 of the student 6; write this"):
        check_widths([(points(1, width=6)[0], points(1)[0])], "write this")


@pytest.mark.parametrize("name", {row.adapter: name for name, row in ROWS.items()}.values())
def test_every_point_of_every_architecture_gives_its_map(name):
    """One map [B, L, width] per block and attention output, of the model's own hidden size, with a gradient."""
    model = make(name)
    sites = find_sites(model, adapter_for(model))
    wanted = points_of(sites, BOTH)
    decoders = sum(block.kind == "decoder" for block in sites.blocks)
    assert len(wanted) == 2 * len(sites.blocks) + decoders
    batch = tiny_batch(name)
    with (tap := FeatureTap(sites, wanted)):
        scores = logits(model, batch)
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert all(getattr(hook, "__self__", None) is not tap for hook in hooks)
    for point, feature in zip(wanted, tap.features, strict=True):
        assert feature.shape[0] == 4
        assert feature.shape[-1] == point.width == 32
    scores.sum().backward()


def test_maps_are_those_of_transformers():
    """Block outputs are `hidden_states` 1, 2, ...; attention outputs what BERT adds to the residual."""
    model = make("bert")
    sites = find_sites(model, adapter_for(model))
    batch = tiny_batch("bert")
    with (tap := FeatureTap(sites, points_of(sites, ["block_out"]))):
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        states = model(**inputs, output_hidden_states=True).hidden_states
    for ours, theirs in zip(tap.features, states[1:], strict=True):
        assert torch.equal(ours, theirs)
    with (tap := FeatureTap(sites, points_of(sites, ["attn_out"])[:1])):
        logits(model, batch)
    (added,) = tap.features
    first = model.bert.encoder.layer[0]
    after = first.attention.output.LayerNorm(added + states[0])
    torch.testing.assert_close(first.output(first.intermediate(after), after), states[1])


def test_blocks_left_out_by_layerdrop_give_none():
    model = make("wav2vec2")
    model.config.layerdrop = 1.0
    sites = find_sites(model, adapter_for(model))
    tap = FeatureTap(sites, points_of(sites, BOTH))
    with tap:
        logits(model.train(), tiny_batch("wav2vec2"))
    assert tap.features == [None] * 4
    with tap:
        logits(model.eval(), tiny_batch("wav2vec2"))
    assert all(feature is not None for feature in tap.features)


def test_a_module_that_is_not_called_is_named():
    """fairseq's attention hands its weights to a function instead of calling its linears."""
    model = make("bert")
    sites = find_sites(model, adapter_for(model))
    point = points_of(sites, ["attn_out"])[1]
    model.bert.encoder.layer[1].attention.output.dense = nn.Identity()  # the tap keeps the module found before
    with (tap := FeatureTap(sites, [point])):
        logits(model, tiny_batch("bert"))
    with pytest.raises(DistillError, match=r"did not call the module that gives attn_out of block 2 \(Linear\)"):
        _ = tap.features
