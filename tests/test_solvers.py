"""rtn and gptq on one matrix: against textbook oracles, and on the error that GPTQ is meant to lower."""

import warnings

import naive
import numpy as np
import pytest
import torch

from sfmp.quantize import dequantize, group_parameters
from sfmp.solvers import Stats, compensation, gptq, inverse_cholesky, round_columns, rtn
from sfmp.spec import MatrixPlan, QuantSpec, SfmpError


def _spec(group_size=32, block_rows=4):
    levels = (1, 2, 3, 4, 8)
    return QuantSpec(bpw=3.0 + 32 / group_size, group_size=group_size, block_rows=block_rows, levels=levels)


def _case(rows=12, columns=96, group_size=32, block_rows=4, tokens=400, seed=0, levels=(2, 3, 4)):
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((rows, columns)) * 0.1
    mix = generator.standard_normal((columns, columns)) * np.geomspace(1, 0.05, columns)
    inputs = generator.standard_normal((tokens, columns)) @ mix
    shape = (-(-rows // block_rows), -(-columns // group_size))
    matrix = MatrixPlan(generator.permutation(rows), generator.permutation(columns),
                        generator.choice(levels, shape).astype(np.uint8))
    return weight, inputs, matrix


def _stats(inputs, dtype=torch.float32):
    stats = Stats(gram=torch.tensor(inputs.T @ inputs).to(dtype), tokens=len(inputs))
    return stats


def _permuted(array, matrix):
    return array[matrix.row_perm][:, matrix.col_perm]


@pytest.mark.parametrize("rows, columns, group_size, block_rows", [
    (12, 96, 32, 4),
    (10, 80, 32, 3),  # short last group and last row block
    (6, 256, 128, 6),
    (6, 160, 64, 1),
    (4, 288, 288, 2),  # a group longer than the lazily updated columns
])
def test_gptq_matches_the_textbook(rows, columns, group_size, block_rows):
    """Also defect 7 of METHOD 1.12: gptq with a bit map, which failed as soon as one was given."""
    weight, inputs, matrix = _case(rows, columns, group_size, block_rows, 3 * columns, levels=(1, 2, 3, 4))
    spec = _spec(group_size, block_rows)
    got = dequantize(gptq(torch.tensor(weight), _stats(inputs, torch.float64), matrix, spec))
    bits = matrix.bits.repeat(block_rows, axis=0)[:rows]
    permuted = inputs[:, matrix.col_perm]
    expected = naive.gptq(_permuted(weight, matrix), permuted.T @ permuted, len(inputs), bits, group_size)
    assert np.allclose(got.numpy(), expected, atol=1e-5)


def test_gptq_beats_rtn_on_the_output_error():
    weight, inputs, matrix = _case(48, 128, 32, 16, tokens=600, seed=3)
    errors = {}
    for solver in (rtn, gptq):
        q = solver(torch.tensor(weight, dtype=torch.float32), _stats(inputs), matrix, _spec(32, 16))
        difference = dequantize(q).numpy() - _permuted(weight, matrix)
        errors[solver] = np.square(inputs[:, matrix.col_perm] @ difference.T).sum()
    assert errors[gptq] < 0.7 * errors[rtn]


def test_gptq_without_correlation_is_rtn():
    """With a diagonal Hessian there is nothing to compensate."""
    weight, _, matrix = _case(8, 64, 32, 4)
    stats = Stats(gram=torch.eye(64), tokens=64)
    ours = gptq(torch.tensor(weight, dtype=torch.float32), stats, matrix, _spec())
    plain = rtn(torch.tensor(weight, dtype=torch.float32), None, matrix, _spec())
    assert torch.equal(ours.codes, plain.codes) and torch.equal(ours.scales, plain.scales)


def test_parameters_are_chosen_from_compensated_weights():
    """A chooser sees each group once, when the groups before it have handed on their errors."""
    weight, inputs, _ = _case(8, 80, 32, 8)
    matrix = MatrixPlan(np.arange(8), np.arange(80), np.array([[2, 3, 4]], np.uint8))
    current, factor = compensation(torch.tensor(weight), _stats(inputs, torch.float64), matrix)
    seen = []

    def choose(part, bits, diagonal):
        seen.append((part.clone(), bits, diagonal))
        return group_parameters(part, bits)

    q = round_columns(current, factor, matrix.bits, _spec(32, 8), choose)
    assert torch.equal(q.codes, gptq(torch.tensor(weight), _stats(inputs, torch.float64), matrix, _spec(32, 8)).codes)
    assert torch.equal(current, torch.tensor(weight))  # not modified
    assert [tuple(part.shape) for part, _, _ in seen] == [(8, 32), (8, 32), (8, 16)]
    assert [int(bits.unique()) for _, bits, _ in seen] == [2, 3, 4]
    assert torch.allclose(torch.cat([d for _, _, d in seen]), factor.diagonal().float())
    assert torch.allclose(seen[0][0], torch.tensor(weight[:, :32]).float())
    # the errors of the first group, all at once: W_rest - E U_rest with E = (W - W_q) solved along U
    errors = torch.linalg.solve_triangular(factor[:32, :32], current[:, :32] - dequantize(q)[:, :32].double(),
                                           upper=True, left=False)
    expected = current[:, 32:64] - errors @ factor[:32, 32:64]
    assert torch.allclose(seen[1][0].double(), expected, atol=1e-5)


def test_float32_agrees_with_float64_almost_everywhere():
    weight, inputs, matrix = _case(16, 128, 32, 4, tokens=800, seed=5)
    single = gptq(torch.tensor(weight, dtype=torch.float32), _stats(inputs), matrix, _spec())
    double = gptq(torch.tensor(weight), _stats(inputs, torch.float64), matrix, _spec())
    assert (single.codes == double.codes).float().mean() > 0.97


def test_dead_columns_are_zero_and_counted():
    weight, inputs, matrix = _case(8, 64, 32, 4)
    inputs[:, [3, 40]] = 0.0
    weight[:, [3, 40]] = 9.0  # would spoil the range of its groups if it were kept
    stats = _stats(inputs)
    q = gptq(torch.tensor(weight, dtype=torch.float32), stats, matrix, _spec())
    assert stats.notes["dead_columns"] == 2
    natural = np.empty_like(weight)
    natural[np.ix_(matrix.row_perm, matrix.col_perm)] = dequantize(q).numpy()
    assert q.scales.max() < 0.5
    assert np.abs(natural[:, [3, 40]]).max() <= q.scales.max()


def test_damping_escalates_and_is_recorded():
    indefinite = torch.eye(32) * 1.0
    indefinite[0, 1] = indefinite[1, 0] = 1.05
    with pytest.warns(UserWarning, match="not positive definite with damping 0.01; used 0.1"):
        factor, damping = inverse_cholesky(indefinite)
    assert damping == pytest.approx(0.1)
    damped = indefinite + 0.1 * torch.eye(32)
    assert torch.allclose(factor.T @ factor, torch.linalg.inv(damped), atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inverse_cholesky(torch.eye(32))[1] == pytest.approx(0.01)


def test_non_finite_activations_are_refused_with_advice():
    weight, inputs, matrix = _case(8, 64, 32, 4)
    stats = _stats(inputs)
    stats.gram[0, 0] = float("nan")
    with pytest.raises(SfmpError, match="expected finite activations; check the"):
        gptq(torch.tensor(weight, dtype=torch.float32), stats, matrix, _spec())


def test_rtn_uses_clip_ranges():
    weight, _, matrix = _case(8, 64, 32, 4)
    lower, upper = torch.full((8, 2), -0.05), torch.full((8, 2), 0.05)
    q = rtn(torch.tensor(weight), Stats(lower=lower, upper=upper), matrix, _spec())
    assert dequantize(q).abs().max() < 0.05 + q.scales.max()


def test_missing_statistics_and_wrong_shapes_are_errors():
    weight, inputs, matrix = _case(8, 64, 32, 4)
    with pytest.raises(SfmpError, match="Gram matrix.*pass calibration windows"):
        gptq(torch.tensor(weight), None, matrix, _spec())
    with pytest.raises(SfmpError, match=r"expected shape \(8, 64\).*found \(8, 60\)"):
        rtn(torch.tensor(weight[:, :60]), None, matrix, _spec())


def test_stats_accumulate_over_any_leading_shape():
    inputs = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    stats = Stats()
    stats.add(inputs[:1])
    stats.add(inputs[1:].to(torch.float64))
    flat = inputs.reshape(-1, 8)
    assert stats.tokens == 10 and torch.allclose(stats.gram, flat.T @ flat, atol=1e-5)
