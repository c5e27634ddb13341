"""Agreement of Fisher and guided Hessians: rank correlations by hand, on losses summed block by block."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from sfmp import guided_study
from sfmp.baselines.guided import guided_hessians, guided_salience
from sfmp.checks import SfmpError
from sfmp.salience import fisher_salience, save_salience
from sfmp.spec import QuantSpec

SPEC = QuantSpec(bpw=4.0, group_size=32, block_rows=16, levels=(2, 4))
CROSS = "block losses, guided Hessians with against without cross terms"
AGAINST = "block losses, diagonal Fisher against guided Hessians"


def naive_spearman(left, right):
    """Pearson correlation of ranks, equal values sharing the mean of theirs, counted pair by pair."""
    ranks = [np.array([np.sum(side < x) + (np.sum(side == x) + 1) / 2 for x in side]) for side in (left, right)]
    a, b = (r - r.mean() for r in ranks)
    return np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b))


def naive_blocks(matrix, rows=16, cols=32):
    """Sums over blocks, row-major."""
    return [matrix[i:i + rows, j:j + cols].sum(dtype=np.float64)
            for i in range(0, matrix.shape[0], rows) for j in range(0, matrix.shape[1], cols)]


def rounded(group, bits):
    step = (group.max() - group.min()) / (2**bits - 1)
    zero = np.round(-group.min() / step)
    return step * (np.clip(np.round(group / step) + zero, 0, 2**bits - 1) - zero)


@pytest.fixture
def windows():
    return torch.randint(0, 128, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def case(tiny_llama, windows):
    return tiny_llama, windows, fisher_salience(tiny_llama, windows), guided_salience(tiny_llama, windows)


def test_rows_are_rank_correlations_of_block_sums_and_losses(case):
    model, windows, fisher, guided = case
    table = guided_study.agreement_table(*case, SPEC, n_windows=3)
    hessians = guided_hessians(model, windows[[0, 2, 4]])
    sums = {"natural": ([], []), "Fisher": ([], [])}
    losses = {bits: ([], [], []) for bits in SPEC.levels}
    for name in sorted(fisher):
        s, g = (source[name].numpy().astype(np.float64) for source in (fisher, guided))
        rows, cols = (np.argsort(-s.sum(axis), kind="stable") for axis in (1, 0))
        for place, (a, b) in {"natural": (s, g), "Fisher": (s[rows][:, cols], g[rows][:, cols])}.items():
            sums[place][0].extend(naive_blocks(a))
            sums[place][1].extend(naive_blocks(b))
        weight = model.get_submodule(name).weight.detach().numpy().astype(np.float64)
        group_of_row = [i for i, part in enumerate(np.array_split(rows, 4)) for _ in part]
        for bits in SPEC.levels:
            for top in range(0, len(rows), 16):
                for left in range(0, len(cols), 32):
                    totals, inside = np.zeros(3), cols[left:left + 32]
                    for i in rows[top:top + 16]:
                        error = weight[i, inside] - rounded(weight[i, inside], bits)
                        hessian = hessians[name][group_of_row[i]].numpy().astype(np.float64)[np.ix_(inside, inside)]
                        totals += (s[i, inside] @ error**2, error @ hessian @ error, np.diag(hessian) @ error**2)
                    for kept, value in zip(losses[bits], totals, strict=True):
                        kept.append(value)
    found = table.set_index("comparison").spearman
    for place, pair in sums.items():
        assert found[f"block salience, {place} order"] == pytest.approx(naive_spearman(*map(np.array, pair)), abs=1e-3)
    for bits, (plain, whole, diagonal) in losses.items():
        at = table[table.bits == bits].set_index("comparison").spearman
        # The package rounds steps to fp16, so blocks of nearly equal loss may change places.
        assert at[AGAINST] == pytest.approx(naive_spearman(np.array(plain), np.array(whole)), abs=0.02)
        assert at[CROSS] == pytest.approx(naive_spearman(np.array(whole), np.array(diagonal)), abs=0.02)
    assert table.blocks.tolist() == [len(sums["natural"][0])] * 6


def test_table_is_tidy_and_the_same_on_every_run_and_in_any_portions(case, monkeypatch):
    table = guided_study.agreement_table(*case, SPEC)
    assert list(table) == ["comparison", "bits", "blocks", "spearman"]
    assert table.bits.isna().tolist() == [True] * 2 + [False] * 4
    assert table.comparison.tolist()[2:] == [AGAINST] * 2 + [CROSS] * 2
    assert table.spearman.between(-1, 1).all()
    monkeypatch.setattr(guided_study, "HELD_BYTES", 1)  # one matrix in each pass
    pd.testing.assert_frame_equal(table, guided_study.agreement_table(*case, SPEC), check_exact=True)


def test_a_salience_that_ranks_backwards_is_found(case):
    model, windows, fisher, _ = case
    top = max(float(value.max()) for value in fisher.values())
    backwards = {name: top - value for name, value in fisher.items()}
    table = guided_study.agreement_table(model, windows, fisher, backwards, SPEC, n_windows=1)
    assert (table.spearman[:2] < 0).all()


def test_guided_input_is_the_declared_file_or_a_few_windows(case, tmp_path):
    model, windows, _, guided = case
    made = guided_study.guided_input(SimpleNamespace(inputs={}), model, windows, n_windows=6)
    path = tmp_path / "guided.safetensors"
    save_salience(guided, path)
    read = guided_study.guided_input(SimpleNamespace(inputs={"guided": str(path)}), model, windows)
    assert all(torch.equal(made[name], guided[name]) for name in guided)
    assert all(np.array_equal(np.asarray(read[name]), guided[name].numpy()) for name in guided)


def test_bad_input_is_refused(case):
    model, windows, fisher, guided = case
    name = sorted(guided)[0]
    with pytest.raises(SfmpError, match=f"in one of the two only: {name}"):
        guided_study.agreement_table(model, windows, fisher, {k: v for k, v in guided.items() if k != name}, SPEC)
    constant = {name: torch.zeros_like(value) for name, value in guided.items()}
    with pytest.raises(SfmpError, match="expected blocks that differ"):
        guided_study.agreement_table(model, windows, fisher, constant, SPEC)
    with pytest.raises(SfmpError, match="n_windows: expected an integer >= 1"):
        guided_study.agreement_table(*case, SPEC, n_windows=0)
    with pytest.raises(SfmpError, match="at least one sample"):
        guided_study.agreement_table(model, windows[:0], fisher, guided, SPEC)
