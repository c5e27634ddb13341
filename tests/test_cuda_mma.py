"""The tensor-core kernel in the CUDA simulator: every bit-width and group size, ragged edges, permutations."""

import pytest
from simulation import ROUNDING, SUMS, simulate

pytestmark = pytest.mark.cudasim
BASE = {"kernel": "mma", "tokens": 1, "kind": "float16", "rows": 20, "block_rows": 20, "warps": 2}
CASES = {
    "bits 1 to 8, group 32, two row blocks": {"rows": 21, "cols": 300, "group_size": 32, "block_rows": 11,
                                              "tokens": 3, "bias": True},
    "group 64": {"cols": 130, "group_size": 64, "levels": [2, 3], "kind": "bfloat16"},
    "group 96": {"cols": 200, "group_size": 96, "tokens": 2, "levels": [3, 5]},
    "group 128": {"rows": 33, "block_rows": 33, "cols": 500, "group_size": 128, "levels": [2, 3, 4], "bias": True},
    "group 256, eight warps": {"rows": 5, "cols": 400, "group_size": 256, "levels": [1, 8], "warps": 8},
    "two tiles of tokens": {"rows": 3, "cols": 40, "group_size": 64, "tokens": 11, "levels": [4]},
    "two launches": {"rows": 1, "cols": 1, "group_size": 128, "tokens": 34, "levels": [6]},
}


@pytest.fixture(scope="module")
def errors():
    pytest.importorskip("numba.cuda")
    return dict(zip(CASES, simulate([{**BASE, **case} for case in CASES.values()]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_product_is_exact_up_to_rounding(errors, name):
    assert errors[name] <= ROUNDING[CASES[name].get("kind", "float16")] + SUMS
