"""Products on a device: right whatever memory held before, in graphs, on streams, from threads, in compiled models.

Bounds are derived: a result is a sum in float32 of products that are exact or nearly so, rounded once; `SUMS` grows
with the number of terms. Dequantized weights are rounded before they are multiplied.
"""

import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import test_cuda_lut
import test_cuda_mma
import torch
from cases import packed_case
from simulation import ROUNDING, SUMS

import kernels_numba
from kernels_numba.gpu import check, devices
from sfmp.checks import SfmpError
from sfmp.linear import SFMPLinear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
TESTS = Path(__file__).parent
CASES = {f"lut: {name}": {**test_cuda_lut.BASE, **case} for name, case in test_cuda_lut.CASES.items()}
CASES |= {f"mma: {name}": {**test_cuda_mma.BASE, **case} for name, case in test_cuda_mma.CASES.items()}
for _mode in ("lut", "mma"):
    for _tokens, _kind in ((1, "float16"), (3, "float16"), (8, "bfloat16"), (33, "float16"), (100, "bfloat16")):
        CASES[f"{_mode}: large, {_tokens} tokens"] = {
            "kernel": _mode, "rows": 1600, "cols": 4097, "group_size": 128, "block_rows": 512, "tokens": _tokens,
            "kind": _kind, "bias": True}
SHAPE_KEYS = ("rows", "cols", "group_size", "block_rows", "levels", "bias")


@pytest.fixture(autouse=True)
def generator():
    """Other numbers in every run; a failure prints their seed."""
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    return np.random.default_rng(seed)


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


@pytest.mark.parametrize("kind", ("float16", "bfloat16"))
@pytest.mark.parametrize("tokens", (1, 7, 200))
def test_dequantized_panels_are_right(kind, tokens, generator, poisoned):
    from kernels_numba.gpu import panels
    from kernels_numba.gpu.weight import make_weight

    packed = packed_case(int(generator.integers(1 << 30)), rows=700, cols=1000, group_size=128, block_rows=256,
                         bias=True)
    weight = make_weight(packed, "mma", torch.device("cuda", 0))
    x = _x(generator, tokens, 1000, kind)
    y = torch.full((tokens, 700), torch.nan, dtype=x.dtype, device="cuda")
    panels.multiply(weight, x.cuda(), y, packed.bias.cuda())
    assert _error(y, _expected(x, packed)) <= _bound(kind, 1000, dequantized=True)


@pytest.fixture
def layer(generator):
    """A layer on the device and its weight on the host."""
    packed = packed_case(int(generator.integers(1 << 30)), rows=300, cols=900, group_size=128, block_rows=128,
                         levels=(2, 3, 4), bias=True)
    return SFMPLinear(packed).cuda(), packed


@pytest.mark.parametrize("mode", ("mma", "lut", None))
def test_a_layer_multiplies_here_and_says_so(mode, layer, generator):
    layer, packed = layer
    layer.mode = mode
    assert kernels_numba.available()["cuda"].startswith("yes")
    for kind in ("float16", "bfloat16", *(["float32"] if mode != "mma" else [])):
        for tokens in (1, 2, 65, 0):
            x = _x(generator, tokens, 900, kind)
            y = layer(x.cuda())
            assert y.shape == (tokens, 300) and y.dtype == x.dtype and y.is_cuda
            if tokens:
                assert _error(y, _expected(x, packed)) <= _bound(kind, 900, tokens > 64)
        assert layer._cache["ready"][2].structure.mode == ("lut" if mode == "lut" or kind == "float32" else "mma")
    strided = _x(generator, 900, 3).T.cuda()
    assert _error(layer(strided), _expected(strided.cpu(), packed)) <= _bound("float16", 900)
    one = layer(strided)
    layer.half()
    assert _error(layer(strided), _expected(strided.cpu(), packed)) <= 2 * _bound("float16", 900)
    assert not torch.equal(one, layer(2 * strided))


def test_gradients_are_those_of_the_dequantized_weight(layer, generator):
    layer, packed = layer
    x = _x(generator, 3, 900).cuda().requires_grad_()
    layer(x).sum().backward()
    expected = packed.dequantize().sum(0).double().expand(3, -1)
    assert _error(x.grad, expected) <= 2 * ROUNDING["float16"]


@pytest.mark.parametrize("mode", ("mma", "lut"))
@pytest.mark.parametrize("tokens", (1, 20, 100))
def test_a_graph_computes_with_what_x_holds_when_it_is_replayed(mode, tokens, layer, generator):
    layer, packed = layer
    layer.mode = mode
    x = _x(generator, tokens, 900).cuda()
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(3):
            new = _x(generator, tokens, 900)
            x.copy_(new)
            y.fill_(torch.nan)
            graph.replay()
            assert _error(y, _expected(new, packed)) <= _bound("float16", 900, tokens > 64)
            other = layer(new.cuda() * 2)  # eager products in between take no memory of the graph
            assert _error(other, _expected(2 * new, packed)) <= _bound("float16", 900, tokens > 64)


