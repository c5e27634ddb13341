"""Models of a given size without a download: random weights, and packed matrices of random codes. For timing only.

A packed matrix is made as it is stored, plane by plane: no codes and no dense copy are ever in memory. Whatever time
depends on is as in a real one: shapes, bit-widths per block, permutations of both sides, bytes. What the model says is
noise.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from sfmp.checks import SfmpError, is_skipped
from sfmp.fuse import GROUPS, FusedLinear
from sfmp.grid import BlockGrid
from sfmp.linear import SFMPLinear
from sfmp.packed import PackedMatrix, permutation_dtype
from sfmp.planes import WORD

LEVELS = (2, 3, 4)
WEIGHT_STD = 0.02  # of a dequantized weight, as transformers initializes: activations stay finite in a deep network
SHAPES = {
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
             "tie_word_embeddings": False},
}


def random_packed(rows: int, columns: int, bpw: float, group_size: int = 128, block_rows: int = 512,
                  seed: int = 0, mixed: bool = True) -> PackedMatrix:
    """Return a matrix of random codes in blocks of 2, 3 and 4 bits.

    Parameters
    ----------
    rows, columns : int
        N, K.
    bpw : float
        As in `QuantSpec`: mean code bits + 32/group_size. Met from below, by less than one bit of one block.
    group_size, block_rows : int
    seed : int
    mixed : bool
        Half of the 3-bit blocks become 2 and 4 bits; else a matrix has only the two widths around its mean.

    Returns
    -------
    PackedMatrix
        On the CPU, no bias, both sides permuted at random; weights have a standard deviation of about `WEIGHT_STD`.

    Raises
    ------
    SfmpError
        `bpw` needs less than 2 or more than 4 bits, or the sizes are no grid of blocks.
    """
    rng = np.random.default_rng(seed)
    block_rows = min(block_rows, rows)
    grid = BlockGrid(rows, columns, block_rows, group_size)
    if group_size % WORD:
        raise SfmpError(f"group_size: expected a multiple of {WORD}, found {group_size}; choose e.g. 128")
    bits = _block_bits(grid, bpw - 32 / group_size, rng, mixed)
    alpha, beta = _affine(bits, rows, block_rows, rng)
    permutations = (torch.from_numpy(rng.permutation(size).astype(permutation_dtype(size))) for size in (rows, columns))
    return PackedMatrix(torch.from_numpy(_planes(grid, bits, rng)), alpha, beta, torch.from_numpy(bits), *permutations,
                        None, (rows, columns), group_size, block_rows)


def _block_bits(grid: BlockGrid, mean: float, rng, mixed: bool) -> np.ndarray:
    """Bits of each block, uint8 [groups, row_blocks]: the two widths around the mean, then pairs of 3, 3 → 2, 4."""
    if not LEVELS[0] <= mean <= LEVELS[-1]:
        raise SfmpError(f"bpw: expected {LEVELS[0]} to {LEVELS[-1]} code bits and {32 / grid.group_size:g} for scales, "
                        f"found {mean:g} code bits; choose a bpw between")
    weights = grid.weights.T.ravel()
    low = min(int(mean), LEVELS[-1] - 1)
    bits = np.full(len(weights), low, np.uint8)
    order = rng.permutation(len(weights))
    bits[order[np.cumsum(weights[order]) <= (mean - low) * weights.sum() + 1e-6]] += 1
    if not mixed:
        return bits.reshape(grid.groups, grid.row_blocks)
    whole = rng.permutation(np.flatnonzero((bits == 3) & (weights == weights.max())))
    pairs = len(whole) // 4
    bits[whole[:pairs]], bits[whole[pairs : 2 * pairs]] = 2, 4
    return bits.reshape(grid.groups, grid.row_blocks)


def _affine(bits, rows, block_rows, rng):
    """alpha, beta: float16 [groups, N]; zero is one of the two codes in the middle."""
    levels = (1 << bits.astype(np.int64)).repeat(block_rows, axis=1)[:, :rows]
    scales = WEIGHT_STD * np.sqrt(12 / (levels**2 + 2.0)) * rng.uniform(0.8, 1.2, levels.shape)
    alpha = (scales / 2).astype(np.float16)
    sign = rng.integers(0, 2, levels.shape, dtype=np.int8) * 2 - 1
    return torch.from_numpy(alpha), torch.from_numpy(alpha * sign.astype(np.float16))


def _planes(grid: BlockGrid, bits, rng) -> np.ndarray:
    """Random words, int32 [words], with zeros where a block is beyond the edge of the matrix."""
    group_words, block_rows = grid.group_size // WORD, grid.block_rows
    sizes = bits.astype(np.int64).ravel() * group_words * block_rows
    starts = np.cumsum(sizes) - sizes
    planes = rng.integers(-(1 << 31), 1 << 31, sizes.sum(), dtype=np.int32)
    columns = grid.in_features - (grid.groups - 1) * grid.group_size
    rows = grid.out_features - (grid.row_blocks - 1) * block_rows
    kept = np.clip(columns - WORD * np.arange(group_words), 0, WORD)  # columns of each word of the last group
    mask = ((np.uint64(1) << kept.astype(np.uint64)) - np.uint64(1)).astype(np.uint32).view(np.int32)
    for number in range(len(sizes)):
        group, row_block = divmod(number, grid.row_blocks)
        last_group, last_rows = group == grid.groups - 1, row_block == grid.row_blocks - 1
        if (last_group and columns < grid.group_size) or (last_rows and rows < block_rows):
            block = planes[starts[number] :][: sizes[number]].reshape(group_words, -1, block_rows)
            if last_group:
                block &= mask[:, None, None]
            if last_rows:
                block[..., rows:] = 0
    return planes


def random_network(shape: str | dict, dtype: torch.dtype = torch.float32, seed: int = 0, device="cpu"):
    """Return a causal language model with random weights, made on the spot, in evaluation mode.

    Parameters
    ----------
    shape : str or dict
        A name of `SHAPES`, or arguments of the configuration; "model_type" is the architecture, "llama" if not given.
    dtype : torch.dtype
    seed : int
    device : of the weights; nothing of their size is ever elsewhere
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(shape, str) and shape not in SHAPES:
        raise SfmpError(f"shape: expected one of {', '.join(SHAPES)} or a dict, found {shape!r}; pass the arguments "
                        "of a configuration")
    # No token ends the text, so every generation is as long as it is asked to be.
    config = AutoConfig.for_model(**{"model_type": "llama", "bos_token_id": None, "eos_token_id": None,
                                     **(SHAPES[shape] if isinstance(shape, str) else shape)})
    device = torch.device(device)
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), device:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def quantize_randomly(model: nn.Module, bpw: float, group_size: int = 128, block_rows: int = 512, seed: int = 0,
                      skip=("lm_head",), shared_columns: bool = False) -> nn.Module:
    """Replace every linear layer but `skip` by random codes, in place, matrix by matrix; a bias stays.

    As `quantize_model` does by default, the output layer and the embeddings stay as they are. With `shared_columns`,
    as in `QuantSpec`, matrices that read the same activations have the same column order.
    """
    names = [name for name, module in model.named_modules()
             if isinstance(module, nn.Linear) and not is_skipped(name, skip)]
    orders: dict[tuple, torch.Tensor] = {}
    for number, name in enumerate(names):
        linear, (parent, _, key) = model.get_submodule(name), name.rpartition(".")
        packed = random_packed(*linear.weight.shape, bpw, group_size, block_rows, seed + number)
        group = next((group for group in GROUPS if key in group), None)
        if shared_columns and group:
            packed.col_perm = orders.setdefault((parent, group), packed.col_perm)
        layer = SFMPLinear.from_packed(packed).to(linear.weight.device)
        layer.bias = None if linear.bias is None else linear.bias.detach()
        model.set_submodule(name, layer.train(linear.training))
    return model


