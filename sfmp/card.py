"""The model card (README.md) written beside a quantized checkpoint, computed from the model alone."""

from __future__ import annotations

import re
from pathlib import Path

from sfmp.checks import SfmpError, write_atomically

_SFMP = "search-free fine-grained mixed precision (arXiv 2602.01027)"
_BITSTACK = "BitStack: levels of sign bits times a product of low rank (arXiv 2410.23918)"


def model_card(model) -> str:
    """Return the card: YAML front matter that the Hub reads, what was quantized and how, and how to load it.

    Raises
    ------
    SfmpError
        The model was not quantized by sfmp.
    """
    from sfmp.baselines.bitstack_hf import BitStackConfig
    from sfmp.hf import SFMPConfig

    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(config, SFMPConfig):
        method, tags, how = "SFMP", ("sfmp", "quantized", "mixed-precision"), _SFMP
        weights, tables = _sfmp(model, config)
    elif isinstance(config, BitStackConfig):
        method, tags, how = "BitStack", ("bitstack", "quantized"), _BITSTACK
        weights, tables = _bitstack(model, config)
    else:
        raise SfmpError("model: expected one quantized by sfmp, found no SFMPConfig; call quantize_model "
                        "first")
    source = config.source.get("model")
    on_hub = bool(source and re.fullmatch(r"[\w.-]+/[\w.-]+", source))
    front = ["---", *([f"base_model: {source}"] if on_hub else []), "base_model_relation: quantized",
             "library_name: transformers", "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags),
             "---"]
    revision = f" (revision {config.source['revision']})" if config.source.get("revision") else ""
    return "\n".join([
        *front, "", f"# {source or 'A model'}, quantized by {method}", "",
        f"{len(weights)} matrices with {sum(weights)} weights of {source or 'an unnamed model'}{revision}, "
        f"quantized by {how}.", "", *tables, "",
        "```python", "import sfmp", "from transformers import AutoModelForCausalLM", "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")', "```", ""])


def save_model_card(model, folder) -> Path:
    """Write the card as README.md into the checkpoint folder, atomically; return its path."""
    text, path = model_card(model), Path(folder) / "README.md"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def _sfmp(model, config):
    """Weights of each matrix, and the lines of the tables."""
    from sfmp.hf import quantized_layers

    packed = [layer.packed for layer in quantized_layers(model).values()]
    weights = [p.shape[0] * p.shape[1] for p in packed]
    total = sum(weights)
    mean = {key: sum(getattr(p, key) * count for p, count in zip(packed, weights, strict=True)) / total
            for key in ("wbits", "bpw", "bpw_stored")}
    return weights, [
        "| | bits per weight |", "|---|---|",
        f"| codes | {mean['wbits']:.4f} |", f"| codes, scales and offsets (bpw) | {mean['bpw']:.4f} |",
        f"| all stored bytes of the matrices (bpw_stored) | {mean['bpw_stored']:.4f} |", "",
        "| specification | |", "|---|---|", *(f"| {key} | {value} |" for key, value in config.spec.items()),
        f"| plan | `{config.plan_hash}` |", "",
        "| bit-width | share of the weights |", "|---|---|", *_shares(packed, total)]


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
    counts: dict[int, int] = {}
    for packed in matrices:
        bits, weights = packed.block_bits.cpu().numpy().T, packed.grid.weights
        for width in sorted(set(bits.ravel().tolist())):
            counts[width] = counts.get(width, 0) + int(weights[bits == width].sum())
    return [f"| {width} | {100 * counts[width] / total:.2f} % |" for width in sorted(counts)]
