"""Tables about one quantized checkpoint: does it survive the round trip, what does the look-up product
cost, and is it right.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from sfmp.hf import quantized_layers
from sfmp.pack import pack


def packing_table(model) -> pd.DataFrame:
    """Unpack every matrix and pack it again.

    Returns
    -------
    pandas.DataFrame
        `module, out_features, in_features, wbits, bpw, bpw_stored, bytes, round_trip` (True if every stored
        tensor of the second packing has the same bits as the first).

    Source: DESIGN §4, METHOD §1.9.
    """
    rows = []
    for name, layer in quantized_layers(model).items():
        packed = layer.packed
        codes, scales, zeros = packed.unpack()
        bits = packed.block_bits.T.contiguous()
        shape = {"group_size": packed.group_size, "block_rows": packed.block_rows}
        order = {"row_perm": packed.row_perm, "col_perm": packed.col_perm}
        again = pack(codes, scales, zeros, bits, **shape, **order, bias=packed.bias).tensors()
        same = all(torch.equal(tensor, again[key]) for key, tensor in packed.tensors().items())
        rows.append((name, *packed.shape, packed.wbits, packed.bpw, packed.bpw_stored, packed.nbytes, same))
    columns = ["module", "out_features", "in_features", "wbits", "bpw", "bpw_stored", "bytes", "round_trip"]
    return pd.DataFrame(rows, columns=columns)


def lut_table(
    model, name: str | None = None, widths=(1, 2, 4, 8, 16), tokens: int = 2, seed: int = 0
) -> pd.DataFrame:
    """Run the bit-serial look-up product on one matrix at several table widths.

    Parameters
    ----------
    model : torch.nn.Module
        With SFMPLinear layers.
    name : str, optional
        The layer; the first by default.
    widths : sequence of int
        Activations per table.
    tokens : int
        Rows of x, standard normal from `seed`.

    Returns
    -------
    pandas.DataFrame
        `module, table_width, table_bytes` (one fp16 table), `tables, table_entries, lookups,
        multiplications`, `dense_multiplications`, `build_share` (entries built / look-ups), `error`
        (largest |y − y64| / largest |y64|, y64 = product with the dequantized weight in float64).

    Source: METHOD §1.9, experiment K2.
    """
    from kernels_numba.reference import lut_matmul

    layers = quantized_layers(model)
    name = name or next(iter(layers))
    packed = layers[name].packed
    x = np.random.default_rng(seed).standard_normal((tokens, packed.shape[1])).astype(np.float32)
    exact = x.astype(np.float64) @ packed.dequantize().double().numpy().T
    if packed.bias is not None:
        exact += packed.bias.double().numpy()
    rows = []
    for width in widths:
        y, counts = lut_matmul(x, packed, table_width=width, counts=True)
        error = float(np.abs(y - exact).max() / np.abs(exact).max())
        work = (
            counts.tables,
            counts.table_entries,
            counts.lookups,
            counts.multiplications,
            counts.dense_multiplications,
        )
        rows.append((name, width, 2 * 2**width, *work, counts.table_entries / counts.lookups, error))
    columns = [
        "module",
        "table_width",
        "table_bytes",
        "tables",
        "table_entries",
        "lookups",
        "multiplications",
        "dense_multiplications",
        "build_share",
        "error",
    ]
    return pd.DataFrame(rows, columns=columns)


def integration_table(folder, tokens) -> pd.DataFrame:
    """Load a checkpoint, save it, load it again, and compare; then compare with plain float layers.

    Parameters
    ----------
    folder : path-like
        The checkpoint.
    tokens : int64 tensor [n, seqlen]
        Input of the comparison.

    Returns
    -------
    pandas.DataFrame
        `check, value, passed`: tensors equal and logits equal to the bit after the round trip, and logits
        of SFMPLinear against ``nn.Linear`` with the dequantized weights (largest difference / largest
        logit; passed at 1e-4).
    """
    from transformers import AutoModelForCausalLM

    first = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    with tempfile.TemporaryDirectory() as copy:
        first.save_pretrained(copy)
        second = AutoModelForCausalLM.from_pretrained(Path(copy), dtype="float32").eval()
    mine, yours = first.state_dict(), second.state_dict()
    same = mine.keys() == yours.keys() and all(torch.equal(mine[key], yours[key]) for key in mine)
    with torch.no_grad():
        logits, again = first(input_ids=tokens).logits, second(input_ids=tokens).logits
        dense = _dense(second)(input_ids=tokens).logits
    gap = float((logits - dense).abs().max() / dense.abs().max())
    rows = [
        ("tensors after save and load", float(same), same),
        ("logits after save and load", float((logits - again).abs().max()), torch.equal(logits, again)),
        ("logits against dequantized float layers", gap, gap <= 1e-4),
    ]
    return pd.DataFrame(rows, columns=["check", "value", "passed"])


def _dense(model):
    """Replace every SFMPLinear by an nn.Linear with the dequantized weight, in place."""
    for name, layer in quantized_layers(model).items():
        packed = layer.packed
        linear = torch.nn.Linear(packed.shape[1], packed.shape[0], bias=packed.bias is not None)
        linear.weight.data = packed.dequantize()
        if packed.bias is not None:
            linear.bias.data = packed.bias.float()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    return model
