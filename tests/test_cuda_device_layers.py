"""Layers on a device: graphs, streams, threads, compiled models, misuse, compute-sanitizer, host time."""

import math
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from cases import packed_case
from simulation import ROUNDING, TESTS
from test_cuda_device import _bound, _error, _expected, _x, pytestmark, seeded  # noqa: F401 - applies here too

import kernels_numba
from kernels_numba.gpu import check, devices
from sfmp.checks import SfmpError
from sfmp.linear import SFMPLinear


@pytest.fixture
def generator():
    return seeded()


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