def repeat_first_layer(model: nn.Module) -> nn.Module:
    """Make every decoder layer a copy of the first, in memory of its own, with what its products prepare.

    Laying out a matrix for a kernel takes longer than copying the result, and no time depends on its numbers.

    Parameters
    ----------
    model : transformers causal language model
        Its first layer is quantized; changed in place.
    """
    layers = model.base_model.layers
    products = _products(layers[0])
    for product in products:
        with torch.no_grad():
            product(torch.zeros(1, product.in_features, dtype=model.dtype, device=product.planes.device))
    for number in range(1, len(layers)):
        layers[number] = copy.deepcopy(layers[0])
        for module in layers[number].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
        for old, new in zip(products, _products(layers[number]), strict=True):
            # Without what names the tensors it was derived from; what the host knows of a layout never changes.
            kept = {key: value for key, value in old._cache.items() if key not in ("source", "ready", "dequantize")}
            same = [value.structure for value in kept.values() if hasattr(value, "structure")]
            new._cache = copy.deepcopy(kept, {id(structure): structure for structure in same})
    return model


def _products(layer: nn.Module) -> list[SFMPLinear]:
    """What multiplies in a decoder layer: one for several matrices where they are fused."""
    found: dict[int, SFMPLinear] = {}
    for module in layer.modules():
        if isinstance(module, FusedLinear):
            product = module._joint.product(module.backend, module.mode)
            found[id(product)] = product
        elif isinstance(module, SFMPLinear):
            found[id(module)] = module
    return list(found.values())
