"""The model card (README.md) of a quantized checkpoint, from the model or the folder alone; results if given."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sfmp.checks import SfmpError, write_atomically

_HERE = "this folder"
_SFMP = "search-free fine-grained mixed precision (arXiv 2602.01027)"
_BITSTACK = "BitStack: levels of sign bits times a product of low rank (arXiv 2410.23918)"


def model_card(model, results: Sequence[Mapping] = ()) -> str:
    """Return the card: YAML front matter that the Hub reads, what was quantized and how, results, and how to load it.

    Parameters
    ----------
    model : module quantized by this package
    results : sequence of mappings, optional
        See `checked_results`.

    Raises
    ------
    SfmpError
        The model was not quantized by sfmp, or a result is malformed.
    """
    from sfmp.baselines.bitstack_hf import BitStackConfig
    from sfmp.hf import SFMPConfig, quantized_layers

    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(config, SFMPConfig):
        packed = {name: layer.packed for name, layer in quantized_layers(model).items()}
        return _sfmp_card(packed, vars(config), results)
    if isinstance(config, BitStackConfig):
        weights, tables = _bitstack(model, config)
        return _card("BitStack", ("bitstack", "quantized"), _BITSTACK, config.source, weights, tables, results)
    raise SfmpError("model: expected one quantized by sfmp, found no SFMPConfig; call quantize_model first")


def folder_card(folder, results: Sequence[Mapping] = (), repository: str | None = None) -> str:
    """Return the card of a saved checkpoint, read from its small tensors; the model is not loaded.

    `repository` is what to load it from, as the card shows; "this folder" by default.

    Raises SfmpError if the folder is no checkpoint of sfmp, or a result is malformed.
    """
    from sfmp.inspection import read_checkpoint

    checkpoint = read_checkpoint(folder)
    card = _sfmp_card(checkpoint.matrices, checkpoint.config, results)
    return card if repository is None else card.replace(_load(_HERE), _load(repository))


def save_model_card(model, folder, results: Sequence[Mapping] = (), repository: str | None = None) -> Path:
    """Write the card as README.md into the checkpoint folder, atomically; return its path.

    `model` None stands for the checkpoint in the folder, which is then not loaded, and may be in a `repository`.
    """
    text = folder_card(folder, results, repository) if model is None else model_card(model, results)
    path = Path(folder) / "README.md"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def checked_results(results: Sequence[Mapping], where: str = "results") -> list[dict]:
    """Return results after checking them.

    Parameters
    ----------
    results : sequence of mappings
        ``dataset`` (str), ``metric`` (str), ``value`` (finite number), and optionally ``base`` (the value of the
        unquantized model) and ``stderr``. Other keys are kept and not shown.
    where : str
        Named in the error.

    Raises
    ------
    SfmpError
        A row is none such.
    """
    if isinstance(results, str | Mapping) or not isinstance(results, Sequence):
        raise SfmpError(f"{where}: expected a list of results, found {type(results).__name__}; write one object per "
                        "result")
    for number, row in enumerate(results):
        good = isinstance(row, Mapping) and all(isinstance(row.get(key), str) and row[key] for key in
                                                ("dataset", "metric")) and _finite(row.get("value"))
        if not good or not all(row.get(key) is None or _finite(row[key]) for key in ("base", "stderr")):
            raise SfmpError(f"{where}, result {number}: expected dataset and metric (text), a finite value, and base "
                            f"or stderr only as finite numbers, found {row!r}; correct it")
    return [dict(row) for row in results]


def _finite(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _card(method, tags, how, source, weights, tables, results):
    results = [{**row, "dataset": _dataset(row["dataset"])} for row in checked_results(results)]
    name, revision = source.get("model"), source.get("revision")
    on_hub = bool(name and re.fullmatch(r"[\w.-]+/[\w.-]+", name))
    title = f"{name or 'A model'}, quantized by {method}"
    front = ["---", *([f"base_model: {name}"] if on_hub else []), "base_model_relation: quantized",
             "library_name: transformers", "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags),
             *_index(title, results), "---"]
    return "\n".join([
        *front, "", f"# {title}", "",
        f"{len(weights)} matrices with {sum(weights)} weights of {name or 'an unnamed model'}"
        f"{f' (revision {revision})' if revision else ''}, quantized by {how}.", "",
        *_results_table(results), *tables, "",
        "```python", "import sfmp", "from transformers import AutoModelForCausalLM", "", _load(_HERE), "```", ""])


def _load(where):
    return f'model = AutoModelForCausalLM.from_pretrained("{where}")'


def _dataset(name):
    """What a reader elsewhere can make sense of: of a local file only its last component."""
    return name if name.startswith(("python:", "hub:", "dataset:")) else Path(name).name


def _index(title, results):
    """The Hub's ``model-index`` of the results, as lines of YAML."""
    if not results:
        return []
    import yaml

    rows = [{"task": {"type": "text-generation"},
             "dataset": {"name": row["dataset"], "type": _type(row["dataset"])},
             "metrics": [{"type": row["metric"], "value": float(row["value"])}]} for row in results]
    entry = {"model-index": [{"name": title, "results": rows}]}
    return yaml.safe_dump(entry, sort_keys=False, allow_unicode=True).splitlines()


