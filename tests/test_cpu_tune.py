"""The launch table: measured, complete, and read back by the products."""

import json

import pytest
import torch

from kernels_numba.cpu import launch, product, targets, tune

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(targets.detect()[0] is None, reason=targets.detect()[1])]
MODES = targets.MODES.get(targets.detect()[0], ())


@pytest.mark.parametrize(("gains", "expected"), [
    ([-4, -2, 2, 9], 24), ([1, 2, 3, 4], 8), ([-9, -9, -9, -9], None), ([-1, -3, 1, 1], 28),
])
def test_crossover_is_where_the_times_meet(gains, expected, monkeypatch):
    """gains: by how much panels are faster at 8, 16, 32 and 64 tokens."""
    answers = iter(gains)
    monkeypatch.setattr(tune, "_least", lambda *functions: (next(answers), 0))
    monkeypatch.setattr(tune, "_tables", lambda *arguments: None)
    monkeypatch.setattr(tune, "_panels", lambda *arguments: None)
    assert tune._crossover("lut8", None, (8, 16, 32, 64)) == expected


@pytest.mark.parametrize(("alone", "expected"), [([1, 1, 9], 3), ([9], 1), ([1, 1, 1], product.RUN_TOKENS)])
def test_singles_end_where_a_shared_pass_is_faster(alone, expected, monkeypatch):
    answers = iter(alone)
    monkeypatch.setattr(tune, "_least", lambda *functions: (next(answers), 5))
    monkeypatch.setattr(tune, "_tables", lambda *arguments: None)
    assert tune._singles("lut16", None) == expected


@pytest.mark.slow
def test_measured_table_drives_the_products(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "BATCHES", (4, 16))
    monkeypatch.setattr(tune, "BITS", (2,))
    monkeypatch.setattr(tune, "COLD", 1 << 16)
    monkeypatch.setattr(tune, "PREFETCHES", [{"bytes": 576, "locality": 3}, {"bytes": 1088, "locality": 2}])
    before = dict(launch.table()["prefetch"])
    path = tmp_path / "launch.json"
    tune.main(["--rows", "128", "--columns", "256", "--output", str(path)])
    table = json.loads(path.read_text())
    assert table["prefetch"] in tune.PREFETCHES
    assert launch.table()["prefetch"] == before, "measuring leaves the table in use alone"
    target = targets.detect()[0]
    assert set(table["targets"]) == {*launch.table()["targets"], target}, "entries of other targets stay"
    assert set(table["targets"][target]["modes"]) == set(MODES)
    assert table["targets"][target]["measured"]["shape"] == [128, 256]
    for functions in (launch.table, launch.least_crossover):
        functions.cache_clear()
    monkeypatch.setattr(launch, "PATH", path)
    chosen = []
    monkeypatch.setattr(product, "through_panels", lambda x, *rest, **options: chosen.append(len(x)) or x)
    monkeypatch.setattr(product, "through_tables", lambda x, *rest: x)
    packed = tune._random(128, 256, 2)
    try:
        for tokens in (1, 4, 16, 17):
            weight = product.weight(packed)
            product._cpu_linear(torch.zeros(tokens, 256), weight.image, None, 128, 128, weight.target, MODES[0])
        assert chosen == [n for n in (1, 4, 16, 17) if n >= (launch.crossover(target, MODES[0], 2) or 99)]
    finally:
        for functions in (launch.table, launch.least_crossover):
            functions.cache_clear()
