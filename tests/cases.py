"""Random packed matrices and small quantized models that several test files share."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from sfmp.linear import SFMPLinear
from sfmp.pack import pack
from sfmp.spec import QuantSpec

PLAN = SimpleNamespace(spec=QuantSpec(), hash="0" * 64)  # what attach reads of a plan


def affine_case(seed, rows=40, cols=100, group_size=32, block_rows=16, levels=range(1, 9), bias=False):
    """Arguments of pack(): random codes, float16 scales, integer zeros, permutations."""
    rng = np.random.default_rng(seed)
    row_blocks, groups = -(-rows // block_rows), -(-cols // group_size)
    bits = rng.choice(levels, (row_blocks, groups)).astype(np.uint8)
    top = (1 << bits.astype(np.int64)) - 1
    top = top.repeat(block_rows, axis=0)[:rows].repeat(group_size, axis=1)[:, :cols]
    return {
        "codes": (rng.integers(0, 1 << 16, (rows, cols)) % (top + 1)).astype(np.uint8),
        "scales": rng.uniform(0.001, 0.1, (rows, groups)).astype(np.float16).astype(np.float32),
        "zeros": rng.integers(-20, 40, (rows, groups)).astype(np.float32),
        "bits": bits,
        "group_size": group_size,
        "block_rows": block_rows,
        "row_perm": rng.permutation(rows),
        "col_perm": rng.permutation(cols),
        "bias": rng.normal(size=rows).astype(np.float32) if bias else None,
    }


def packed_case(seed, **options):
    return pack(**affine_case(seed, **options))


def quantize_randomly(model, seed=0, skip=("lm_head",), group_size=32, block_rows=16):
    """Replace every linear layer by random codes of random bit-widths; its scales keep activations tame."""
    names = [name for name, module in model.named_modules()
             if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in skip]
    for number, name in enumerate(names):
        linear = model.get_submodule(name)
        case = affine_case(seed + number, *linear.weight.shape, group_size, block_rows)
        levels = ((1 << case["bits"].astype(int)) - 1).repeat(block_rows, axis=0)[: linear.out_features]
        case["scales"], case["zeros"] = (0.3 / (levels + 1)).astype(np.float32), np.floor(levels / 2)
        if linear.bias is not None:
            linear.bias.data.normal_(generator=torch.Generator().manual_seed(seed))
            case["bias"] = linear.bias
        model.set_submodule(name, SFMPLinear.from_packed(pack(**case)))
    return model
