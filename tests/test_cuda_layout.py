"""Layouts of the CUDA kernels: every bit, alpha and beta lies where a lane reads it, whatever the shape."""

import ast
from pathlib import Path

import numpy as np
import pytest
from cases import affine_case, packed_case
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_numba.gpu import lut_layout, lut_run, mma_layout, segments

SHAPES = {"rows": st.integers(1, 50), "cols": st.integers(1, 600),
          "group_size": st.sampled_from((32, 64, 96, 128, 256, 384)), "block_rows": st.integers(1, 40)}
GPU = Path(lut_layout.__file__).parent


@given(st.integers(0, 1 << 30), st.fixed_dictionaries(SHAPES))
@settings(max_examples=15)
def test_lines_and_records_give_back_every_code_and_scale(seed, shape):
    case, packed = affine_case(seed, **shape), packed_case(seed, **shape)
    layout = lut_layout.make_layout(packed)
    codes, bits, alpha, beta, seen = _read(layout)
    assert (seen == 1).all()
    natural = np.ix_(case["row_perm"], case["col_perm"])
    np.testing.assert_array_equal(codes[natural], case["codes"])
    group = np.arange(shape["cols"]) // shape["group_size"]
    block = np.arange(shape["rows"]) // shape["block_rows"]
    np.testing.assert_array_equal(bits[natural], case["bits"][block][:, group])
    for found, stored in ((alpha, packed.alpha), (beta, packed.beta)):
        np.testing.assert_array_equal(found[natural], stored.numpy().T[:, group])


