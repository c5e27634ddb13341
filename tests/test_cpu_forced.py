"""Products with every target that this processor can be forced to: the same numbers, and never those of another."""

import os
import subprocess
import sys

import pytest
import torch
from cases import packed_case

import kernels_numba
from kernels_numba.cpu import launch, product, targets, threads
from sfmp.linear import SFMPLinear
from sfmp.spec import SfmpError

pytestmark = pytest.mark.cpu
HERE = [name for name, needs in targets.NEEDS.items() if targets.features().issuperset(needs)]
LIMITS = {"lut16": 1e-4, "lut8": 2e-2, "exact": 1e-5}
KINDS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=HERE[1:])
def target(request, monkeypatch):
    monkeypatch.setenv(targets.VARIABLE, request.param)
    return request.param


def _x(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _multiply(x, packed, mode=None):
    return kernels_numba.matmul(x, packed, backend="cpu", mode=mode)


def _best(x, packed, mode, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv(targets.VARIABLE, HERE[0])
        return _multiply(x, packed, mode)


def _agree(x, packed, target, monkeypatch, mode=None):
    """The product is near that of the dequantized weight, and as the best target computes it."""
    mode = mode or targets.MODES[target][0]
    found, best = _multiply(x, packed, mode), _best(x, packed, mode, monkeypatch)
    if target == "generic":  # adds in another order
        rounding = max(torch.finfo(x.dtype).eps, 1e-6)
        torch.testing.assert_close(found, best, rtol=rounding, atol=rounding * float(best.abs().max()))
    else:
        assert torch.equal(found, best)
    expected = x.double() @ packed.dequantize().double().T + (0 if packed.bias is None else packed.bias)
    limit = LIMITS[mode] + torch.finfo(x.dtype).eps
    assert float((found.double() - expected).norm()) < limit * float(expected.norm())


def test_mixed_bits_permutations_ragged_shapes_kinds_and_bias(target, monkeypatch):
    for seed, (rows, cols, group_size) in enumerate([(70, 300, 128), (16, 257, 256), (1, 129, 128)]):
        packed = packed_case(seed, rows=rows, cols=cols, group_size=group_size, block_rows=20, bias=seed % 2 == 0)
        for dtype in KINDS:
            _agree(_x(2, cols, seed=seed, dtype=dtype), packed, target, monkeypatch)


@pytest.mark.parametrize("target", HERE[1:][-2:], indirect=True)
@pytest.mark.parametrize("group_size", [64, 96])
def test_narrow_tiles(target, group_size, monkeypatch):
    packed = packed_case(3, rows=60, cols=200, group_size=group_size)
    _agree(_x(1, 200), packed, target, monkeypatch)


def test_every_mode(target, monkeypatch):
    packed = packed_case(1, rows=60, cols=400, group_size=128, block_rows=32)
    for mode in targets.MODES[target]:
        _agree(_x(1, 400), packed, target, monkeypatch, mode)


@pytest.mark.parametrize("target", HERE[1:][-2:], indirect=True)
def test_tokens_share_a_pass(target, monkeypatch):
    monkeypatch.setattr(launch, "singles", lambda *_: 1)
    packed = packed_case(2, rows=40, cols=200, group_size=128)
    x = _x(5, 200)
    together = _multiply(x, packed)
    assert torch.equal(together, torch.cat([_multiply(row, packed) for row in x.split(1)]))
    _agree(x, packed, target, monkeypatch)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_activations_without_tables_propagate_as_in_torch(target, value):
    packed = packed_case(0, group_size=128, bias=True)
    x = _x(2, 100)
    x[1, 17] = value
    expected = torch.nn.functional.linear(x, packed.dequantize(), packed.bias)
    torch.testing.assert_close(_multiply(x, packed), expected, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_thread_counts_give_identical_bits(target):
    packed = packed_case(2, rows=700, cols=2000, group_size=128, block_rows=512)
    x, before, found = _x(1, 2000), torch.get_num_threads(), []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            if threads.count() != count:
                pytest.skip(f"needs {count} threads, Numba has {threads.count()} here")
            _multiply(-x, packed)  # so that the tables are built again
            found.append(_multiply(x, packed))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_targets_do_not_mix_when_the_variable_changes(monkeypatch):
    """One matrix, the same activations: each target has code of its own, and reads no tables of another."""
    packed = packed_case(4, rows=64, cols=256, group_size=128)
    x = _x(1, 256)
    expected = x @ packed.dequantize().T
    weights = {}
    for name in HERE + HERE[::-1]:
        monkeypatch.setenv(targets.VARIABLE, name)
        torch.testing.assert_close(_multiply(x, packed, "exact"), expected, rtol=1e-5, atol=1e-4)
        weights[name] = product.weight(packed)
        assert weights[name].target == name and weights[name].image is weights[HERE[0]].image
    workers = [product._kernels(name, "exact", 128, 1)[1][:2] for name in HERE]
    assert len(set(workers)) == len({address for address, _ in workers}) == len(HERE)


def test_a_mode_that_a_target_lacks(monkeypatch):
    monkeypatch.setenv(targets.VARIABLE, "generic")
    packed = packed_case(0, group_size=128)
    with pytest.raises(SfmpError, match="mode: expected one of exact on target generic, found 'lut8'"):
        _multiply(_x(1, 100), packed, "lut8")
    layer = SFMPLinear(packed)
    assert torch.allclose(layer(_x(1, 100)), _x(1, 100) @ packed.dequantize().T, rtol=1e-4, atol=1e-4)


SCRIPT = """
import sys, torch
sys.path.insert(0, "tests")
from cases import packed_case
import kernels_numba
packed = packed_case(0, rows=50, cols=200, group_size=128, bias=True)
x = torch.randn(1, 200, generator=torch.Generator().manual_seed(0))
found = [kernels_numba.matmul(x.to(kind), packed, backend="cpu") for kind in (torch.float32, torch.bfloat16,
                                                                               torch.float16)]
if "generic" in kernels_numba.available()["cpu"]:
    x[0, 3] = float("inf")
    found.append(kernels_numba.matmul(x, packed, backend="cpu"))
torch.save((kernels_numba.available()["cpu"], found), sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(targets.architecture() != "x86", reason="names of x86 processors")
@pytest.mark.parametrize(("target", "processor", "features"), [
    ("avx2", "haswell", "+avx2,+f16c,+fma"), ("generic", "x86-64", "+sse2")])
def test_whole_products_with_nothing_but_the_features_of_a_target(target, processor, features, tmp_path, monkeypatch):
    """Numba may emit no other instruction, drivers included; LLVM refuses to compile one that is named."""
    if target not in HERE:
        pytest.skip(f"this processor cannot run {target}")
    limits = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    environment = {name: value for name, value in os.environ.items() if name != targets.VARIABLE} | limits
    subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "found"], env=environment, check=True)
    available, found = torch.load(tmp_path / "found")
    assert available.startswith(f"yes: {target}, found on this processor")
    packed = packed_case(0, rows=50, cols=200, group_size=128, bias=True)
    mode = targets.MODES[target][0]
    x = _x(1, 200)
    for kind, y in zip(KINDS, found, strict=False):
        expected = _best(x.to(kind), packed, mode, monkeypatch)
        if target == "generic":
            rounding = max(torch.finfo(kind).eps, 1e-6)
            torch.testing.assert_close(y, expected, rtol=rounding, atol=rounding * float(expected.abs().max()))
        else:
            assert torch.equal(y, expected), kind
    x[0, 3] = float("inf")
    for y in found[3:]:  # through panels
        torch.testing.assert_close(y, x @ packed.dequantize().T + packed.bias, equal_nan=True)
