"""``python -m sfmp.scatter_job plan|inputs|layers``: what the jobs of rules/scatter.smk run, one step of one model.

The last step, gathering, is the notebook of quantization (`sfmp.scatter.quantize`). Device and dtype are those of the
job's environment (`sfmp.places.placement`), of a device only one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from sfmp.checks import SfmpError


def main(arguments=None) -> int:
    """Run one step; return the exit status: 0 done, 2 bad input, which one line on standard error names."""
    parser = argparse.ArgumentParser(prog="python -m sfmp.scatter_job", description=__doc__.split("\n")[0])
    steps = parser.add_subparsers(required=True)
    plan = steps.add_parser("plan", help="the plan of one run")
    plan.add_argument("--salience", required=True, help="file of sfmp.salience.save_salience")
    plan.add_argument("--spec", required=True, type=json.loads, help="fields of QuantSpec as JSON")
    plan.add_argument("--budget", choices=("bpw", "stored"), default="bpw", help="what spec.bpw bounds (bpw)")
    plan.add_argument("--out", required=True, type=Path, help="file to write")
    inputs = steps.add_parser("inputs", help="what enters the first layer of each piece")
    inputs.add_argument("--out", required=True, nargs="+", type=Path, help="files to write, one for each piece")
    layers = steps.add_parser("layers", help="the quantized layers of one piece")
    layers.add_argument("--plan", required=True, type=Path)
    layers.add_argument("--inputs", required=True, type=Path, help="what `inputs` wrote for this piece")
    layers.add_argument("--out", required=True, type=Path, help="folder to write; it must not exist")
    for step, run in ((plan, write_plan), (inputs, write_inputs), (layers, write_layers)):
        step.set_defaults(run=run)
        step.add_argument("--model", required=True, help="embedded, a local folder or OWNER/NAME@REVISION")
    for step in (inputs, layers):
        step.add_argument("--windows", required=True, help="file of calibration windows")
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (SfmpError, OSError) as error:  # OSError: a file that is not there, a full disk
        print(f"sfmp.scatter_job: {error}", file=sys.stderr)
        return 2
    return 0


def write_plan(options) -> None:
    """Make the plan that the notebook of quantization makes."""
    from sfmp import equal_bytes
    from sfmp.allocate import make_plan
    from sfmp.salience import load_salience
    from sfmp.spec import QuantSpec
    from sfmp.stages import load_placed

    salience, spec = load_salience(options.salience), QuantSpec.from_dict(options.spec)
    if options.budget == "stored":
        shapes = {name: tuple(matrix.shape) for name, matrix in salience.items()}
        spec = equal_bytes.spec_for_stored(shapes, spec)
    model = load_placed(options.model)[0] if spec.objective == "measured" else None
    make_plan(salience, spec, model).save(options.out)


def write_inputs(options) -> None:
    """Run the model once, layer by layer."""
    from sfmp.salience import linear_modules
    from sfmp.scatter import identity_of, ranges_of
    from sfmp.spec import QuantSpec
    from sfmp.stream_inputs import cache_inputs
    from sfmp.unfuse import linears_exposed

    spec = QuantSpec(bpw=3.0)  # of which only what is skipped matters; no run of the workflow chooses that
    with tempfile.TemporaryDirectory() as scratch:
        stream, windows = _opened(options, spec.skip, scratch)
        with linears_exposed(stream.model):
            stream.exposed = list(linear_modules(stream.model, spec.skip))
        identity = identity_of(options.model, stream.model.config, spec, windows, dtype=stream.model.dtype,
                               device=stream.device)
        cache_inputs(stream, windows, ranges_of(len(stream), len(options.out)), options.out, identity)


def write_layers(options) -> None:
    """Quantize the layers of one piece."""
    from sfmp.scatter import identity_of, quantize_piece
    from sfmp.spec import Plan
    from sfmp.stream_inputs import read_inputs

    plan = Plan.load(options.plan)
    with tempfile.TemporaryDirectory() as scratch:
        stream, windows = _opened(options, plan.spec.skip, scratch)
        known = {"dtype": stream.model.dtype, "device": stream.device}
        what = options.model, stream.model.config, plan.spec, windows
        layers, batches = read_inputs(options.inputs, stream.device, identity_of(*what, **known))
        batches = [] if plan.spec.method == "rtn" else batches
        quantize_piece(stream, plan, layers, batches, options.out, identity_of(*what, **known, plan=plan))


def _opened(options, skip, scratch):
    """The model as a stream of layers, and the calibration windows."""
    from sfmp import data, places
    from sfmp.model_source import chosen_device, skeleton
    from sfmp.stream import open_stream

    device, dtype = places.placement()
    empty, _ = skeleton(options.model)
    device = chosen_device("cpu" if device == "cpu" else "cuda")  # one holds a layer of a model spread over several
    stream = open_stream(options.model, empty, dtype, device, skip, scratch)
    return stream, data.load_windows(options.windows)[0]


if __name__ == "__main__":
    sys.exit(main())
