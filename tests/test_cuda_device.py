"""Products on a device: right, whatever memory held before.

Bounds are derived: a result is a sum in float32 of products that are exact or nearly so, rounded once; `SUMS` grows
with the number of terms. Dequantized weights are rounded before they are multiplied.
"""

import os

import numpy as np
import pytest
import test_cuda_lut
import test_cuda_mma
import torch
from cases import packed_case
from simulation import ROUNDING, SUMS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
CASES = {f"lut: {name}": {**test_cuda_lut.BASE, **case} for name, case in test_cuda_lut.CASES.items()}
CASES |= {f"mma: {name}": {**test_cuda_mma.BASE, **case} for name, case in test_cuda_mma.CASES.items()}
for _mode in ("lut", "mma"):
    for _tokens, _kind in ((1, "float16"), (3, "float16"), (8, "bfloat16"), (33, "float16"), (100, "bfloat16")):
        CASES[f"{_mode}: large, {_tokens} tokens"] = {
            "kernel": _mode, "rows": 1600, "cols": 4097, "group_size": 128, "block_rows": 512, "tokens": _tokens,
            "kind": _kind, "bias": True}
SHAPE_KEYS = ("rows", "cols", "group_size", "block_rows", "levels", "bias")


def seeded():
    """Other numbers in every run; a failure prints their seed."""
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.fixture
def generator():
    return seeded()


def _bound(kind, columns, dequantized=False):
    """Largest ‖error‖/‖result‖: one rounding of results, sums in float32, and of dequantized weights one each."""
    return ROUNDING[kind] * (2 if dequantized else 1) + SUMS * max(1, columns / 500)


def _x(generator, tokens, columns, kind="float16"):
    return torch.from_numpy(generator.normal(size=(tokens, columns))).to(getattr(torch, kind))


def _expected(x, packed):
    y = x.double() @ packed.dequantize().double().T
    return y if packed.bias is None else y + packed.bias.double()


def _error(y, expected):
    return ((y.cpu().double() - expected).norm() / expected.norm()).item()


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that torch gives out for results and scratch is NaN."""
    new_empty = torch.Tensor.new_empty

    def filled(tensor, *size, **options):
        made = new_empty(tensor, *size, **options)
        made.view(torch.uint8).fill_(255)
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


@pytest.mark.parametrize("name", CASES)
def test_product_is_right_and_repeats(name, generator, poisoned):
    from kernels_numba.gpu.weight import make_weight

    case = CASES[name]
    mode, kind, tokens = case["kernel"], case["kind"], case["tokens"]
    packed = packed_case(int(generator.integers(1 << 30)), **{key: case[key] for key in SHAPE_KEYS if key in case})
    options = {key: case[key] for key in ("width", "shares", "warps", "gather", "stages") if key in case}
    weight = make_weight(packed, mode, torch.device("cuda", 0), **options)
    x = _x(generator, tokens, packed.shape[1], kind)
    bias = None if packed.bias is None else packed.bias.cuda()
    y = weight.through_codes(x.cuda(), bias)
    assert _error(y, _expected(x, packed)) <= _bound(kind, packed.shape[1])
    for _ in range(3):
        assert torch.equal(weight.enqueue(x.cuda(), bias), y) or tokens >= weight._device.settings.crossover


@pytest.mark.parametrize("name", test_cuda_mma.HARD)
def test_numbers_that_float16_cannot_hold(name, generator, poisoned):
    """The simulator's cases: one activation of the last token may be infinite or no number, which spoils that token."""
    from kernels_numba.gpu.weight import make_weight

    case = {**test_cuda_mma.BASE, **test_cuda_mma.HARD[name]}
    packed = packed_case(int(generator.integers(1 << 30)), **{key: case[key] for key in SHAPE_KEYS if key in case})
    weight = make_weight(packed, "mma", torch.device("cuda", 0), warps=case["warps"], gather=case["gather"])
    x = _x(generator, case["tokens"], packed.shape[1]).double() * case.get("magnitude", 1.0)
    x = x.to(getattr(torch, case["kind"]))
    if "spoiled" in case:
        x[-1, packed.shape[1] // 2] = float(case["spoiled"])
    y = weight.through_codes(x.cuda(), None)
    if "spoiled" in case:
        assert not y[-1].isfinite().any()
        x, y = x[:-1], y[:-1]
    assert _error(y, _expected(x, packed)) <= _bound(case["kind"], packed.shape[1])


@pytest.mark.parametrize("workspace", (1 << 18, 1 << 29))  # a few panels, and the whole matrix
@pytest.mark.parametrize("group_size", (32, 64, 96, 128, 256))
@pytest.mark.parametrize("tokens,kind", ((1, "float16"), (7, "bfloat16"), (200, "float16")))
def test_dequantized_panels_are_right(tokens, kind, group_size, workspace, generator, poisoned, monkeypatch):
    from kernels_numba.gpu import panels
    from kernels_numba.gpu.weight import make_weight

    monkeypatch.setattr(panels, "WORKSPACE_BYTES", workspace)
    packed = packed_case(int(generator.integers(1 << 30)), rows=700, cols=1000, group_size=group_size, block_rows=256,
                         bias=True)
    weight = make_weight(packed, "mma", torch.device("cuda", 0))
    x = _x(generator, tokens, 1000, kind)
    y = torch.full((tokens, 700), torch.nan, dtype=x.dtype, device="cuda")
    panels.multiply(weight, x.cuda(), y, packed.bias.cuda())
    assert _error(y, _expected(x, packed)) <= _bound(kind, 1000, dequantized=True)
