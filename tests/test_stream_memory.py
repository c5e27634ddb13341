"""Memory of a model that is quantized layer by layer: the peak of a process, and what is in use after every layer."""

import ctypes

import pytest

from sfmp import pipeline
from sfmp.bench.memory import make_model, measure
from sfmp.spec import QuantSpec
from sfmp.stream import LayerStream


def bytes_in_use():
    """Bytes of all blocks that malloc has given out, holes between them left out; None where it cannot tell."""
    count = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if count is None:
        return None
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    count.restype = type("Mallinfo", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
    found = count()
    return found.hblkhd + found.uordblks


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_depth():
    few, many = (measure(f"512x1376x{layers}", windows=2, seqlen=64, method="rtn", repeats=1) for layers in (4, 16))
    grown = many["model"] - few["model"]
    assert grown == 12 * few["layer"] > 60e6
    # The largest process has more modules to keep in mind, but neither the weights nor what is made of them.
    assert many["peak"] - few["peak"] < 0.5 * grown


@pytest.mark.parametrize("method", ["awq", "gptq", "rtn"])
def test_what_is_in_use_does_not_grow_from_layer_to_layer(tmp_path, monkeypatch, method):
    """Peaks of processes also count holes that the allocator leaves; this counts what somebody holds."""
    if bytes_in_use() is None:
        pytest.skip("needs mallinfo2 of glibc 2.33 or later")
    make_model(tmp_path / "model", (256, 512, 8))
    free, found = LayerStream._free, []

    def freed(stream):
        index = stream._index
        free(stream)
        if index is not None:
            found.append((index, bytes_in_use()))

    monkeypatch.setattr(LayerStream, "_free", freed)
    spec = QuantSpec(bpw=3.0, group_size=64, block_rows=64, levels=(2, 3, 4), method=method)
    pipeline.quantize_to_folder(str(tmp_path / "model"), tmp_path / "out", spec,
                                pipeline.Calibration("python:calibration", 4, 64), device="cpu")
    last = [used for _, used in found[-6:]]  # of the last pass, which quantizes, all but the first layers
    assert [index for index, _ in found[-8:]] == list(range(8))
    one_layer = 4 * (2 * 256 * 256 + 2 * 64 * 256 + 3 * 256 * 512)  # float32
    assert max(last) - min(last) < one_layer / 10
