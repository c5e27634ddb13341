"""Permutations are permutations, stable and invertible; block sums equal an entry-by-entry oracle."""

import naive
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfmp import reorder
from sfmp.spec import BlockGrid, SfmpError


@st.composite
def matrices(draw, largest=40):
    shape = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.lognormal(0, 3, shape) if draw(st.booleans()) else rng.integers(0, 3, shape)
    return values.astype(np.float32)


@given(matrices(), st.sampled_from(["both", "rows", "cols", "none"]))
def test_marginal_sums_fall_and_unordered_axes_stay(matrix, mode):
    perms = reorder.permutations(matrix, mode)
    for axis, perm in enumerate(perms):
        assert perm.dtype == np.int64
        assert sorted(perm) == list(range(matrix.shape[axis]))
        sums = [float(np.sum(np.take(matrix, i, axis), dtype=np.float64)) for i in perm]
        if mode in ("both", ("rows", "cols")[axis]):
            keys = [(-round(s, 3), 0) for s in sums]
            assert keys == sorted(keys)
        else:
            assert perm.tolist() == list(range(matrix.shape[axis]))


def test_defect_3_ties_keep_index_order():
    # METHOD.md 1.12 #3: an unstable sort gave different permutations on different devices.
    rows, cols = reorder.permutations(np.ones((300, 500), dtype=np.float32))
    assert rows.tolist() == list(range(300)) and cols.tolist() == list(range(500))
    pairs = np.repeat([1.0, 2.0], 150)[:, None] * np.ones((1, 7))
    assert reorder.permutations(pairs)[0].tolist() == [*range(150, 300), *range(150)]


def test_sums_are_taken_in_double_precision():
    # In fp32, 2^24 + 1 is 2^24: the second row would tie with the first and stay behind it.
    matrix = np.array([[2.0**24, 0.0], [2.0**24, 1.0]], dtype=np.float32)
    assert reorder.permutations(matrix)[0].tolist() == [1, 0]


@given(matrices(), st.integers(0, 100))
def test_apply_then_inverse_is_the_identity(matrix, seed):
    rng = np.random.default_rng(seed)
    rows, cols = (rng.permutation(n) for n in matrix.shape)
    back_rows, back_cols = reorder.invert(rows), reorder.invert(cols)
    ordered = reorder.apply(matrix, rows, cols)
    np.testing.assert_array_equal(ordered[0], matrix[rows[0]][cols])
    np.testing.assert_array_equal(reorder.apply(ordered, back_rows, back_cols), matrix)
    tensor = torch.from_numpy(matrix).bfloat16()
    moved = reorder.apply(tensor, rows, cols)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(reorder.apply(moved, back_rows, back_cols), tensor)


@given(matrices(), st.integers(1, 50), st.sampled_from([32, 64]), st.integers(0, 100))
def test_block_sums_equal_the_oracle(matrix, block_rows, group_size, seed):
    rng = np.random.default_rng(seed)
    rows, cols = (rng.permutation(n) for n in matrix.shape)
    sums = reorder.block_sums(matrix, rows, cols, BlockGrid(*matrix.shape, block_rows, group_size))
    expected = naive.block_sums(matrix, rows, cols, block_rows, group_size)
    assert sums.dtype == np.float64
    np.testing.assert_allclose(sums, expected, rtol=1e-12)


@pytest.mark.parametrize("chunk", [1, 100, 10**9])
def test_block_sums_do_not_depend_on_the_chunk(monkeypatch, chunk):
    rng = np.random.default_rng(0)
    matrix = rng.lognormal(0, 3, (75, 100)).astype(np.float32)
    rows, cols, grid = *reorder.permutations(matrix), BlockGrid(75, 100, 8, 32)
    expected = naive.block_sums(matrix, rows, cols, 8, 32)
    monkeypatch.setattr(reorder, "_CHUNK", chunk)
    np.testing.assert_allclose(reorder.block_sums(matrix, rows, cols, grid), expected, rtol=1e-12)


def test_torch_and_numpy_agree_bit_for_bit():
    matrix = torch.rand(50, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    array = matrix.float().numpy()
    for a, b in zip(reorder.permutations(matrix), reorder.permutations(array), strict=True):
        np.testing.assert_array_equal(a, b)
    perms, grid = reorder.permutations(array), BlockGrid(50, 70, 16, 32)
    np.testing.assert_array_equal(
        reorder.block_sums(matrix, *perms, grid), reorder.block_sums(array, *perms, grid)
    )


def test_reordering_concentrates_salience():
    rng = np.random.default_rng(0)
    matrix = np.outer(rng.lognormal(0, 2, 256), rng.lognormal(0, 2, 256)).astype(np.float32)
    grid, plain = BlockGrid(256, 256, 64, 64), reorder.permutations(matrix, "none")
    best = [reorder.block_sums(matrix, *perms, grid).max() / matrix.sum()
            for perms in (plain, reorder.permutations(matrix, "cols"), reorder.permutations(matrix))]
    assert best[0] < best[1] < best[2] and best[2] > 0.5


def test_invalid_input_is_named():
    matrix, grid = np.ones((4, 6)), BlockGrid(4, 6, 2, 32)
    good = np.arange(4), np.arange(6)
    for call, message in [
        (lambda: reorder.permutations(matrix, "row"), "reorder: expected one of both"),
        (lambda: reorder.permutations(np.ones(4)), r"matrix \[N, K\]"),
        (lambda: reorder.apply(matrix, np.arange(5), good[1]), "row_perm"),
        (lambda: reorder.apply(matrix, good[0], np.zeros(6, int)), "col_perm"),
        (lambda: reorder.block_sums(matrix.T, *good, grid), "expected 4 x 6"),
        (lambda: reorder.invert(np.array([0, 2])), r"0\.\.1"),
    ]:
        with pytest.raises(SfmpError, match=message):
            call()
