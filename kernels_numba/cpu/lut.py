"""Tile kernels: look-ups instead of products, for 1–8 bits and three widths of table entries.

The tables of 4 neighbouring columns hold all 16 signed sums ±x₀ ±x₁ ±x₂ ±x₃. A nibble of a plane is an index into
them, so with W = alpha·Σ_k 2^k(2·plane_k − 1) + beta the product with 16 rows is

    y += alpha · step · Σ_k 2^k Σ_tables entry[nibble of plane k]  +  beta · Σ x

and the zero points need no code of their own, at any number of bits. Look-up, sum over tables, widening and the weight
2^k are two instructions for 64 look-ups where processors have them (`Simd.kernels` "dot"); `lut_lanes` has the integer
modes for others. Modes:

lut8   entries are int8: one vector holds 4 tables
lut16  entries are int16, split into a signed high and an unsigned low byte; int32 sums are exact
exact  entries are float32: one vector is one table

Source: CPU.md section 5 (designs lut8, lut16, fps). One difference: the tables hold ±x, not ±x/2, because the stored
alpha is half the scale.
"""

from __future__ import annotations

import functools

from kernels_numba.cpu import launch
from kernels_numba.cpu.records import WORD_COLUMNS, table_bytes, tile_bytes
from kernels_numba.cpu.simd import BYTES, FLOAT, FLOATS, INTS, VECTOR, Simd