def _type(dataset):
    """Identifier of a data set: of the Hub's its name there."""
    return dataset.removeprefix("hub:").removeprefix("dataset:").split(":")[0]


def _results_table(results):
    if not results:
        return []
    based = any(row.get("base") is not None for row in results)
    lines = ["| dataset | metric | value |" + (" unquantized |" if based else ""), "|---|---|---|" + "---|" * based]
    for row in results:
        error = f" ± {row['stderr']:.4f}" if row.get("stderr") is not None else ""
        base = "" if row.get("base") is None else f"{row['base']:.4f}"
        lines.append(f"| {row['dataset']} | {row['metric']} | {row['value']:.4f}{error} |" + f" {base} |" * based)
    return [*lines, ""]


def _sfmp_card(matrices, config, results):
    """The card of PackedMatrix or StoredMatrix by name, and the fields of SFMPConfig."""
    sizes = {name: matrix.shape[0] * matrix.shape[1] for name, matrix in matrices.items()}
    total = sum(sizes.values())
    mean = {key: sum(getattr(matrices[name], key) * size for name, size in sizes.items()) / total
            for key in ("wbits", "bpw", "bpw_stored")}
    tables = [
        "| | bits per weight |", "|---|---|",
        f"| codes | {mean['wbits']:.4f} |", f"| codes, scales and offsets (bpw) | {mean['bpw']:.4f} |",
        f"| all stored bytes of the matrices (bpw_stored) | {mean['bpw_stored']:.4f} |", "",
        "| specification | |", "|---|---|", *(f"| {key} | {value} |" for key, value in sorted(config["spec"].items())),
        f"| plan | `{config['plan_hash']}` |", "",
        "| bit-width | share of the weights |", "|---|---|", *_shares(matrices.values(), total), "",
        "Mean code bits by layer and projection:", "", *_plan_summary(matrices)]
    return _card("SFMP", ("sfmp", "quantized", "mixed-precision"), _SFMP, config["source"] or {}, list(sizes.values()),
                 tables, results)


def _plan_summary(matrices):
    from sfmp.layer_bits import bits_by_layer_table, bits_frame

    table = bits_by_layer_table(bits_frame(matrices))
    cells = (["" if math.isnan(value) else f"{value:.2f}" for value in row] for row in table.to_numpy())
    return [f"| layer | {' | '.join(table.columns)} |", "|---" * (1 + len(table.columns)) + "|",
            *(f"| {layer} | {' | '.join(row)} |" for layer, row in zip(table.index, cells, strict=True))]


def _bitstack(model, config):
    """Weights of each matrix, and the lines of the tables."""
    from sfmp.baselines.bitstack_hf import quantized_layers
    from sfmp.baselines.outcome import stored_bytes

    layers = quantized_layers(model).values()
    weights = [layer.out_features * layer.in_features for layer in layers]
    levels = sorted({layer.levels for layer in layers})
    return weights, [
        "| | bits per weight |", "|---|---|",
        f"| all stored bytes of the matrices (bpw) | {8 * sum(stored_bytes(model).values()) / sum(weights):.4f} |", "",
        "| specification | |", "|---|---|",
        *(f"| {key} | {value} |" for key, value in sorted(config.knobs.items())), "",
        "| levels | matrices |", "|---|---|",
        *(f"| {level} | {sum(layer.levels == level for layer in layers)} |" for level in levels)]


def _shares(matrices, total):
    import numpy as np

    counts: dict[int, int] = {}
    for matrix in matrices:
        bits = matrix.block_bits
        bits = (bits.cpu().numpy() if hasattr(bits, "cpu") else np.asarray(bits)).T
        for width in sorted(set(bits.ravel().tolist())):
            counts[width] = counts.get(width, 0) + int(matrix.grid.weights[bits == width].sum())
    return [f"| {width} | {100 * counts[width] / total:.2f} % |" for width in sorted(counts)]
