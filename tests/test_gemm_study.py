"""What notebook 07 counts and shows, against slow counts; the kernels it runs in the simulator; compiled facts."""

import numpy as np
import pytest
import torch

from sfmp import gemm_study, gemm_traffic, gpu_code, plots_gpu
from sfmp.checks import SfmpError


@pytest.fixture(scope="module")
def layout():
    pytest.importorskip("numba.cuda")
    from kernels_numba.gpu.lut_layout import make_layout

    return make_layout(gemm_study.small_matrix())


def test_lanes_read_the_bytes_of_their_columns(layout):
    codes = gemm_study.small_matrix().unpack()[0].numpy().astype(int)
    top = int(layout.tile_bits[0]) - 1
    reads = gemm_study.lane_reads(layout, row=7)
    natural = gemm_study.small_matrix().col_perm.tolist()
    for row in reads.itertuples():
        first = int(row.permuted_columns.split("–")[0])
        assert row.byte == sum((codes[7, first + i] >> top & 1) << i for i in range(8))
        assert row.natural_columns == " ".join(str(natural[first + i]) for i in range(8))
        assert row.bank == row.lane and row.bank_if_shared == row.byte % 32 and row.word == 32 * row.byte + row.lane


def test_private_tables_have_no_conflicts_and_shared_ones_do():
    found = gemm_study.bank_conflicts().set_index("tables")
    private = found.loc["one table a lane, float32"]
    assert (private.passes_mean, private.passes_most, private.shared_bytes) == (1.0, 1, 32 << 10)
    rng, passes = np.random.default_rng(1), []
    for _ in range(3000):  # 32 random bytes: distinct words of the busiest bank
        words = set(rng.integers(0, 256, 32).tolist())
        passes.append(np.bincount([word % 32 for word in words]).max())
    assert found.loc["one table for all lanes, float32", "passes_mean"] == pytest.approx(np.mean(passes), rel=0.02)


@pytest.mark.cudasim
def test_the_simulator_multiplies_and_nothing_is_left_unwritten():
    pytest.importorskip("numba.cuda")
    cases = (("lut", {"width": 8, "shares": 2, "warps": 2}, 1), ("mma", {"warps": 2}, 2))
    found = gemm_study.simulated(3, cases).set_index("kernel")
    assert (found.error < 2**-11).all() and (found.error > 0).all()
    assert found.tokens.to_dict() == {"lut": 1, "mma": 2} and found.launches["lut"] == 2


def test_a_simulator_that_fails_is_told():
    with pytest.raises(SfmpError, match="simulator: expected products"):
        gemm_study.simulated(0, (("no such kernel", {}, 1),))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device_nothing_is_run():
    found = gemm_study.on_device()
    assert found.empty and found.attrs["not_run"] == "no GPU here: not run"


@pytest.fixture(scope="module")
def traffic():
    pytest.importorskip("numba.cuda")
    return gemm_traffic.traffic_table((512, 1024), (2.0, 3.0, 4.0))


def test_bytes_are_those_of_the_arrays(traffic):
    rows, weights = traffic.set_index(["storage", "bits"]), 512 * 1024
    for storage in ("checkpoint", "gpu lut", "gpu mma", "cpu"):
        for bits in (2.0, 3.0, 4.0):
            row = rows.loc[(storage, bits)]
            assert row.planes == weights * bits / 8, "whole tiles: nothing is padded"
            assert row.scales == weights / 128 * 4
            assert row.bytes == row[list(gemm_traffic.MOVED)].sum()
            assert row.bits_per_weight == pytest.approx(8 * row.bytes / weights)
    dense = rows.loc[("float16", 16.0)]
    assert dense.planes == 2 * weights and dense.multiply_adds == weights and dense.of_float16 == 1
    assert (rows.loc["gpu lut"].activations == 2048).all() and (rows.loc["gpu mma"].results == 1024).all()
    assert (rows.metadata[:-1] > 0).all() and (rows.partial_sums["gpu lut"] > 0).all()


def test_work_follows_the_bits(traffic):
    rows, weights = traffic.set_index(["storage", "bits"]), 512 * 1024
    for bits in (2.0, 3.0, 4.0):
        assert rows.lookups["gpu lut", bits] == weights * bits / 8, "a byte is looked up at once"
        assert rows.lookups["cpu", bits] == weights * bits / 4, "a nibble is"
        assert rows.unpacked_codes["gpu mma", bits] == weights
        assert rows.tensor_multiply_adds["gpu mma", bits] == 8 * weights
    tiles, panels = 1024 // 256, 1
    assert (rows.table_bytes["gpu lut"] == tiles * panels * 32 * 256 * 4).all()
    assert (rows.activation_reads["gpu mma"] == 512 // 32 * 1024 * 2).all()


def test_blocks_of_two_widths_cost_what_their_mean_says(traffic):
    found = gemm_traffic.traffic_table((1024, 4096), (2.5,)).set_index("storage")
    assert found.planes["checkpoint"] == 1024 * 4096 * 2.5 / 8
    assert found.planes["checkpoint"] <= found.planes["gpu lut"] < 1.1 * found.planes["checkpoint"]


def test_the_figure_shows_every_storage(traffic):
    left, right = plots_gpu.memory_traffic(traffic).axes
    names = [text.get_text() for text in left.get_yticklabels()]
    assert names == ["checkpoint", "GPU lut", "GPU mma", "CPU", "float16"]
    widths = [bar.get_width() for bar in left.patches[:5]]
    assert widths[-1] == pytest.approx(2 * 512 * 1024 / 1e6) and len(right.get_lines()) == 4


def test_facts_of_compiled_code_or_the_reason_for_none():
    pytest.importorskip("numba.cuda")
    found = gpu_code.facts(((9, 0),), (("lut", 1), ("mma", 1)))
    if found.empty:
        assert found.attrs["skipped"]
        return
    rows = found.set_index(["kernel", "tokens"])
    assert rows.registers.between(16, 255).all() and (rows.loads_128 > 0).all() and (rows.stack_bytes == 0).all()
    assert rows.tensor_steps["lut", 1] == 0 and rows.tensor_steps["mma", 1] > 0


def test_what_is_no_cubin_is_refused():
    with pytest.raises(SfmpError, match="expected an ELF file"):
        gpu_code.resources(b".version 9.0")
