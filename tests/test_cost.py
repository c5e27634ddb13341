"""Cost records: what a stage adds up to, what is extrapolated, and what is free of clocks."""

import time

import numpy as np
import pytest

from sfmp.cost import CostRecord, Stage


def test_a_stage_entered_twice_adds_up():
    cost = CostRecord()
    for _ in range(2):
        with cost.stage("search", unit="model evaluation") as stage:
            stage.units += 3
            stage.evaluations += 5
            time.sleep(0.02)
    [row] = cost.rows()
    assert (row["stage"], row["unit"], row["units"], row["evaluations"]) == ("search", "model evaluation", 6, 10)
    assert 0.04 <= row["wall_seconds"] < 10


def test_stages_keep_the_order_they_were_entered_in():
    cost = CostRecord()
    for name in ("b", "a", "b"):
        with cost.stage(name):
            pass
    assert [row["stage"] for row in cost.rows()] == ["b", "a"]


def test_extrapolation_is_unit_cost_times_full_units_times_their_size():
    stage = Stage("search", wall_seconds=4.0, units=8, full_units=100, unit_scale=3.0)
    assert stage.full_seconds == pytest.approx(4.0 / 8 * 100 * 3.0)
    assert Stage("plain", wall_seconds=4.0).full_seconds == 4.0


def test_peak_memory_sees_a_large_array_that_is_gone_at_the_end():
    cost = CostRecord()
    with cost.stage("memory"):
        array = np.ones(64 << 20, dtype=np.uint8)
        time.sleep(0.05)  # several samples
        del array
    with cost.stage("nothing"):
        pass
    large, small = (row["peak_bytes"] for row in cost.rows())
    assert large > 48 << 20
    assert small < large


def test_a_failed_stage_is_still_timed():
    cost = CostRecord()
    with pytest.raises(ValueError, match="boom"), cost.stage("search"):
        time.sleep(0.01)
        raise ValueError("boom")
    assert cost.stages["search"].wall_seconds >= 0.01


def test_counts_hold_no_clock():
    cost = CostRecord()
    with cost.stage("search") as stage:
        stage.units = 2
    [row] = cost.counts()
    assert set(row) == {"stage", "evaluations", "unit", "units", "full_units", "unit_scale"}
    assert row["full_units"] == 2  # nothing reduced unless said so