class Kernel:
    """Loop over tiles, and in a tile over words, tables, planes and tokens, so that a table is loaded once a tile.

    A mode says how a word is cut into indices in `steps` steps, which tables a step reads, and how to add up.
    """

    mode: str
    steps: int
    kind = INTS  # of the sums

    def __init__(self, columns, tokens, bits):
        self.columns, self.tokens, self.bits = columns, tokens, bits
        self.words = columns // WORD_COLUMNS

    def write(self, v: Simd, tiles, count, tables, table_step, sums, sum_step):
        self.v, self.table_step = v, table_step
        self.tables = [v.at(tables, v.times(table_step, token)) for token in range(self.tokens)]
        self.kept = {}
        if self.tokens == 1:  # what a register holds for all tiles
            self.kept = {("tail", 0): self.load_tail(0), **(self.load_tables() if v.keeps_tables else {})}
        size = tile_bytes(self.columns, self.bits)
        ahead, locality = launch.prefetch()
        with v.loop(count) as index:
            tile = v.at(tiles, v.times(index, size))
            for line in range(0, size, VECTOR):
                v.prefetch(v.at(tile, ahead + line), locality)
            totals = self.multiply(tile)
            alpha, beta = (v.load_halves(v.at(tile, size - VECTOR + part)) for part in (0, VECTOR // 2))
            for token, total in enumerate(totals):
                step, total_x = self.kept.get(("tail", token)) or self.load_tail(token)
                row = v.at(v.at(sums, v.times(index, VECTOR)), v.times(sum_step, token))
                total = v.fmul(total, step)
                v.store(row, v.fma(alpha, total, v.fma(beta, total_x, v.load(FLOATS, row))))

    def multiply(self, tile):
        """Return the total of each token for a tile, as float32 for 16 rows.

        Where a vector takes many registers, words are a loop: unrolled, the code would be long and store as much.
        """
        totals = [self.start() for _ in range(self.tokens)]
        if self.v.keeps_tables:
            for word in range(self.words):
                self.add_word(totals, tile, word)
        else:
            totals = self.looped(totals, tile)
        return [self.total(parts) for parts in totals]

    def looped(self, totals, tile):
        v, tables = self.v, self.tables
        places = [[[v.stack(VECTOR) for _ in chains] for chains in parts] for parts in totals]

        def pairs():
            return zip(sum(sum(places, []), []), sum(sum(totals, []), []), strict=True)

        for place, value in pairs():
            v.store(place, value)
        with v.loop(self.words) as word:
            totals = [[[v.load(self.kind, place) for place in chains] for chains in parts] for parts in places]
            self.tables = [v.at(table, v.times(word, self.steps * VECTOR)) for table in tables]
            self.add_word(totals, v.at(tile, v.times(word, self.bits * VECTOR)), 0)
            for place, value in pairs():
                v.store(place, value)
        self.tables = tables
        return [[[v.load(self.kind, place) for place in chains] for chains in parts] for parts in places]

    def add_word(self, totals, tile, word):
        v = self.v
        places = [v.at(tile, (word * self.bits + plane) * VECTOR) for plane in range(self.bits)]
        lines = [v.load(BYTES, place) for place in places]
        for step in range(self.steps):
            tables = [self.tables_of(token, word, step) for token in range(self.tokens)]
            for plane, line in enumerate(lines):
                index = self.index(line, step)
                for token in range(self.tokens):
                    self.take(totals[token], step, plane, tables[token], index)

    def table(self, token, index):
        """Vector `index` of the tables of a token."""
        place = self.v.at(self.tables[token], index * VECTOR)
        return self.kept.get(index) or self.v.load(BYTES, place)

    def load_tables(self):
        size = table_bytes(self.columns, self.mode) - VECTOR
        return {index: self.table(0, index) for index in range(size // VECTOR)}

    def load_tail(self, token):
        """(step of the entries, sum of the activations), 16 copies each."""
        tail = self.v.at(self.tables[token], table_bytes(self.columns, self.mode) - VECTOR)
        return [self.v.load_splat(FLOAT, self.v.at(tail, part)) for part in (0, 4)]


class Bytes(Kernel):
    """int8 entries: one instruction looks up, the next sums 4 tables and multiplies by 2^plane.

    One token sums the two halves of a word in chains of their own, to hide the latency of the sum; more tokens are
    chains enough.
    """

    mode = "lut8"
    steps = 2
    parts = 1  # bytes of an entry

    def start(self):
        self.chains = 2 if self.tokens == 1 else 1
        return [[self.v.constant(INTS, 0)] * self.chains for _ in range(self.parts)]

    def index(self, line, step):
        """Byte j of a row's word reads table j of 4: low nibbles first, then the high ones."""
        return self.v.nibbles(line, step, self.v.constant(BYTES, [16 * (byte % 4) for byte in range(VECTOR)]))

    def tables_of(self, token, word, step):
        """The tables of 16 columns: one vector for each byte of an entry."""
        return [self.table(token, 2 * self.words * part + 2 * word + step) for part in range(self.parts)]

    def take(self, parts, step, plane, tables, index):
        chain = step % self.chains
        parts[0][chain] = self.v.add_signed(parts[0][chain], self.v.lookup_bytes(tables[0], index), plane)

    def total(self, parts):
        return self.v.to_floats(functools.reduce(self.v.add, parts[0]))


class Shorts(Bytes):
    """int16 entries as a high and a low byte, which has no sign."""

    mode = "lut16"
    parts = 2

    def take(self, parts, step, plane, tables, index):
        super().take(parts, step, plane, tables, index)
        chain, low = step % self.chains, self.v.lookup_bytes(tables[1], index)
        parts[1][chain] = self.v.add_unsigned(parts[1][chain], low, plane)

    def total(self, parts):
        high, low = (functools.reduce(self.v.add, chains) for chains in parts)
        return self.v.to_floats(self.v.add(self.v.left(high, 8), low))


class Floats(Kernel):
    """float32 entries of step 1: the low 4 bits of each row's word are the index, shifted by a nibble 8 times."""

    mode = "exact"
    steps = 8
    kind = FLOATS
    chains = 2  # the same for any number of tokens: float sums depend on their order

    def load_tables(self):
        return {}  # 32 tables of 128 columns would take every register; they are read from L1

    def start(self):
        return [[self.v.constant(FLOATS, 0.0)] * self.chains]

    def index(self, line, step):
        return self.v.right(self.v.as_ints(line), 4 * step)

    def tables_of(self, token, word, step):
        """Byte j of a word has table j in its low nibble, table 4 + j in its high one."""
        index = 8 * word + 4 * (step % 2) + step // 2
        return self.v.float_table(self.v.at(self.tables[token], index * VECTOR))

    def take(self, parts, step, plane, table, index):
        weight, chain = self.v.constant(FLOATS, float(1 << plane)), step % self.chains
        parts[0][chain] = self.v.fma(weight, self.v.lookup_floats(table, index), parts[0][chain])

    def total(self, parts):
        return functools.reduce(self.v.fadd, parts[0])


KERNELS = {"lut8": Bytes, "lut16": Shorts, "exact": Floats}
