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
def test_image_gives_back_codes_and_scales(seed, shape, threads):
    case = affine_case(seed, **shape)
    packed = packed_case(seed, **shape)
    image = layout.make_image(packed, threads)
    codes, levels, alpha, beta = _read_image(image)
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


def _read_image(image):
    """(codes, levels 2^b − 1, alpha, beta), each [tile rows, columns of tiles]: reads every byte of every tile."""
    header = _header(image)
    columns, tile_columns = int(header[layout.TILE_COLUMNS]), int(header[layout.COLUMN_TILES])
    strips = image[header[layout.STRIP_TABLE] :][: 24 * header[layout.STRIPS]].view(np.int64).reshape(-1, 3)
    bits = image[header[layout.BITS] :][: header[layout.STRIPS] * tile_columns].reshape(-1, tile_columns)
    codes = np.zeros((int(header[layout.ROW_TILES]), 16, tile_columns, columns), np.uint8)
    levels = np.zeros_like(codes)
    alpha, beta = (np.zeros(codes.shape[:3], np.float16) for _ in range(2))
    for (first, count, start), strip_bits in zip(strips.tolist(), bits.tolist(), strict=True):
        for column, width in enumerate(strip_bits):
            size = tile_bytes(columns, width)
            tiles = image[start : start + count * size].reshape(count, size)
            start += count * size
            part = slice(first, first + count)
            words = np.ascontiguousarray(tiles[:, :-64]).view(np.uint32)
            words = _separate_nibbles(words).reshape(count, -1, width, 16).transpose(0, 3, 1, 2)
            planes = np.unpackbits(np.ascontiguousarray(words)[..., None].view(np.uint8), axis=-1, bitorder="little")
            weights = (1 << np.arange(width, dtype=np.uint8))[:, None]
            codes[part, :, column] = (planes * weights).sum(axis=3, dtype=np.uint8).reshape(count, 16, -1)
            levels[part, :, column] = (1 << width) - 1
            alpha[part, :, column], beta[part, :, column] = np.ascontiguousarray(tiles[:, -64:]).view(
                np.float16).reshape(count, 2, 16).swapaxes(0, 1)
    wide = [np.broadcast_to(scale[..., None], codes.shape) for scale in (alpha, beta)]
    return tuple(array.reshape(-1, tile_columns * columns) for array in (codes, levels, *wide))


def _separate_nibbles(words):
    """The inverse of `layout.interleave_nibbles`."""
    return _bytes_to_nibbles(words & 0x0F0F0F0F) | _bytes_to_nibbles(words >> 4 & 0x0F0F0F0F) << 16


def _bytes_to_nibbles(words):
    words = (words | words >> 4) & 0x00FF00FF
    return (words | words >> 8) & 0xFFFF


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
    tile = image[-tile_bytes(128, 5) : -64].reshape(4, 5, 16, 4)
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
        assert len(strips) >= min(4 * threads, 126 // 4)


@pytest.mark.parametrize("value", [0, 0x76543210, 0xFFFFFFFF, 0x0F0F1234])
def test_nibbles_come_back(value):
    word = np.array([value], np.uint32)
    mixed = layout.interleave_nibbles(word)
    nibbles = [value >> 4 * i & 15 for i in range(8)]
    assert mixed.view(np.uint8).tolist() == [nibbles[j] | nibbles[4 + j] << 4 for j in range(4)]
    assert _separate_nibbles(mixed)[0] == value


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
