"""The look-up kernel in the CUDA simulator: mixed bits, ragged edges, permutations, every group size and width."""

import pytest
from simulation import ROUNDING, SUMS, simulate

pytestmark = pytest.mark.cudasim
BASE = {"kernel": "lut", "width": 4, "shares": 1, "tokens": 1, "kind": "float32", "rows": 20, "block_rows": 20,
        "warps": 2}
CASES = {
    "bits 1 to 8 in two row blocks": {"rows": 21, "cols": 300, "group_size": 32, "block_rows": 11, "bias": True},
    "group 64, narrow tables": {"cols": 130, "group_size": 64, "width": 2, "kind": "float16"},
    "group 96": {"cols": 200, "group_size": 96, "tokens": 2, "levels": [2, 4]},
    "group 128, wide tables, shares": {"cols": 700, "group_size": 128, "width": 8, "shares": 2, "levels": [2, 3]},
    "group 256, tables of six": {"rows": 5, "cols": 400, "group_size": 256, "width": 6, "tokens": 3,
                                 "kind": "bfloat16", "levels": [1, 8], "warps": 8},
    "more tokens than tables": {"rows": 3, "cols": 40, "group_size": 32, "width": 8, "tokens": 3},
    "more shares than tiles": {"rows": 1, "cols": 1, "group_size": 128, "shares": 3, "tokens": 8, "levels": [3]},
    "more rows than a panel": {"rows": 270, "block_rows": 270, "cols": 30, "group_size": 32, "tokens": 5,
                               "levels": [1]},
}


@pytest.fixture(scope="module")
def errors():
    pytest.importorskip("numba.cuda")
    return dict(zip(CASES, simulate([{**BASE, **case} for case in CASES.values()]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_product_is_exact_up_to_rounding(errors, name):
    assert errors[name] <= ROUNDING[CASES[name].get("kind", "float32")] + SUMS
