"""The tensor-core kernel in the CUDA simulator: every bit-width and group size, ragged edges, permutations."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from cases import packed_case
from simulation import ROUNDING, SUMS, simulate

from kernels_numba.gpu import mma_layout, mma_run
from sfmp.checks import SfmpError

BASE = {"kernel": "mma", "tokens": 1, "kind": "float16", "rows": 20, "block_rows": 20, "warps": 2}
EVERYTHING = {"rows": 21, "cols": 300, "group_size": 32, "block_rows": 11, "tokens": 3, "bias": True}
CASES = {
    "bits 1 to 8, group 32, two row blocks": {**EVERYTHING, "gather": "unfused"},
    "bits 1 to 8, group 32, two row blocks, fused": {**EVERYTHING, "gather": "fused", "stages": 3},
    "group 64": {"cols": 130, "group_size": 64, "levels": [2, 3], "kind": "bfloat16"},
    "group 64, unfused": {"cols": 130, "group_size": 64, "levels": [2, 3], "kind": "bfloat16", "gather": "unfused"},
    "group 96": {"cols": 200, "group_size": 96, "tokens": 2, "levels": [3, 5]},
    "group 128": {"rows": 33, "block_rows": 33, "cols": 1100, "group_size": 128, "levels": [2, 3, 4], "bias": True},
    "group 128, one warp": {"cols": 1100, "group_size": 128, "levels": [3], "stages": 4, "warps": 1},
    "group 256, eight warps": {"rows": 5, "cols": 400, "group_size": 256, "levels": [1, 8], "warps": 8},
    "group 256, eight tokens": {"rows": 5, "cols": 400, "group_size": 256, "levels": [2, 7], "tokens": 8,
                                "kind": "bfloat16", "gather": "fused"},
    "two tiles of tokens": {"rows": 3, "cols": 40, "group_size": 64, "tokens": 11, "levels": [4]},
    "two launches": {"rows": 1, "cols": 1, "group_size": 128, "tokens": 34, "levels": [3]},
    "three launches": {"rows": 2, "cols": 200, "group_size": 128, "tokens": 34, "levels": [6], "kind": "bfloat16"},
}
HARD = {"cols": 200, "group_size": 64, "levels": [2, 3, 5], "tokens": 2}
HARD = {f"{name}, {gather}": {**HARD, **case, "gather": gather} for gather in mma_run.GATHERS for name, case in {
    "bfloat16 beyond float16": {"kind": "bfloat16", "magnitude": 1e30},
    "bfloat16 below float16": {"kind": "bfloat16", "magnitude": 1e-30},
    "infinite": {"spoiled": "inf"},
    "no number, bfloat16": {"spoiled": "nan", "kind": "bfloat16"},
}.items()}


@pytest.fixture(scope="module")
def errors():
    pytest.importorskip("numba.cuda")
    cases = CASES | HARD
    return dict(zip(cases, simulate([{**BASE, **case} for case in cases.values()]), strict=True))


@pytest.mark.cudasim
@pytest.mark.parametrize("name", CASES | HARD)
def test_product_is_exact_up_to_rounding(errors, name):
    assert errors[name] <= ROUNDING[(CASES | HARD)[name].get("kind", "float16")] + SUMS


def _layout(rows, columns, levels=(2, 3, 4), **options):
    return mma_layout.make_layout(packed_case(0, rows=rows, cols=columns, group_size=128, block_rows=512,
                                              levels=levels, **options))


def test_few_tokens_are_gathered_by_the_kernel_itself():
    layout = _layout(40, 1000)
    plans = [mma_run.plan(layout, tokens, "float16") for tokens in (1, 2, 3)]
    assert [len(plan.launches) for plan in plans] == [1, 1, 2] and not plans[0].scratch
    assert all(launch.shared_bytes < 48 << 10 for plan in plans for launch in plan.launches)


def test_activations_that_do_not_fit_are_gathered_before():
    layout = _layout(1, 40000, levels=(1,))
    assert len(mma_run.plan(layout, 2, "bfloat16").launches) == 2
    assert mma_run.plan(layout, 2, "float16", gather="fused").launches[0].shared_bytes > mma_run.MOST_BYTES
    for tokens in (4, 9):
        with pytest.raises(SfmpError, match='use gather="unfused"'):
            mma_run.plan(layout, tokens, "float16", gather="fused")


@pytest.mark.parametrize("option", [{"gather": "none"}, {"stages": 5}])
def test_options_that_do_not_exist_are_refused(option):
    with pytest.raises(SfmpError, match="leave them out"):
        mma_run.plan(_layout(1, 128), 1, "float16", **option)


@pytest.mark.parametrize("rows,columns,tokens,levels,warps", [
    (32, 4096, 1, (3,), 16), (32, 3000, 1, (3,), 8), (8192, 4096, 1, (3,), 8), (32, 4096, 1, (5,), 8),
    (32, 4096, 32, (3,), 8)])
def test_warps_follow_strips_tiles_and_registers(rows, columns, tokens, levels, warps):
    groups = -(-columns // 128)
    shape = {"strip_chunk": range(rows // 32), "block_tiles": [0, groups], "widths": levels, "segment": 128}
    assert mma_run.choose_warps(SimpleNamespace(**shape), tokens, "float16") == warps


@pytest.mark.parametrize("levels", [(3,), (8,), (2, 3, 4)])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("warps", [None, 16])
def test_default_plans_fit_every_device(levels, group_size, warps):
    packed = packed_case(0, rows=100, cols=5000, group_size=group_size, block_rows=100, levels=levels)
    layout = mma_layout.make_layout(packed)
    for tokens in (1, 2, 3, 9, 17, 40):
        for kind in ("float16", "bfloat16"):
            for launch in mma_run.plan(layout, tokens, kind, warps=warps).launches:
                assert launch.shared_bytes <= mma_run.MOST_BYTES and launch.threads <= 512


def test_more_row_blocks_than_a_grid_has_are_refused():
    layout = dataclasses.replace(_layout(40, 128), block_tiles=np.arange(65537, dtype=np.int32))
    with pytest.raises(SfmpError, match="row blocks for mode mma, found 65536; use mode lut"):
        mma_run.plan(layout, 1, "float16")
