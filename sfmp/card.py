"""The model card (README.md) written beside a quantized checkpoint, computed from the model alone."""

from __future__ import annotations

import re
from pathlib import Path

from sfmp.checks import SfmpError, write_atomically


def model_card(model) -> str:
    """Return the card: YAML front matter that the Hub reads, what was quantized and how, and how to load it.

    Raises
    ------
    SfmpError
        The model was not quantized by sfmp.
    """
    from sfmp.hf import SFMPConfig, quantized_layers

    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if not isinstance(config, SFMPConfig):
        raise SfmpError("model: expected one quantized by sfmp, found no SFMPConfig; call quantize_model "
                        "first")
    packed = {name: layer.packed for name, layer in quantized_layers(model).items()}
    source = config.source.get("model")
    on_hub = bool(source and re.fullmatch(r"[\w.-]+/[\w.-]+", source))
    weights = {name: p.shape[0] * p.shape[1] for name, p in packed.items()}
    total = sum(weights.values())
    mean = {key: sum(getattr(p, key) * weights[name] for name, p in packed.items()) / total
            for key in ("wbits", "bpw", "bpw_stored")}
    front = ["---", *([f"base_model: {source}"] if on_hub else []), "base_model_relation: quantized",
             "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- sfmp", "- quantized",
             "- mixed-precision", "---"]
    spec = [f"| {key} | {value} |" for key, value in config.spec.items()]
    revision = f" (revision {config.source['revision']})" if config.source.get("revision") else ""
    return "\n".join([
        *front, "", f"# {source or 'A model'}, quantized by SFMP", "",
        f"{len(packed)} matrices with {total} weights of {source or 'an unnamed model'}{revision}, quantized "
        "by search-free fine-grained mixed precision (arXiv 2602.01027).", "",
        "| | bits per weight |", "|---|---|",
        f"| codes | {mean['wbits']:.4f} |", f"| codes, scales and offsets (bpw) | {mean['bpw']:.4f} |",
        f"| all stored bytes of the matrices (bpw_stored) | {mean['bpw_stored']:.4f} |", "",
        "| specification | |", "|---|---|", *spec, f"| plan | `{config.plan_hash}` |", "",
        "| bit-width | share of the weights |", "|---|---|", *_shares(packed.values(), total), "",
        "```python", "import sfmp", "from transformers import AutoModelForCausalLM", "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")', "```", ""])


def save_model_card(model, folder) -> Path:
    """Write the card as README.md into the checkpoint folder, atomically; return its path."""
    text, path = model_card(model), Path(folder) / "README.md"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def _shares(matrices, total):
    counts: dict[int, int] = {}
    for packed in matrices:
        bits, weights = packed.block_bits.cpu().numpy().T, packed.grid.weights
        for width in sorted(set(bits.ravel().tolist())):
            counts[width] = counts.get(width, 0) + int(weights[bits == width].sum())
    return [f"| {width} | {100 * counts[width] / total:.2f} % |" for width in sorted(counts)]
