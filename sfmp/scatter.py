"""One quantization shared by several processes or machines: ranges of decoder layers, gathered into one model.

Under AWQ a layer is quantized on what the full-precision model hands it, so given that (`sfmp.stream_inputs`) layers
need nothing of each other; under RTN they need no input at all. Under GPTQ a layer is given what the quantized layers
before it return: those cannot be scattered. What is gathered has the bytes of `sfmp.apply.quantize_model` in one
process, where all run the same code on the same kind of processor or GPU with the same number of threads.

Every piece says what it was made from, and is refused where anything else is expected.

Source: METHOD.md sections 1.5 to 1.7; section 3, items 7 to 9.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError

from sfmp.checks import SfmpError
from sfmp.code_hash import code_hash
from sfmp.hf import SFMPQuantizer, attach
from sfmp.resume import differences, fingerprint
from sfmp.stream import LayerStream
from sfmp.stream_quantize import layer_entries, layer_file, put_empty, quantize_range
from sfmp.unfuse import expose_linears

SCATTERED = ("awq", "rtn")  # methods whose layers need nothing of other quantized layers
_RECORD = "piece.json"


def ranges_of(depth: int, pieces: int) -> list[range]:
    """Cut layers into consecutive ranges of about the same length; with more pieces than layers some are empty.

    Examples
    --------
    >>> ranges_of(5, 2)
    [range(0, 3), range(3, 5)]
    """
    longer = depth % pieces
    starts = [piece * (depth // pieces) + min(piece, longer) for piece in range(pieces + 1)]
    return [range(*pair) for pair in zip(starts, starts[1:], strict=False)]


def identity_of(source: str, config, spec, windows, *, dtype, device, plan=None) -> dict[str, str]:
    """Return what decides the numbers of layer inputs or, with a plan, of quantized layers, as text by title.

    Parameters
    ----------
    source, config, spec, windows : as in `sfmp.resume.fingerprint`
    dtype : str or torch.dtype
        Of the model in memory.
    device : torch.device
    plan : Plan, optional
    """
    choices = {"dtype": str(dtype).removeprefix("torch."), "device": torch.device(device).type}
    found = fingerprint(source, config, spec, windows, **choices)
    found["code of sfmp"] = code_hash("sfmp.scatter", "sfmp.stream_inputs")
    del found["specification"]  # of which layer inputs need what is skipped, and quantized layers all that the plan is
    return found | ({"skipped": json.dumps(spec.skip)} if plan is None else {"plan": plan.hash})


def quantize_piece(stream: LayerStream, plan, layers: range, batches, folder, identity: Mapping[str, str],
                   progress: bool = False) -> None:
    """Quantize one range of layers into a folder.

    Parameters
    ----------
    stream : LayerStream
    plan : Plan
        Of the whole model.
    layers : range
    batches : list of Batch
        As they enter the first of them (`sfmp.stream_inputs.read_inputs`); none for rtn.
    folder : path that does not exist
        It appears when all is in it; what a killed process left beside it is removed.
    identity : mapping of str to str
        Of `identity_of` with the plan.
    progress : bool
        Show a bar.

    Raises
    ------
    SfmpError
        The method is none of `SCATTERED`, a weight cannot be quantized, or the folder exists.
    """
    if plan.spec.method not in SCATTERED:
        raise SfmpError(f"method: expected one of {', '.join(SCATTERED)} for pieces, found {plan.spec.method!r}, whose "
                        "layers depend on quantized layers before them; quantize the model in one process")
    folder, wall, cpu = Path(folder), time.perf_counter(), time.process_time()
    if folder.exists():
        raise SfmpError(f"{folder}: expected no such folder, found one; remove it to make the piece again")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    stream.exposed = list(plan)
    report = quantize_range(stream, plan, layers, batches, unfinished, progress)
    record = {"layers": [layers.start, layers.stop], "made_from": dict(identity), "report": report,
              "wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    (unfinished / _RECORD).write_text(json.dumps(record, indent=1), "utf-8")
    os.replace(unfinished, folder)


def gather(model, plan, pieces: Iterable, identity: Mapping[str, str], source=None) -> list[dict]:
    """Put quantized layers in their places in a model: it becomes what `quantize_model` would have made of it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        What was quantized; its layers may be on the meta device, as a `LayerStream` has them.
    plan : Plan
    pieces : folders of `quantize_piece`, together all planned matrices
    identity : mapping of str to str
        As they were given.
    source : as in `sfmp.hf.attach`

    Returns
    -------
    list of dict
        ``wall_seconds`` and ``cpu_seconds`` of each piece.

    Raises
    ------
    SfmpError
        A piece is incomplete, damaged or made from something else, or planned matrices are in no piece.
    """
    pieces = list(pieces)
    records = [_record(Path(folder), identity) for folder in pieces]
    files = [layer_file(Path(folder), index) for folder, record in zip(pieces, records, strict=True)
             for index in range(*record["layers"])]
    if lost := [file for file in files if not file.is_file()]:
        raise SfmpError(f"{lost[0]}: expected this layer in the piece, found no file; make the piece again")
    entries = {}
    for file in files:
        try:
            entries |= layer_entries(file)[0]
        except (SafetensorError, KeyError, ValueError) as error:
            raise SfmpError(f"{file}: expected a quantized layer, found {error}; make the piece again") from error
    if missing := sorted(set(plan) - set(entries)):
        raise SfmpError(f"{missing[0]}: expected this matrix in a piece, found it in none of {len(records)}; "
                        f"{len(missing)} are missing, make the pieces of all layers")
    expose_linears(model, plan)
    put_empty(model, entries)
    for file in files:
        _fill(model, file)
    for name, entry in entries.items():
        SFMPQuantizer.check_layer(name, model.get_submodule(name), SFMPQuantizer.check_entry(name, entry))
    model.eval()
    model.sfmp_report = {"method": plan.spec.method, "matrices": {}, "refused": []}
    for record in records:
        model.sfmp_report["matrices"] |= record["report"]["matrices"]
        model.sfmp_report["refused"] += record["report"]["refused"]
    attach(model, plan, source)
    return [{key: record[key] for key in ("wall_seconds", "cpu_seconds")} for record in records]


def _record(folder, identity):
    """What a piece says about itself, checked."""
    try:
        record = json.loads((folder / _RECORD).read_text("utf-8"))
        made_from = {**record["made_from"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SfmpError(f"{folder}: expected a finished piece, found {type(error).__name__}: {error}; make it again"
                        ) from error
    if wrong := differences(made_from, identity):
        raise SfmpError(f"{folder}: this piece was made from something else: {wrong}. Make it again")
    return record


def _fill(model, file):
    """Replace the tensors of one layer, wherever they are, by those of its file."""
    from safetensors.torch import load_file

    for name, tensor in load_file(file).items():
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        held = module._parameters if key in module._parameters else module._buffers
        device = model.get_input_embeddings().weight.device
        held[key] = (torch.nn.Parameter(tensor.to(device), requires_grad=held[key].requires_grad)
                     if held is module._parameters else tensor.to(device))
        if hasattr(module, "_cache"):
            module._cache = {}


def quantize(job, model, plan, windows, stage=None) -> None:
    """Quantize the model of a notebook in place, or gather what jobs have quantized: the input ``layers``.

    Parameters
    ----------
    job : sfmp.provenance.Run
        Its parameter `model` says what `model` was loaded from.
    model : transformers.PreTrainedModel
    plan : Plan
    windows : int64 [n, seqlen]
    stage : sfmp.cost.Stage, optional
        Is given the seconds of the pieces.
    """
    from sfmp.apply import quantize_model

    if "layers" not in job.inputs:
        quantize_model(model, plan, windows)
        return
    identity = identity_of(job.parameters["model"], model.config, plan.spec, windows, dtype=model.dtype,
                           device=model.device, plan=plan)
    for seconds in gather(model, plan, job.inputs["layers"], identity):
        if stage is not None:
            stage.wall_seconds += seconds["wall_seconds"]
            stage.cpu_seconds += seconds["cpu_seconds"]
    for sentence in model.sfmp_report["refused"]:
        warnings.warn(f"awq: {sentence}", stacklevel=2)
