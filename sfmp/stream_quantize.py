"""Quantize a model layer by layer, with one layer in memory and every finished layer on disk.

Three steps, each made of files in a work folder (`sfmp.resume`) that a later run finds and does not make again: a plan,
from the salience of one layer after the other; quantized layers, with the hidden states that go on to the next; the
checkpoint. Its bytes are those of ``quantize_model`` and ``save_checkpoint`` on the model in memory.

Source: METHOD.md sections 1.6, 1.7; section 3, items 7 to 9.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

from sfmp.allocate import BlockProblem, block_problem, solve
from sfmp.apply import Job, warn_of_unknown
from sfmp.awq import SEARCH_TOKENS
from sfmp.checkpoint import describe
from sfmp.checks import write_atomically
from sfmp.compact_salience import load_problem, merged, save_problem
from sfmp.hf import attach, save_tokenizer
from sfmp.linear import SFMPLinear
from sfmp.progress import counter
from sfmp.resume import PLAN, made
from sfmp.salience import SALIENCE_SOURCES, linear_modules
from sfmp.solvers import SOLVERS, Stats
from sfmp.spec import Plan
from sfmp.stream import LayerStream
from sfmp.stream_salience import fisher_by_layer
from sfmp.unfuse import expose_linears, linears_exposed
from sfmp.walk import capture
from sfmp.windows import batches_of, checked_windows, probe_of

STREAMED = ("fisher", "magnitude", "random")  # kinds of salience that can be had layer by layer


def streamed_plan(stream: LayerStream, spec, windows, folder, kind: str = "fisher", progress: bool = False) -> Plan:
    """Return the plan of a model, from salience of which one layer is in memory at a time.

    Parameters
    ----------
    stream : LayerStream
    spec : QuantSpec
    windows : int64 [n, seqlen]
    folder : path
        Work folder.
    kind : one of `STREAMED`
    progress : bool
        Show bars.
    """
    folder = Path(folder)
    path = folder / PLAN
    if path.exists():
        return Plan.load(path)
    files = [folder / f"salience-{index:05d}.safetensors" for index in range(len(stream))]
    done = {index for index, file in enumerate(files) if file.exists()}
    with linears_exposed(stream.model):
        names = list(linear_modules(stream.model, spec.skip))
    inside = {index: [name for name in names if name.startswith(f"{prefix}.")]
              for index, (prefix, _) in enumerate(stream.layers)}
    if kind == "fisher":
        found = fisher_by_layer(stream, windows, folder, skip=spec.skip, done=done, progress=progress)
    else:
        found = _by_layer(stream, spec, kind, inside, done)
    for index, salience in found:
        problem = block_problem(salience, spec, stream.model) if salience else BlockProblem(spec, {}, {}, {}, {})
        save_problem(problem, files[index])
    plan = solve(merged(map(load_problem, files)))
    plan.save(path)
    return plan


def _by_layer(stream, spec, kind, inside, done):
    """Salience that needs no data, of one layer after the other."""
    for index, names in inside.items():
        if index not in done and not names:
            yield index, {}
        elif index not in done:
            others = {name for other in inside for name in inside[other]} - set(names)
            with stream.resident(index):
                yield index, SALIENCE_SOURCES[kind](stream.model, None, spec.seed, skip={*spec.skip, *others})


def quantize_layers(stream: LayerStream, plan: Plan, windows, folder, progress: bool = False) -> None:
    """Quantize one layer after the other and write each to the work folder; begin after those that are there."""
    folder, depth = Path(folder), len(stream)
    first = next((index for index in range(depth) if not layer_file(folder, index).exists()), depth)
    stream.exposed = list(plan)
    warn_of_unknown(stream.model)
    batches = []
    if first < depth and plan.spec.method != "rtn":
        batches = calibration_batches(stream, windows, plan.spec.method)
        if first > 0:
            _carry_on(batches, folder, first, stream.device)
    quantize_range(stream, plan, range(first, depth), batches, folder, progress, carry=True)


def quantize_range(stream: LayerStream, plan: Plan, layers: range, batches, folder, progress: bool = False,
                   carry: bool = False) -> dict:
    """Quantize some layers, one after the other, and write each to a folder.

    Parameters
    ----------
    stream : LayerStream
        Its `exposed` are the matrices of the plan.
    plan : Plan
    layers : range
    batches : list of Batch
        As they enter the first of them; none for rtn.
    folder : path
    progress : bool
        Show a bar.
    carry : bool
        Keep the hidden states that go on, so that whoever finds the folder can begin after its last layer.

    Returns
    -------
    dict
        The report of these matrices, as `sfmp.apply.quantize_model` makes it.
    """
    folder, spec = Path(folder), plan.spec
    inside = [[name for name in plan if name.startswith(f"{prefix}.")] for prefix, _ in stream.layers]
    report = {"method": spec.method, "matrices": {}, "refused": []}
    finished = sum(map(len, inside[:layers.start]))
    with counter(finished + sum(len(inside[index]) for index in layers), "quantize", "matrix", progress,
                 finished) as done:
        for index in layers:
            prefix, last = stream.layers[index][0], index == layers[-1]
            warned = len(report["refused"])
            with stream.resident(index) as layer:
                linears = {name: stream.model.get_submodule(name) for name in inside[index]}
                job = Job(stream.model, plan, linears, report, done, SOLVERS[spec.method], Stats)
                if batches:
                    job.one_layer(prefix, layer, batches, index, inside[index], last)
                else:
                    for name in inside[index]:
                        job.replace({name: job.solve(name, linears[name].weight.detach(), None)})
                if batches and carry and not last:
                    _save(_carry_file(folder, index + 1), {str(n): b.hidden for n, b in enumerate(batches)})
                _save_layer(layer_file(folder, index), prefix, layer)
                stream.finish()
                del job, linears  # they hold the layer as it was, beside which the next would be read
            _carry_file(folder, index).unlink(missing_ok=True)
            for sentence in report["refused"][warned:]:
                warnings.warn(f"awq: {sentence}", stacklevel=2)
    return report


def calibration_batches(stream, windows, method):
    """Calibration batches as they enter the first layer, and what else every layer is called with."""
    windows = checked_windows(stream.model, windows, method)
    groups = [probe_of(windows), *batches_of(windows, SEARCH_TOKENS)]
    with stream.running():
        return capture(stream.model, [layer for _, layer in stream.layers], groups)


def _carry_on(batches, folder, first, device):
    """Replace the hidden states by those that an earlier run left for layer `first`."""
    from safetensors.torch import load_file

    hidden = load_file(_carry_file(folder, first))
    for number, batch in enumerate(batches):
        batch.hidden = hidden[str(number)].to(device)


def assemble(stream: LayerStream, plan: Plan, folder, tokenizer, *, origin=None, max_shard_size="5GB") -> None:
    """Write the checkpoint from the layers in the work folder, into `sfmp.resume.made`; one output file in memory.

    Parameters
    ----------
    stream : LayerStream
        Its model becomes that of the checkpoint, on the meta device, and is of no other use afterwards.
    plan : Plan
    folder : path
    tokenizer : transformers tokenizer
    origin, max_shard_size : as in `sfmp.pipeline.quantize_to_folder`
    """
    import shutil

    from transformers.core_model_loading import dot_natural_key

    from sfmp.card import save_model_card

    model, folder = stream.model, Path(folder)
    shutil.rmtree(made(folder), ignore_errors=True)
    entries, where = {}, {}
    for index in range(len(stream)):
        found, names = layer_entries(layer_file(folder, index))
        entries |= found
        where |= dict.fromkeys(names, layer_file(folder, index))
    expose_linears(model, entries)
    put_empty(model, entries)
    attach(model, plan, origin)

    def described(_):
        model.config.quantization_config.modules = {name: entries[name] for name in plan_order}
        # In the order in which a model in memory is cut in files.
        return dict(sorted(model.state_dict().items(), key=lambda item: dot_natural_key(item[0]))), {}

    plan_order = [name for name, module in model.named_modules() if isinstance(module, SFMPLinear)]
    model.hf_quantizer.get_state_dict_and_metadata = described
    # save_pretrained reads what is on the meta device through this, one output file after the other.
    model._hf_hook = SimpleNamespace(weights_map=_Stored(where))
    model.hf_device_map = {"": "disk"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
        model.save_pretrained(made(folder), max_shard_size=max_shard_size)
    save_tokenizer(tokenizer, made(folder))
    save_model_card(None, made(folder))


def put_empty(model, entries) -> None:
    """Put SFMPLinear modules on the meta device in the places of linear layers, by what `layer_entries` says."""
    for name, entry in entries.items():
        sizes = {key: entry[key] for key in ("group_size", "block_rows", "plane_words", "bias")}
        bias = model.get_submodule(name).bias
        kind = None if bias is None else bias.dtype
        model.set_submodule(name, SFMPLinear.empty(*entry["shape"], **sizes, device="meta", dtype=kind))


class _Stored:
    """Tensors of the finished layers by name, read when asked for."""

    def __init__(self, where):
        self.where = where

    def __getitem__(self, name):
        from safetensors import safe_open

        with safe_open(self.where[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        # Large ones stay maps of the file, which take no memory of their own; of a small one more would be mapped.
        return tensor.clone() if tensor.nbytes < 1 << 20 else tensor


def layer_entries(path) -> tuple[dict, list[str]]:
    """Return what config.json says about the packed matrices of a layer file, and the names of all its tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["sfmp_layer"]), list(file.keys())


def layer_file(folder, index) -> Path:
    """Return where a finished layer is kept."""
    return folder / f"layer-{index:05d}.safetensors"


def _carry_file(folder, index):
    return folder / f"carry-{index:05d}.safetensors"


def _save_layer(path, prefix, layer):
    """Write every tensor of a layer, and what config.json will say about its packed matrices."""
    entries = {f"{prefix}.{name}": describe(module.packed) for name, module in layer.named_modules()
               if isinstance(module, SFMPLinear)}
    tensors = {f"{prefix}.{key}": tensor for key, tensor in layer.state_dict().items()}
    _save(path, tensors, {"sfmp_layer": json.dumps(entries)})


def _save(path, tensors, metadata=None):
    from safetensors.torch import save_file

    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

