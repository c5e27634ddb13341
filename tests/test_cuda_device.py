"""Both kernels on a device: the grid of the simulator and larger matrices, against float64."""

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
    for _tokens, _kind in ((1, "float16"), (8, "bfloat16"), (33, "float16")):
        CASES[f"{_mode}: large, {_tokens} tokens"] = {
            "kernel": _mode, "rows": 1600, "cols": 4097, "group_size": 128, "block_rows": 512, "tokens": _tokens,
            "kind": _kind, "bias": True, "width": 8 if _tokens == 1 else 4}


@pytest.mark.parametrize("name", CASES)
def test_product_on_a_device(name):
    from kernels_numba.gpu import product

    case = dict(CASES[name])
    mode, tokens, kind, width = case.pop("kernel"), case.pop("tokens"), case.pop("kind"), case.pop("width", 8)
    packed = packed_case(0, **{key: value for key, value in case.items() if key not in ("shares", "warps")})
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(tokens, packed.shape[1]))).to(getattr(torch, kind))
    reference = x.double() @ packed.dequantize().double().T
    if packed.bias is not None:
        reference += packed.bias.double()
    for _ in range(2):
        poison = torch.full((tokens * packed.shape[0],), torch.nan, dtype=x.dtype, device="cuda")  # its memory is next
        del poison
        y = product.matmul(x.cuda(), packed, mode, width)
    error = ((y.cpu().double() - reference).norm() / reference.norm()).item()
    assert error <= ROUNDING[kind] + SUMS * max(1, packed.shape[1] / 500)
    assert torch.equal(y, product.matmul(x.cuda(), packed, mode, width))
