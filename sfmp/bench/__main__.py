"""``python -m sfmp.bench cpu|kernels|decode|memory --out FILE.json``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sfmp.bench import cpu, kernels, memory
from sfmp.checks import SfmpError


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sfmp.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("cpu", help="CPU kernels beside torch, onnxruntime and OpenVINO, and tokens per second",
                                description=cpu.__doc__)
    bench.add_argument("--out", type=Path, required=True, help="JSON file to write")
    bench.add_argument("--parts", nargs="+", default=["product", "batch", "width", "accuracy", "decode"],
                       choices=["product", "batch", "width", "accuracy", "decode"])
    bench.add_argument("--shapes", nargs="+", type=_shape, default=list(cpu.SHAPES), help="out×in, e.g. 4096x4096")
    bench.add_argument("--batches", nargs="+", type=int, default=list(cpu.BATCHES))
    bench.add_argument("--models", nargs="+", default=["embedded", "1.1B"])
    bench.add_argument("--threads", type=int, default=2)
    bench.add_argument("--quick", action="store_true", help="few rounds: to see that it runs, not to quote")
    gpu = commands.add_parser("kernels", help="GPU kernels beside torch, gemlite and Triton",
                              description=kernels.__doc__)
    kernels.add_arguments(gpu, _shape)
    decode = commands.add_parser("decode", help="tokens per second under CUDA graphs")
    memory.add_arguments(commands.add_parser("memory", help="peak memory of quantizing, and one large model, whole",
                                             description=memory.__doc__))
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["decode"]:  # the other commands need nothing of what it imports
        from sfmp.bench import gpu_decode

        gpu_decode.add_arguments(decode)
        return gpu_decode.run(parser.parse_args(given))
    options = parser.parse_args(given)
    if options.command == "kernels":
        return kernels.run(options)
    try:
        if options.command == "memory":
            return memory.run(options)
        chosen = [part for part in cpu.parts(options.shapes, options.batches, options.models)
                  if part["part"] in options.parts]
        result = cpu.measure(chosen, options.quick, options.threads, options.out)
    except SfmpError as error:
        print(error, file=sys.stderr)
        return 2
    failed = [cpu.describe(part) for part in result["parts"] if "failed" in part]
    print(f"written: {options.out}")
    if failed:
        print(f"failed: {', '.join(failed)}; the file says why", file=sys.stderr)
    return 1 if failed else 0


def _shape(text: str) -> tuple[int, int]:
    try:
        rows, columns = (int(size) for size in text.lower().replace("×", "x").split("x"))
        if rows > 0 and columns > 0 and columns % 128 == 0:
            return rows, columns
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected out×in with in a multiple of 128, such as 4096x4096, found {text!r}")


if __name__ == "__main__":
    raise SystemExit(main())