def _read(layout):
    """codes, bits, alpha, beta, times seen, [N, K] natural order: reads byte after byte, as the lanes of a warp do."""
    rows, columns = layout.shape
    codes, bits, seen = (np.zeros((rows, columns), int) for _ in range(3))
    alpha, beta = (np.zeros((rows, columns), np.float16) for _ in range(2))
    lines, scales = layout.lines.view(np.uint8), layout.scales.view(np.float16)
    held, lanes = 128 // layout.segment, layout.segment // 8
    for block in range(len(layout.block_tiles) - 1):
        first, last = layout.block_strips[block : block + 2]
        for tile in range(layout.block_tiles[block], layout.block_tiles[block + 1]):
            width = layout.tile_bits[tile]
            for strip, lane in np.ndindex(last - first, 32):
                segment = layout.segments[tile * (32 // lanes) + lane // lanes]
                line = layout.tile_line[tile] + strip * width
                own = lines[512 * line :][: 512 * width].reshape(width, 32, 16)[:, lane]  # [plane, row]
                record = ((layout.tile_record[tile] + strip) * 32 + lane) * held
                names = layout.rows[16 * (first + strip) :][:16]
                if segment < 0 or (names < 0).any():
                    assert not own[:, (names < 0) | (segment < 0)].any()
                if segment < 0:
                    assert not scales[2 * record :][: 2 * held].any()
                    continue
                places = layout.columns[segment * layout.segment + lane % lanes * 8 :][:8]
                real, inside = names >= 0, places >= 0
                target = np.ix_(names[real], places[inside])
                planes = own[:, real, None] >> np.arange(8)[inside] & 1  # highest plane first
                codes[target] = sum(plane.astype(int) << width - 1 - k for k, plane in enumerate(planes))
                bits[target] = width
                seen[target] += 1
                for i in range(held):  # a lane holds these rows of its segment: its scales serve all lanes of it
                    name = names[lane % lanes * held + i]
                    if name >= 0:
                        whole = layout.columns[segment * layout.segment :][: layout.segment]
                        alpha[name, whole[whole >= 0]], beta[name, whole[whole >= 0]] = scales[2 * (record + i) :][:2]
    return codes, bits, alpha, beta, seen


def test_a_byte_is_where_the_kernel_loads_it():
    case = affine_case(0, rows=20, cols=256, group_size=128, block_rows=20, levels=(3,))
    layout = lut_layout.make_layout(packed_case(0, rows=20, cols=256, group_size=128, block_rows=20, levels=(3,)))
    lines = layout.lines.view(np.uint8).reshape(2, 3, 32, 16)  # strips, planes, lanes, rows
    for strip, row, column in ((0, 0, 0), (0, 15, 255), (1, 3, 130), (1, 2, 7)):
        bits = [lines[strip, plane, column // 8, row] >> column % 8 & 1 for plane in range(3)]
        assert 4 * bits[0] + 2 * bits[1] + bits[2] == case["codes"][16 * strip + row, column]
    assert layout.lines.nbytes == 2 * 3 * 512 and layout.scales.nbytes == 2 * 128


@pytest.mark.parametrize("segment", segments.SEGMENTS)
def test_held_rows_are_what_halving_leaves(segment):
    """Follow the rows through the exchange between lanes."""
    lanes = segment // 8
    rows = [list(range(16)) for _ in range(32)]
    mask = lanes // 2
    while mask:
        half = len(rows[0]) // 2
        rows = [own[half:] if lane & mask else own[:half] for lane, own in enumerate(rows)]
        mask //= 2
    assert [own[0] for own in rows] == lut_layout.held_row(np.arange(32), segment).tolist()
    assert {len(own) for own in rows} == {128 // segment}


def test_panels_cover_every_strip_once():
    layout = lut_layout.make_layout(packed_case(1, rows=150, cols=32, group_size=32, block_rows=70))
    for strips in (1, 2, 3, 32):
        panels = lut_run.make_panels(layout, strips).reshape(-1, 4)
        covered = [place + first + i for _, first, height, place in panels for i in range(height)]
        assert covered == list(range(len(layout.rows) // 16)) and panels[:, 2].max() <= strips
        assert (layout.block_strips[panels[:, 0]] == panels[:, 3]).all()


def test_shares_follow_tiles_and_processors():
    layout = lut_layout.make_layout(packed_case(1, rows=30, cols=2000, group_size=128, block_rows=30, levels=(2,)))
    assert [lut_run.choose_shares(layout, 1, blocks) for blocks in (1, 3, 8, 100)] == [1, 3, 8, 8]
    assert lut_run.choose_shares(layout, 6, 13) == 3


@pytest.mark.parametrize("ptx,twins", [("ptx.py", "twins.py"), ("ptx_shared.py", "twins_shared.py")])
def test_every_instruction_has_a_twin(ptx, twins):
    names = _names(ptx)
    assert names == _names(twins) and len(names) > 2


def _names(file):
    """Public functions of a module, defined or assigned."""
    body = ast.parse((GPU / file).read_text()).body
    names = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    names |= {name.id for node in body if isinstance(node, ast.Assign) for target in node.targets
              for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("width", range(1, 9))
def test_every_code_of_a_unit_is_where_a_lane_expects_it(width):
    codes = np.random.default_rng(width).integers(0, 1 << width, (2, 32, 128)).astype(np.uint8)
    words = mma_layout.unit_words(codes, width)
    assert words.shape == (2, width, 32, 4) and words.dtype == np.uint32
    for unit, row, column in np.ndindex(codes.shape):
        assert _code(words[unit], width, row, column) == codes[unit, row, column]


def _code(chunks, width, row, column):
    """Find a code by the places that the module's docstring gives."""
    if width > 4:
        return _code(chunks[:4], 4, row, column) + 16 * _code(chunks[4:], width - 4, row, column)
    i, t, odd, h, e = (column >> shift & mask for shift, mask in ((5, 3), (3, 3), (2, 1), (1, 1), (0, 1)))
    rho, lane = row // 8, row % 8 * 4 + t
    own = [int(chunks[n // 4, lane, n % 4]) for n in range(4 * width)]
    if width == 4:
        return own[4 * rho + i] >> 8 * h + 4 * odd + 16 * e & 15
    if width == 3 and i < 3:
        return own[3 * rho + i] >> 8 * h + 4 * odd + 16 * e & 7
    if width == 3:
        return sum((own[3 * rho + k] >> 8 * h + 4 * odd + 16 * e + 3 & 1) << k for k in range(3))
    if width == 2:
        return own[2 * rho + h] >> 2 * (2 * i + odd) + 16 * e & 3
    return own[rho] >> 8 * h + 2 * i + odd + 16 * e & 1


@given(st.integers(0, 1 << 30), st.fixed_dictionaries(SHAPES))
@settings(max_examples=8)
def test_units_and_scales_give_back_every_weight(seed, shape):
    case = affine_case(seed, **shape)
    layout = mma_layout.make_layout(packed_case(seed, **shape))
    rows, columns = layout.shape
    found = np.full((rows, columns), np.nan)
    per_unit = 128 // layout.segment
    place = np.arange(32) % 8 * 4 + np.arange(32) // 8  # of a row among the scales
    for strip, block in enumerate(layout.strip_block):
        first, last = layout.block_tiles[block : block + 2]
        names = layout.rows[32 * strip :][:32]
        table = layout.tiles.reshape(-1, layout.table_tiles)[strip // layout.most_strips]
        assert strip // layout.most_strips == block and not table[last - first :].any()
        for tile, info in enumerate(table[: last - first]):
            width, start = info % 16, layout.strip_chunk[strip] + info // 16
            words = layout.units[128 * start :][: 128 * width].reshape(width, 32, 4)
            for part in range(per_unit):
                segment = layout.segments[(block * layout.table_tiles + tile) * per_unit + part]
                where = layout.columns[segment * layout.segment :][: layout.segment]
                record = layout.strip_record[strip] + tile * per_unit + part
                scales = layout.scales[32 * record :][:32].view(np.float16).reshape(32, 2)[place].astype(float)
                for column in np.flatnonzero(where >= 0):
                    codes = [_code(words, width, row, part * layout.segment + column) for row in range(32)]
                    weights = scales[:, 0] * (2 * np.array(codes) - ((1 << width) - 1)) + scales[:, 1]
                    found[names[names >= 0], where[column]] = weights[names >= 0]
    assert layout.widths == tuple(np.unique(case["bits"]).tolist())
    np.testing.assert_allclose(found, packed_case(seed, **shape).dequantize().numpy(), rtol=1e-6, atol=1e-6)
