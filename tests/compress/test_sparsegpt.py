"""SparseGPT against the public code's results (vectors/sparsegpt.json) and against its own definition."""

import json
from pathlib import Path

import pytest
import torch
from squeezoo.compress.hessian import Hessian, HessianError, factorise
from squeezoo.compress.masks import Pattern, check_nm, nm_mask
from squeezoo.compress.rules import Unstructured
from squeezoo.compress.sparsegpt import sparsegpt

VECTOR = json.loads((Path(__file__).parents[1] / "vectors" / "sparsegpt.json").read_text())
CLOSE = dict(rtol=1e-5, atol=1e-6)  # vectors/README.md: values produced by float32 code


def tensor(name, dtype=torch.float32):
    return torch.tensor(VECTOR[name], dtype=dtype)


def vector_hessian(name="calib"):
    """Two calibration sequences, added one at a time as the public code is called."""
    hessian = Hessian(16)
    for x_TI in tensor(name).flatten(1, 2):
        hessian.add_(x_TI, 1)
    return hessian.value_II()


def random_problem(out_features=24, in_features=300, tokens=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    x_TI = torch.randn(tokens, in_features, generator=generator) @ (mix + torch.eye(in_features))
    hessian = Hessian(in_features)
    hessian.add_(x_TI, 4)
    return torch.randn(out_features, in_features, generator=generator), x_TI, hessian.value_II()


def test_the_hessian_counts_sequences():
    torch.testing.assert_close(vector_hessian(), tensor("H_before_damping"), **CLOSE)


def test_the_hessian_is_two_x_xt_over_sequences_and_symmetric():
    """The definition in float64; 300 features: more than one strip, the last one ragged."""
    _, x_TI, h_II = random_problem()
    torch.testing.assert_close(h_II.double(), x_TI.double().t() @ x_TI.double() * (2 / 4), rtol=1e-4, atol=1e-3)
    assert h_II.equal(h_II.t())


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8"])
def test_weights_and_loss_equal_the_public_code(pattern):
    solved = sparsegpt(tensor("weight"), vector_hessian(), Pattern.parse(pattern), damping=VECTOR["damp"])
    name = pattern.replace(":", "_")
    torch.testing.assert_close(solved.w_OI, tensor(f"w_{name}"), **CLOSE)
    assert solved.loss == pytest.approx(VECTOR[f"err_{name}"], rel=1e-5)
    assert solved.mask_OI.equal(solved.w_OI != 0)
    assert check_nm(solved.w_OI, Pattern.parse(pattern))


def test_block_size_8_equals_the_public_code():
    solved = sparsegpt(tensor("weight"), vector_hessian(), Pattern(2, 4), block_size=8)
    torch.testing.assert_close(solved.w_OI, tensor("w_2_4_blocksize8"), **CLOSE)


def test_float64_equals_the_reference_in_float64():
    h_II = vector_hessian().double()
    solved = sparsegpt(tensor("weight", torch.float64), h_II, Pattern(2, 4))
    assert solved.w_OI.dtype == torch.float64
    # the Hessian itself was summed in float32
    torch.testing.assert_close(solved.w_OI, tensor("w_2_4_float64", torch.float64), rtol=1e-5, atol=1e-6)
    assert solved.loss == pytest.approx(VECTOR["err_2_4_float64"], rel=1e-6)


def test_unstructured_equals_the_public_code():
    solved = sparsegpt(tensor("weight"), vector_hessian(), Unstructured(zeros=0.5))
    torch.testing.assert_close(solved.w_OI, tensor("w_unstructured_50_blocksize128"), **CLOSE)
    assert solved.loss == pytest.approx(VECTOR["err_unstructured"], rel=1e-5)


def test_an_input_that_is_always_zero_is_pruned_without_error():
    solved = sparsegpt(tensor("weight"), vector_hessian("calib_dead"), Pattern(2, 4))
    torch.testing.assert_close(solved.w_OI, tensor("w_2_4_dead"), **CLOSE)
    assert solved.loss == pytest.approx(VECTOR["err_2_4_dead"], rel=1e-5)
    assert solved.w_OI[:, VECTOR["dead_column"]].abs().max() == 0


def test_factor_is_the_upper_cholesky_factor_of_the_inverse():
    """The definition, by inverting in float64."""
    _, _, h_II = random_problem(in_features=40)
    factor = factorise(h_II.double())
    damped_II = h_II.double() + 0.01 * h_II.double().diagonal().mean() * torch.eye(40, dtype=torch.float64)
    expected_II = torch.linalg.cholesky(torch.linalg.inv(damped_II), upper=True)
    torch.testing.assert_close(factor.r_II, expected_II, rtol=1e-9, atol=1e-12)
    assert factor.damping == 0.01


def by_definition(w_OI, h_II, pattern, quantize=None):
    """ALGORITHMS B.7 without blocks, one column at a time, in float64."""
    w_OI = w_OI.double().clone()
    r_II = factorise(h_II.double()).r_II
    columns = w_OI.shape[1]
    keep_OI = torch.empty_like(w_OI, dtype=torch.bool)
    for i in range(columns):
        if i % pattern.m == 0:
            group = slice(i, i + pattern.m)
            keep_OI[:, group] = nm_mask(w_OI[:, group] ** 2 / r_II.diagonal()[group] ** 2, pattern)
        q_O = w_OI[:, i] * keep_OI[:, i]
        q_O = q_O if quantize is None else quantize(q_O, i) * keep_OI[:, i]
        w_OI[:, i + 1 :] -= ((w_OI[:, i] - q_O) / r_II[i, i])[:, None] * r_II[i, i + 1 :]
        w_OI[:, i] = q_O
    return w_OI


@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (3, 8), (5, 32), (100, 256)], ids=lambda p: f"{p[0]}:{p[1]}")
@pytest.mark.parametrize("block_size", [32, 128])
def test_any_pattern_with_a_ragged_tail_equals_the_definition_for_any_block_size(pattern, block_size):
    """310 columns: the last group of 4 and more is ragged, the last block too. In float64 nothing but order differs."""
    w_OI, _, h_II = random_problem(in_features=310, tokens=700)
    pattern = Pattern(*pattern)
    solved = sparsegpt(w_OI.double(), h_II.double(), pattern, block_size=block_size)
    torch.testing.assert_close(solved.w_OI, by_definition(w_OI, h_II, pattern), rtol=1e-9, atol=1e-10)
    assert check_nm(solved.w_OI, pattern)
    tail = 310 % pattern.m
    assert tail == 0 or int(solved.mask_OI[:, -tail:].sum()) == 24 * min(pattern.n, tail)


