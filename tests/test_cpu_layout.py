"""Images: every packed byte arrives in its place, whatever the mixture of bits, the shape and the strips."""

import gc
import weakref

import naive
import numpy as np
import pytest
from cases import affine_case, packed_case
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_numba.cpu import arena, layout
from kernels_numba.cpu.records import tile_bytes

SHAPES = {"rows": st.integers(1, 90), "cols": st.integers(1, 600),
          "group_size": st.sampled_from((32, 64, 96, 128, 256)), "block_rows": st.integers(1, 70)}


def _header(image):
    return image[: 8 * layout.HEADER].view(np.int64)


@given(st.integers(0, 1 << 30), st.fixed_dictionaries(SHAPES), st.integers(1, 5))
@settings(max_examples=40)
def test_image_gives_back_codes_scales_and_weight(seed, shape, threads):
    case = affine_case(seed, **shape)
    packed = packed_case(seed, **shape)
    image = layout.make_image(packed, threads)
    codes, levels, alpha, beta = layout.read_image(image)
    rows = _permuted_rows(image, packed)
    real, cols = rows >= 0, shape["cols"]
    assert sorted(rows[real]) == list(range(shape["rows"]))
    assert (codes[real][:, :cols] == case["codes"][rows[real]]).all() and not codes[real][:, cols:].any()
    assert not codes[~real].any() and not alpha[~real].any() and not beta[~real].any()
    groups = np.arange(codes.shape[1]) // shape["group_size"]
    for found, stored in ((alpha, packed.alpha), (beta, packed.beta)):
        np.testing.assert_array_equal(found[real], stored.numpy()[groups[:, None], rows[real]].T)
    bits = case["bits"][rows[real] // shape["block_rows"]][:, groups]
    assert (levels[real] == (1 << bits.astype(int)) - 1).all()
    np.testing.assert_array_equal(layout.dequantize(image), packed.dequantize().numpy())


def _permuted_rows(image, packed):
    """Permuted row of every tile row, −1 for padding."""
    header = _header(image)
    natural = image[header[layout.ROW_MAP] :][: 64 * header[layout.ROW_TILES]].view(np.int32)
    return np.where(natural < 0, -1, np.argsort(packed.row_perm.numpy().astype(int))[natural])


def test_every_byte_of_an_image_has_one_owner():
    packed = packed_case(3, rows=77, cols=500, group_size=64, block_rows=40)
    image = layout.make_image(packed)
    header = _header(image)
    strips = image[header[layout.STRIP_TABLE] :][: 24 * header[layout.STRIPS]].view(np.int64).reshape(-1, 3)
    bits = image[header[layout.BITS] :][: header[layout.STRIPS] * header[layout.COLUMN_TILES]]
    bits = bits.reshape(len(strips), -1).astype(int)
    sizes = (tile_bytes(64, bits) * strips[:, 1:2]).sum(1)
    assert (strips[1:, 2] == strips[:-1, 2] + sizes[:-1]).all() and strips[-1, 2] + sizes[-1] == header[layout.SIZE]
    parts = [8 * layout.HEADER, strips.nbytes, bits.size, 64 * header[layout.ROW_TILES],
             4 * 64 * header[layout.COLUMN_TILES]]
    places = [0, *header[[layout.STRIP_TABLE, layout.BITS, layout.ROW_MAP, layout.COLUMN_MAP]], strips[0, 2]]
    for part, place, following in zip(parts, places[:-1], places[1:], strict=True):
        assert place % 64 == 0 and place + part <= following < place + part + 64
    assert len(image) == header[layout.SIZE] and image.ctypes.data % 64 == 0


def test_bytes_of_a_tile_are_where_the_kernels_read_them():
    case = affine_case(0, rows=16, cols=128, group_size=128, block_rows=16, levels=(5,))
    image = layout.make_image(packed_case(0, rows=16, cols=128, group_size=128, block_rows=16, levels=(5,)))
    header = _header(image)
    tile = image[-tile_bytes(128, 5) : -64].reshape(5, 4, 16, 4)
    assert header[layout.STRIPS] == 1
    for row, column in np.ndindex(16, 128):
        assert naive.tile_code(tile, 5, row, column) == case["codes"][row, column]


def test_strips_stay_in_row_blocks_and_keep_threads_busy():
    packed = packed_case(0, rows=2000, cols=32, group_size=32, block_rows=700)
    for threads in (1, 2, 16, 64):
        image = layout.make_image(packed, threads)
        header = _header(image)
        strips = image[header[layout.STRIP_TABLE] :][: 24 * header[layout.STRIPS]].view(np.int64).reshape(-1, 3)
        blocks = np.repeat([0, 1, 2], [44, 44, 38])
        assert [blocks[first] for first, _, _ in strips] == [blocks[first + count - 1] for first, count, _ in strips]
        assert strips[:, 1].sum() == header[layout.ROW_TILES] == 126 and strips[:, 1].max() <= layout.STRIP_TILES
        assert len(strips) >= min(8 * threads, 126 // 4)


@pytest.mark.parametrize("value", [0, 0x76543210, 0xFFFFFFFF, 0x0F0F1234])
def test_nibbles_come_back(value):
    word = np.array([value], np.uint32)
    mixed = layout.interleave_nibbles(word)
    nibbles = [value >> 4 * i & 15 for i in range(8)]
    assert mixed.view(np.uint8).tolist() == [nibbles[j] | nibbles[4 + j] << 4 for j in range(4)]
    assert layout.separate_nibbles(mixed)[0] == value


def test_pieces_of_memory_are_aligned_apart_and_given_back():
    pieces = [arena.allocate(size) for size in (1, 64, 100_000)]
    for number, piece in enumerate(pieces):
        assert piece.ctypes.data % 64 == 0 and not piece.any()
        piece[:] = number + 1
    assert all((piece == number + 1).all() for number, piece in enumerate(pieces))
    own = arena.mapping(5000)
    assert own.ctypes.data % arena.HUGE_PAGE == 0 and len(own) == 5000
    gone = weakref.ref(own.base)
    del own
    gc.collect()
    assert gone() is None
    large = arena.allocate(arena.CHUNK + 1)
    assert len(large) == arena.CHUNK + 1 and large.ctypes.data % 64 == 0
