"""Brute-force oracles: slow, plain numpy, and sharing no code with the package."""

import itertools

import numpy as np

# Salience, reordering, allocation


def mlp_fisher(weights, biases, inputs, labels):
    """Sum squared per-sample gradients of a two-layer ReLU network under cross-entropy, by hand.

    weights [H, I], [C, H]; biases [H], [C]; inputs [n, I]; labels [n]. Returns the sums for both weights.
    """
    sums = [np.zeros_like(w, dtype=np.float64) for w in weights]
    for x, label in zip(inputs, labels, strict=True):
        hidden = weights[0] @ x + biases[0]
        active = np.where(hidden > 0, hidden, 0)
        logits = weights[1] @ active + biases[1]
        probability = np.exp(logits - logits.max())
        probability /= probability.sum()
        at_logits = probability - (np.arange(len(logits)) == label)
        at_hidden = (weights[1].T @ at_logits) * (hidden > 0)
        sums[0] += np.outer(at_hidden, x) ** 2
        sums[1] += np.outer(at_logits, active) ** 2
    return sums


def block_sums(matrix, row_perm, col_perm, block_rows, group_size):
    """Sum each block of matrix[row_perm][:, col_perm], entry by entry."""
    rows, cols = matrix.shape
    sums = np.zeros((-(-rows // block_rows), -(-cols // group_size)))
    for i in range(rows):
        for j in range(cols):
            sums[i // block_rows, j // group_size] += matrix[row_perm[i], col_perm[j]]
    return sums


def best_losses(losses, weights, levels):
    """Least total loss for every total of code bits that some assignment uses: enumerates them all."""
    best = {}
    for choice in itertools.product(range(len(levels)), repeat=len(weights)):
        bits = sum(levels[c] * int(w) for c, w in zip(choice, weights, strict=True))
        loss = sum(losses[block][c] for block, c in enumerate(choice))
        best[bits] = min(loss, best.get(bits, np.inf))
    return best


def quantile_bits(salience, wbits):
    """Eq. 7 of the paper: the alpha = wbits - floor(wbits) most salient blocks get one bit more."""
    low = int(np.floor(wbits))
    high = int(np.floor((wbits - low) * len(salience) + 1e-9))
    bits = np.full(len(salience), low)
    for _ in range(high):
        left = [(-salience[i], i) for i in range(len(salience)) if bits[i] == low]
        bits[min(left)[1]] = low + 1
    return bits


def quantize_blocks(weight, bits, group_size, block_rows):
    """Reconstruction of a block-mixed affine quantization, one group at a time, in float64 with fp16 parameters.

    Min-max range with an integer zero of any sign; one bit: mean -/+ mean absolute deviation.
    """
    weight = np.asarray(weight, np.float64)
    result = np.empty_like(weight)
    for i in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group_size):
            group = weight[i, start : start + group_size]
            levels = naive_levels(group, int(bits[i // block_rows, start // group_size]))
            nearest = np.abs(group[:, None] - levels[None]).argmin(1)
            result[i, start : start + group_size] = levels[nearest]
    return result


def naive_levels(group, bit):
    """All values a b-bit group can take, as a checkpoint that keeps alpha and beta in fp16 restores them."""
    if bit == 1:
        centre = group.mean()
        alpha, beta = np.float16(np.abs(group - centre).mean()), np.float16(centre)
    else:
        scale = (group.max() - group.min()) / (2**bit - 1)
        scale = 2 * float(np.float16(max(scale, np.abs(group).max() / 512, 2.0**-23) / 2))
        zero = np.round(-group.min() / scale)
        alpha, beta = np.float16(scale / 2), np.float16(scale * ((2**bit - 1) / 2 - zero))
    codes = np.arange(2**bit)
    return float(alpha) * (2 * codes - (2**bit - 1)) + float(beta)


def gptq(weight, gram, tokens, bits, group_size, damping=0.01):
    """Textbook GPTQ in float64: explicit inverse Hessian, one column at a time, bits per (row, group).

    Optimal brain surgeon form: after column j is rounded, its error over [H⁻¹]_jj times row j of H⁻¹ is
    taken from the columns that follow, and column j is eliminated from H⁻¹ (no Cholesky factor anywhere).
    """
    current, restored = np.array(weight, np.float64), np.zeros(weight.shape)
    hessian = np.array(gram, np.float64) * 2.0 / tokens
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1.0
    current[:, dead] = 0.0
    hessian[np.diag_indices_from(hessian)] += damping * np.diag(hessian).mean()
    inverse = np.linalg.inv(hessian)
    for j in range(current.shape[1]):
        if j % group_size == 0:
            group = j // group_size
            span = slice(j, j + group_size)
            levels = [naive_levels(row[span], int(b)) for row, b in zip(current, bits[:, group], strict=True)]
        for i in range(len(current)):
            restored[i, j] = levels[i][np.abs(levels[i] - current[i, j]).argmin()]
        error = (current[:, j] - restored[:, j]) / inverse[j, j]
        current[:, j + 1 :] -= np.outer(error, inverse[j, j + 1 :])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return restored


def plane_words(codes, bits, block_rows, group_size):
    """Planes of permuted codes [N, K] with bits [row_blocks, groups], one word and one bit at a time (DESIGN 4)."""
    rows, cols = codes.shape
    words = []
    for group in range(bits.shape[1]):
        for block in range(bits.shape[0]):
            for word in range(group_size // 32):
                for plane in range(int(bits[block, group])):
                    for row in range(block * block_rows, (block + 1) * block_rows):
                        value = 0
                        for t in range(32):
                            col = group * group_size + 32 * word + t
                            if row < rows and col < cols:
                                value |= ((int(codes[row, col]) >> plane) & 1) << t
                        words.append(value - (1 << 32) if value >> 31 else value)
    return np.array(words, dtype=np.int32)


def stored_weight(planes, alpha, beta, block_bits, row_perm, col_perm, block_rows, group_size):
    """Weight [N, K] in natural order from the stored tensors, float64, one weight at a time."""
    rows, cols = len(row_perm), len(col_perm)
    weight = np.empty((rows, cols))
    starts, total = {}, 0
    for group in range(block_bits.shape[0]):
        for block in range(block_bits.shape[1]):
            starts[group, block] = total
            total += int(block_bits[group, block]) * block_rows * (group_size // 32)
    for row in range(rows):
        block, inner = divmod(row, block_rows)
        for col in range(cols):
            group, place = divmod(col, group_size)
            bits = int(block_bits[group, block])
            signed = 0
            for plane in range(bits):
                word = int(planes[starts[group, block] + ((place // 32) * bits + plane) * block_rows + inner])
                signed += (1 << plane) * (1 if (word >> (place % 32)) & 1 else -1)
            weight[row_perm[row], col_perm[col]] = float(alpha[group, row]) * signed + float(beta[group, row])
    return weight


def perplexity(logits, windows):
    """exp of the mean over windows of the mean −log p of tokens 1… given logits [T, vocabulary] per window."""
    means = []
    for rows, window in zip(logits, windows, strict=True):
        losses = []
        for position in range(len(window) - 1):
            row = [float(v) for v in rows[position]]
            top = max(row)
            losses.append(top + np.log(sum(np.exp(v - top) for v in row)) - row[window[position + 1]])
        means.append(sum(losses) / len(losses))
    return float(np.exp(sum(means) / len(means)))


# LUT-GEMM


def affine_weight(codes, scales, zeros, bits, group_size, block_rows, row_perm, col_perm, **_):
    """W, float64 [N, K] in natural order, as float16 alpha and beta restore it; arguments as for pack()."""
    rows, cols = codes.shape
    weight, magnitude = np.empty((rows, cols)), np.empty((rows, cols))
    for i, j in np.ndindex(rows, cols):
        group = j // group_size
        top = 2.0 ** int(bits[i // block_rows, group]) - 1
        alpha = np.float64(np.float16(scales[i, group] / 2))
        beta = np.float64(np.float16(np.float32(scales[i, group] * (top / 2 - zeros[i, group]))))
        weight[row_perm[i], col_perm[j]] = alpha * (2.0 * codes[i, j] - top) + beta
        magnitude[row_perm[i], col_perm[j]] = abs(alpha) * top
    return weight, magnitude


def table_error(x, magnitude, col_perm, tile_columns, top):
    """Largest error of each product when tables of 4 columns are rounded to integers up to `top`, float64 [M, N].

    The step is shared by `tile_columns` permuted columns; an entry is wrong by half a step, and 2^b - 1 of each of the
    tables are added up. x [M, K] and magnitude |alpha|·(2^b - 1) [N, K] are in natural order.
    """
    error = np.zeros((len(x), len(magnitude)))
    for start in range(0, len(col_perm), tile_columns):
        columns = col_perm[start : start + tile_columns]
        tables = [columns[at : at + 4] for at in range(0, len(columns), 4)]
        for m in range(len(x)):
            step = max(np.abs(x[m, four]).sum() for four in tables) / top
            for four in tables:
                error[m] += step / 2 * magnitude[:, four[0]]
    return error


def tile_code(tile, width, row, column):
    """Code of one weight in the bytes of a tile, uint8 [columns/32, width, 16 rows, 4].

    Byte j of a row's word holds nibble j in its low half and nibble 4 + j in its high half.
    """
    word, nibble, bit = column // 32, column % 32 // 4, column % 4
    return sum((int(tile[word, k, row, nibble % 4]) >> (bit + 4 * (nibble // 4)) & 1) << k for k in range(width))