def test_joint_quantization_equals_the_definition_and_stays_on_the_grid():
    """Levels of int4 with the scale of the dense weight."""
    w_OI, _, h_II = random_problem(in_features=64)
    scale_O = w_OI.double().abs().amax(1) / 7

    def to_levels(column_O, _):
        return (column_O / scale_O).round().clamp(-7, 7) * scale_O

    solved = sparsegpt(w_OI.double(), h_II.double(), Pattern(2, 4), quantize=to_levels)
    torch.testing.assert_close(solved.w_OI, by_definition(w_OI, h_II, Pattern(2, 4), to_levels), rtol=1e-9, atol=1e-10)
    levels_OI = solved.w_OI / scale_O[:, None]
    torch.testing.assert_close(levels_OI, levels_OI.round(), rtol=0, atol=1e-9)
    assert check_nm(solved.w_OI, Pattern(2, 4))


def test_the_output_error_is_below_that_of_the_magnitude_mask():
    """What the method is for: ||X (W - W')||^2, against masking without an update; and 0.5 * sum err^2 tells it."""
    w_OI, x_TI, h_II = random_problem()
    solved = sparsegpt(w_OI, h_II, Pattern(2, 4))
    magnitude_OI = w_OI * nm_mask(w_OI.abs(), Pattern(2, 4))
    error = [float((x_TI @ (w_OI - other_OI).t()).square().sum()) for other_OI in (solved.w_OI, magnitude_OI)]
    assert error[0] < 0.7 * error[1]


def test_several_matrices_may_share_one_factor():
    w_OI, _, h_II = random_problem()
    both = sparsegpt(w_OI, factorise(h_II), Pattern(2, 4))
    one = sparsegpt(w_OI[:5], factorise(h_II), Pattern(2, 4))
    torch.testing.assert_close(both.w_OI[:5], one.w_OI, **CLOSE)
    torch.testing.assert_close(both.loss_O[:5], one.loss_O, **CLOSE)


def test_damping_is_raised_until_the_factorisation_succeeds():
    """Eigenvalues of this matrix: 1 (seven times) and 1 - 8.2 / 1.0: positive only with more than 0.05 added."""
    h_II = torch.eye(8, dtype=torch.float64) - 1.05 / 8 * torch.ones(8, 8, dtype=torch.float64)  # smallest: -0.05
    factor = factorise(h_II, damping=0.01)
    assert factor.damping == pytest.approx(0.1)
    damped_II = h_II + 0.1 * h_II.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(factor.r_II.t() @ factor.r_II, torch.linalg.inv(damped_II))


def test_three_retries_are_the_limit():
    h_II = torch.eye(8) - 3 * torch.ones(8, 8) / 8  # smallest eigenvalue -2, mean of the diagonal 0.625
    with pytest.raises(HessianError, match=r"even with damping 0\.1"):
        factorise(h_II, damping=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(block_size=6), "multiple of M = 4, found 6"),
        (dict(block_size=0), "at least 1"),
        (dict(damping=0.0), "positive damping"),
        (dict(hessian_II=torch.eye(12)), "16 in_features, found 12"),
        (dict(hessian_II=torch.full((16, 16), torch.nan)), "NaN or infinity"),
        (dict(w_OI=torch.full((2, 16), torch.nan)), "32 of 32"),
    ],
)
def test_bad_input_is_named(arguments, message):
    given = dict(w_OI=torch.ones(2, 16), hessian_II=torch.eye(16), sparsity=Pattern(2, 4), **{})
    with pytest.raises(ValueError, match=message):
        sparsegpt(**{**given, **arguments})
