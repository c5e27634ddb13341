"""The dequantizing kernel in the CUDA simulator: whole matrices and panels, every bit-width and group size."""

import pytest
from cases import packed_case
from simulation import ROUNDING, SUMS, simulate

from kernels_numba.gpu import dequantize_run, mma_layout
from sfmp.checks import SfmpError

BASE = {"kernel": "dequantize", "tokens": 2, "kind": "float16", "rows": 20, "block_rows": 20, "panel": 9}
CASES = {
    "bits 1 to 8, group 32, two row blocks": {"rows": 21, "cols": 300, "group_size": 32, "block_rows": 11},
    "group 64, panels": {"rows": 70, "block_rows": 70, "cols": 130, "group_size": 64, "levels": [2, 3], "panel": 2,
                         "kind": "bfloat16"},
    "group 96": {"cols": 200, "group_size": 96, "levels": [3, 5]},
    "group 128, a panel per strip": {"rows": 45, "block_rows": 20, "cols": 500, "group_size": 128, "panel": 1,
                                     "levels": [2, 3, 4]},
    "group 256": {"rows": 5, "cols": 400, "group_size": 256, "levels": [1, 7]},
}


@pytest.fixture(scope="module")
def errors():
    pytest.importorskip("numba.cuda")
    return dict(zip(CASES, simulate([{**BASE, **case} for case in CASES.values()]), strict=True))


@pytest.mark.cudasim
@pytest.mark.parametrize("name", CASES)
def test_weights_are_exact_up_to_rounding(errors, name):
    assert errors[name] <= 2 * ROUNDING[CASES[name].get("kind", "float16")] + SUMS  # weights and results are rounded


@pytest.mark.parametrize("first,strips", [(0, 0), (-1, 1), (2, 2), (3, None)])
def test_strips_beyond_the_matrix_are_refused(first, strips):
    layout = mma_layout.make_layout(packed_case(0, rows=70, cols=40, block_rows=70))
    with pytest.raises(SfmpError, match="within 3"):
        dequantize_run.plan(layout, "float16", first, strips)
