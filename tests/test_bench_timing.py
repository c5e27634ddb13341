"""Interleaved timing: who is visited, what is counted, what a ratio is."""

import numpy as np
import pytest

from sfmp.bench import timing
from sfmp.bench.timing import Candidate


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(timing, "SWEEP_BYTES", 1 << 12)
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `spend` moves, and seconds of waiting that only `wait` adds."""

    class Clock:
        now = waited = 0.0

        def spend(self, seconds, waited=0.0):
            self.now += seconds
            self.waited += waited

    found = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: found.now)
    monkeypatch.setattr(timing, "waiting", lambda: found.waited)
    return found


def test_every_candidate_is_visited_once_a_round(clock):
    calls = []
    candidates = [Candidate(name, "torch", [lambda name=name: calls.append(name) or clock.spend(1e-5)] * 4, 100)
                  for name in "abc"]
    rows = timing.measure(candidates, rounds=3)
    assert [row["name"] for row in rows] == list("abc")
    assert all(len(row["cold"]) == len(row["warm"]) == 3 for row in rows)
    per_visit = 4 + 1 + timing.REPEATS  # cold, once to load, warm
    assert all(calls.count(name) == 4 + 3 * per_visit for name in "abc")  # 4: before the first round
    assert all(sample == pytest.approx(10) for row in rows for sample in row["cold"] + row["warm"])


def test_order_changes_from_round_to_round(clock):
    calls = []
    candidates = [Candidate(str(i), "torch", [lambda i=i: calls.append(i) or clock.spend(1.0)], 1) for i in range(8)]
    timing.measure(candidates, rounds=2)
    rounds = [calls[8:16], calls[16:24]]
    assert all(sorted(order) == list(range(8)) for order in rounds) and rounds[0] != rounds[1]


def test_one_call_may_do_many_products(clock):
    candidate = Candidate("graph", "onnxruntime", [lambda: clock.spend(1e-3)], 5, per_call=10)
    (row,) = timing.measure([candidate], rounds=2)
    assert row["copies"] == 10 and row["cold"] == [pytest.approx(100)] * 2 and row["warm"] == [None, None]


def test_a_sample_that_waited_is_not_counted(clock):
    waits = iter([0, 0, 0.5] + [0] * 100)
    candidate = Candidate("slow", "torch", [lambda: clock.spend(1.0, next(waits))], 1)
    (row,) = timing.measure([candidate], rounds=3)
    assert row["cold"][0] is not None and row["cold"][1] is None and row["cold"][2] is not None
    assert row["warm"] == [None] * 3, "a pass this long leaves no room for warm samples"


def test_copies_are_more_than_caches_hold():
    assert timing.copies(5_000_000) * 5_000_000 >= timing.COPIES_BYTES
    assert timing.copies(10**12) == 2


def test_medians_and_ratios_leave_out_what_was_not_counted():
    assert timing.median([3, None, 1, 2]) == 2 and timing.median([None]) is None
    assert timing.ratio([10, 30, None, 8], [5, None, 7, 2]) == 3  # 2 and 4
    assert timing.ratio([None], [1]) is None


def test_relative_error():
    assert timing.relative_error([3, 4], [3, 4]) == 0
    assert timing.relative_error(np.array([[3.0, 5.0]]), [3, 4]) == pytest.approx(0.2)
    assert timing.relative_error([np.nan, 4], [3, 4]) is None, "JSON has no NaN"


def test_waiting_is_read_from_the_system_and_never_falls():
    before = timing.waiting()
    assert 0 <= before <= timing.waiting()


def test_scheduling_is_given_back():
    import os

    before = os.sched_getscheduler(0)
    with timing.first_served():
        pass
    assert os.sched_getscheduler(0) == before
