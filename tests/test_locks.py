"""Recovery from kill -9: a dead run's lock is released, any other lock is left alone."""

import json
import os
import subprocess

import pytest

from sfmp import locks


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """A working directory locked by a process that is dead, with one of its jobs still running."""
    monkeypatch.chdir(tmp_path)
    locks.take_lock()
    [note] = locks.HOLDERS.glob("*.json")
    dead = {**json.loads(note.read_text()), "pid": 2**22 + 1, "mark": "4194305@1.00"}
    note.write_text(json.dumps(dead))
    locks.LOCKS.mkdir()
    (locks.LOCKS / "0.input.lock").touch()
    job = subprocess.Popen(["sleep", "60"], env={**os.environ, locks.MARK: dead["mark"]})
    yield note, dead, job
    job.kill()
    job.wait()


def test_lock_of_a_killed_run_is_released_and_its_jobs_ended(locked):
    _, _, job = locked
    message = locks.release_stale_lock()
    assert "killed" in message and "1 processes" in message
    job.wait(5)
    assert not list(locks.LOCKS.iterdir()) and not list(locks.HOLDERS.iterdir())
    assert locks.release_stale_lock() is None


@pytest.mark.parametrize("change", ["alive", "other host", "unknown holder"])
def test_lock_that_may_be_held_is_left_alone(locked, change):
    note, dead, job = locked
    if change == "alive":
        locks.take_lock()
    elif change == "other host":
        note.write_text(json.dumps({**dead, "host": "elsewhere"}))
    else:
        note.unlink()
    assert locks.release_stale_lock() is None
    assert job.poll() is None and list(locks.LOCKS.iterdir())
