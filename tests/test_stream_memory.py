"""Memory of a model that is quantized layer by layer: peak of a process, what is in use after every layer, the heap."""

import ctypes
import os
import subprocess
import sys
import weakref

import pytest

from sfmp import pipeline
from sfmp.bench.memory import make_model, measure
from sfmp.heap import _trim
from sfmp.spec import QuantSpec
from sfmp.stream import LayerStream

HOLES = """
import ctypes
import os
from pathlib import Path
from sfmp.heap import give_back

def resident():
    return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
large, small = [], []
for _ in range(500):
    large.append(libc.malloc(100 << 10))  # below what malloc maps alone
    ctypes.memset(large[-1], 1, 100 << 10)
    small.append(libc.malloc(2048))  # what stays between them
for block in large:
    libc.free(block)
before = resident()
give_back()
print(before, resident())
"""


def bytes_in_use():
    """Bytes of all blocks that malloc has given out, free ones between them left out; None where it cannot tell."""
    count = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if count is None:
        return None
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    count.restype = type("Mallinfo", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
    found = count()
    return found.hblkhd + found.uordblks


@pytest.mark.slow
def test_peak_grows_by_less_than_half_of_the_added_weights():
    few, many = (measure(f"512x1376x{layers}", windows=2, seqlen=64, method="rtn", repeats=1) for layers in (4, 16))
    grown = many["model"] - few["model"]
    assert grown == 12 * few["layer"] > 60e6
    # The deeper model has more modules to keep in mind, but neither the weights nor what is made of them.
    assert many["peak"] - few["peak"] < 0.5 * grown


@pytest.mark.parametrize("method", ["awq", "gptq", "rtn"])
def test_a_layer_is_gone_before_the_next_is_read(tmp_path, monkeypatch, method):
    """Peaks of processes also count holes that the allocator leaves; this counts what is held after every layer."""
    if bytes_in_use() is None:
        pytest.skip("needs mallinfo2 of glibc 2.33 or later")
    make_model(tmp_path / "model", (256, 512, 8))
    load, free, found, held = LayerStream._load, LayerStream._free, [], []

    def loaded(stream, index):
        load(stream, index)
        held[:] = map(weakref.ref, stream.layers[index][1].parameters())

    def freed(stream):
        index = stream._index
        free(stream)
        if index is not None:
            alive = [one() for one in held]
            found.append((index, sum(p.nbytes for p in alive if p is not None and not p.is_meta), bytes_in_use()))

    monkeypatch.setattr(LayerStream, "_load", loaded)
    monkeypatch.setattr(LayerStream, "_free", freed)
    spec = QuantSpec(bpw=3.0, group_size=64, block_rows=64, levels=(2, 3, 4), method=method)
    pipeline.quantize_to_folder(str(tmp_path / "model"), tmp_path / "out", spec,
                                pipeline.Calibration("python:calibration", 4, 64), device="cpu")
    assert [index for index, _, _ in found[-8:]] == list(range(8))  # the last pass, which quantizes
    assert len(found) > 8 and not any(alive for _, alive, _ in found)
    used = [used for _, _, used in found[-6:]]
    smallest = 2 * 64 * 256  # bytes of k_proj in bfloat16; five layers lie between the first count and the last
    assert max(used) - min(used) < 5 * smallest


def test_give_back_empties_holes():
    if _trim() is None:
        pytest.skip("the heap is given back with glibc only")
    if os.sysconf("SC_PAGE_SIZE") > 16 << 10:
        pytest.skip("needs pages much smaller than the freed blocks of 100 KB")
    done = subprocess.run([sys.executable, "-c", HOLES], check=True, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert before - after > 0.8 * 500 * (100 << 10)