def test_first_use_inside_a_graph_says_to_warm_up(layer, generator):
    layer, _ = layer
    x = _x(generator, 1, 900).cuda()
    check.verdict(0, "mma")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(SfmpError, match="CUDA graph: .*before the capture"):
        with torch.cuda.graph(graph):
            layer(x)
    torch.cuda.synchronize()
    assert layer(x).isfinite().all(), "and nothing is broken after it"


def test_products_follow_torchs_stream(layer, generator):
    """x is written on a stream of its own after a long wait: only a product on that stream sees it."""
    layer, packed = layer
    x, new = _x(generator, 1, 900).cuda(), _x(generator, 1, 900)
    layer(x)
    fresh = new.cuda()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(fresh)
        y = layer(x)
    stream.synchronize()
    assert _error(y, _expected(new, packed)) <= _bound("float16", 900)


def test_threads_multiply_at_once(layer, generator):
    layer, packed = layer
    inputs = [_x(generator, 1, 900) for _ in range(4)]
    layer(inputs[0].cuda())
    wrong = []

    def work(x):
        there, stream = x.cuda(), torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            stream.wait_stream(torch.cuda.default_stream())
            results = [layer(there) for _ in range(200)]
        stream.synchronize()
        wrong.extend(y for y in results if _error(y, _expected(x, packed)) > _bound("float16", 900))

    threads = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thread_that_never_used_cuda_can_multiply(layer, generator):
    layer, packed = layer
    x = _x(generator, 1, 900)
    there, found = x.cuda(), []
    layer(there)
    thread = threading.Thread(target=lambda: found.append(layer(there)))
    thread.start()
    thread.join()
    assert _error(found[0], _expected(x, packed)) <= _bound("float16", 900)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_every_device_has_its_own_weight(layer, generator):
    layer, packed = layer
    x = _x(generator, 2, 900)
    layer(x.cuda(0))
    layer.to("cuda:1")
    assert _error(layer(x.cuda(1)), _expected(x, packed)) <= _bound("float16", 900)
    assert torch.cuda.current_device() == 0
    layer.to("cuda:0")
    assert _error(layer(x.cuda(0)), _expected(x, packed)) <= _bound("float16", 900)


@pytest.mark.parametrize("mode", ("mma", "lut"))
def test_compiled_models_call_the_operator(mode, layer, generator):
    layer, packed = layer
    layer.mode = mode
    x = _x(generator, 2, 900)
    with torch.no_grad():
        eager = layer(x.cuda())
        compiled = torch.compile(layer, fullgraph=True)
        assert torch.equal(compiled(x.cuda()), eager)
    weight = layer._cache["ready"][2]
    torch.library.opcheck(torch.ops.sfmp.cuda_linear.default, (x.cuda(), weight.image, layer.bias, 300, weight.key))


def test_compiled_models_replay_graphs(layer, generator):
    layer, packed = layer
    with torch.no_grad():
        layer(_x(generator, 1, 900).cuda())
        compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            x = _x(generator, 1, 900)
            assert _error(compiled(x.cuda()).clone(), _expected(x, packed)) <= _bound("float16", 900)


def test_misuse_is_named(layer):
    layer, packed = layer
    with pytest.raises(SfmpError, match=r"floating \[..., 900\]"):
        kernels_numba.matmul(torch.zeros(1, 899, device="cuda").half(), layer, "cuda")
    with pytest.raises(SfmpError, match="expected a CUDA device"):
        kernels_numba.matmul(torch.zeros(1, 900).half(), layer, "cuda")
    with pytest.raises(SfmpError, match="float16 or bfloat16 for mode mma"):
        kernels_numba.matmul(torch.zeros(1, 900, device="cuda"), layer, "cuda", "mma")


def test_the_small_product_is_right_on_this_device():
    for mode in ("mma", "lut"):
        assert check.verdict(0, mode) is None
    assert devices.get(0).kernels.capability >= devices.LEAST


SANITIZED = """
import numpy as np, torch
from kernels_numba.gpu import check
for mode in ("mma", "lut"):
    print("relative", check.relative_errors(0, mode))
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ("memcheck", "racecheck"))
def test_compute_sanitizer_finds_nothing(tool):
    binary = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if binary is None:
        pytest.skip("needs compute-sanitizer")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS.parent), os.environ.get("PYTHONPATH", ""))),
                   "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [binary, "--tool", tool, "--error-exitcode", "7"]
    for narrow in (["--kernel-name", "kns=sfmp_"], []):  # torch's kernels are not ours to check, where that can be said
        done = subprocess.run([*command, *narrow, sys.executable, "-c", SANITIZED], capture_output=True, text=True,
                              env=environment, timeout=600)
        if "relative" in done.stdout or done.returncode == 7:
            break
    if "Device not supported" in done.stdout:  # seen where the machine is a gVisor sandbox
        pytest.skip(f"compute-sanitizer cannot run here: {done.stdout[-300:]}")
    assert done.returncode == 0 and done.stdout.count("relative") == 2, done.stdout[-3000:] + done.stderr[-2000:]


def test_host_time_is_reported(capsys):
    from kernels_numba.gpu import host_time

    rows = host_time.measure(200, torch.device("cuda", 0))
    with capsys.disabled():
        for row in rows:
            print(f"\nhost time, {row}")
    assert all(math.isfinite(row["layer_us"]) for row in rows)
