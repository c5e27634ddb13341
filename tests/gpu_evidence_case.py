"""Files of GPU measurements whose every number is made up and known: for tests of tables and figures, no evidence."""

import json

COPY_GBPS = 4000.0
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
MODES = {"mma": 1.0, "lut": 2.0}  # times of the weight's bytes at `COPY_GBPS`
ROUNDS = (1.0, 2.0, 1.0)  # the second round is half as fast for everybody
FIXED_US = 2.0


def device(name="NVIDIA H200"):
    """A device that says it is made up in its driver."""
    return {"name": name, "capability": [9, 0], "multiprocessors": 132, "memory_bytes": 141 << 30, "l2_bytes": 50 << 20,
            "driver": "SYNTHETIC, made up by a test", "clocks": {"clocks.sm": 1980.0}}


def bytes_of(shape, bits):
    """Bytes of codes and scales."""
    return shape[0] * shape[1] * (bits + 0.25) / 8


def row(name, family, time, **facts):
    """One candidate; slower by `ROUNDS`."""
    return {"name": name, "family": family, "layout": "uniform", "natural": True, "gather": "none", "tokens": 1,
            "dtype": "float16", "copies": 2, "error": 2e-4, "eager_us": 3 * time, "host_us": 4.0, "predicted_us": None,
            "samples_us": [time * slow for slow in ROUNDS], **facts}


def ours(shape, mode, bits, layout="blocks", natural=False, gather="fused", times=1.0, tokens=1, **facts):
    """One of our candidates: FIXED_US and the bytes at a share of the copy's bandwidth."""
    size = bytes_of(shape, bits)
    time = (FIXED_US + size / COPY_GBPS / 1e3 * MODES.get(mode, 1.0)) * times
    several = f"{tokens} tokens" if tokens > 1 else ""
    name = " ".join([mode, f"{bits:g}", layout, gather, facts.get("dtype", ""), several])
    return row(name.strip(), "sfmp", time, mode=mode, bits=bits, layout=layout, natural=natural, gather=gather,
               tokens=tokens, packed_bytes=size, **{"predicted_us": 0.9 * time, **facts})


def peers(shape, tokens=1):
    """torch in float16 and with 4 bits, and a Triton kernel."""
    dense = 2 * shape[0] * shape[1]
    time, fours = dense / COPY_GBPS / 1e3, bytes_of(shape, 4)
    return [row("torch float16", "torch", time, mode="float16", bits=16, packed_bytes=dense, tokens=tokens),
            row("torch int4pack", "torch", time / 2, mode="int4pack", bits=4, packed_bytes=fours, dtype="bfloat16",
                tokens=tokens),
            row("triton 4", "triton", time / 3, mode="dequantize", bits=4, packed_bytes=fours, tokens=tokens)]


def product(shape):
    """Part of one token."""
    rows = peers(shape)
    for mode in MODES:
        rows += [ours(shape, mode, bits, times=1.1 if bits == 3 else 1.0) for bits in (2, 2.5, 3, 3.5, 4)]
        rows += [ours(shape, mode, bits, "uniform", True, "none") for bits in (2, 3, 4)]
        rows += [ours(shape, mode, 2.5, "column groups", True, "none", times=1.4),
                 ours(shape, mode, 3, natural=True, gather="none", times=1.0),
                 ours(shape, mode, 3, gather="unfused", times=1.5),
                 *([ours(shape, mode, 3, gather="own kernel", times=1.3)] if mode == "mma" else []),
                 ours(shape, mode, 3, dtype="bfloat16")]
    return {"part": "product", "shape": list(shape), "rows": rows}


def batch(shape, counts=(1, 2, 4, 8, 16)):
    """Part of several tokens: look-ups take their time for every token, dequantizing the time of float16 and more."""
    rows = []
    for tokens in counts:
        rows += peers(shape, tokens)
        rows += [ours(shape, "lut", 3, tokens=tokens, times=tokens, way="lut"),
                 ours(shape, "mma", 3, tokens=tokens, way="mma"),
                 ours(shape, "dequantize", 3, tokens=tokens, times=8.0, way="dequantize")]
    return {"part": "batch", "shape": list(shape), "rows": rows}


def width(shape):
    """Part of table widths."""
    rows = [ours(shape, "lut", 3, "uniform", True, "none", times=1 + abs(table_width - 6) / 4, table_width=table_width,
                 group_size=size, table_bytes=128 * 2**table_width)
            for size in (64, 128) for table_width in (2, 4, 6, 8)]
    return {"part": "width", "shape": list(shape), "rows": rows}


def accuracy(shape):
    """Part of errors."""
    rows = [{"mode": mode, "bits": bits, "activations": kind, "dtype": dtype, "error": 2e-4 if dtype == "float16" else
             2e-3} for mode in (*MODES, "torch") for bits in (2, 3, 4) for kind in ("gaussian", "outlier")
            for dtype in ("float16", "bfloat16")]
    return {"part": "accuracy", "shape": list(shape), "rows": rows}


def kernels():
    """Content of kernels.json."""
    host = {f"kernels_numba.matmul {mode}": {"median_us": us, "samples_us": [us] * 3} for mode, us in
            (("mma", 4.0), ("lut", 8.0))}
    return {"kind": "gpu kernels", "command": ["synthetic"], "date": "2000-01-01", "commit": "none", "dirty": False,
            "device": device(), "versions": {"torch": "0"}, "settings": {"rounds": 31}, "host": host,
            "ceilings": {"copy_gbps": COPY_GBPS, "read_gbps": 4200.0, "matmul_tflops": 700.0},
            "absent": {"gemlite 4": "gemlite not installed"},
            "parts": [*map(product, SHAPES), batch(SHAPES[1]), width(SHAPES[1]), accuracy(SHAPES[0]),
                      {"part": "product", "shape": [6144, 4096], "failed": "not begun"}]}


def decode():
    """Content of decode.json."""
    rows = []
    for weights, bpw, fused, speed in (("torch fp16", None, False, 200.0), ("sfmp mma", 3.0, False, 500.0),
                                       ("sfmp mma", 3.0, True, 600.0), ("sfmp mma", 2.5, True, 900.0),
                                       ("sfmp lut", 3.0, True, 300.0)):
        rows += [{"name": weights, "weights": weights, "bpw": bpw, "fused": fused, "graph": graph, "compiled": False,
                  "random": True, "layers": 32, "full_layers": 32, "tokens": 64,
                  "tokens_per_second": speed * (1 if graph else 0.25), "seconds_per_token": [1 / speed] * 3,
                  "gigabytes_per_second": 1000.0, "weight_bytes": 10**9, "peak_bytes": 2 * 10**9}
                 for graph in (False, True)]
    return {"kind": "gpu decode", "command": ["synthetic"], "date": "2000-01-01", "commit": "none", "dirty": False,
            "device": device(), "versions": {"torch": "0"}, "settings": {"rounds": 7}, "ceilings": None, "host": None,
            "absent": {}, "parts": [{"part": "decode", "model": "Llama-3.1-8B", "layers": 32, "rows": rows, "absent": {
                "sfmp lut 4 bpw eager": "OutOfMemoryError"}}]}


def write_files(folder):
    """Write both files; return the paths by name."""
    paths = {"kernels": folder / "kernels.json", "decode": folder / "decode.json"}
    for name, content in (("kernels", kernels()), ("decode", decode())):
        paths[name].write_text(json.dumps(content))
    return paths
