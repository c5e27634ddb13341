"""The folder beside the output in which a run works: one run at a time, nothing lost wherever it is ended."""

import contextlib
import fcntl
import os
import shutil

import pytest

from sfmp.resume import in_place, workplace
from sfmp.spec import SfmpError


def test_one_run_at_a_time(tmp_path):
    with workplace(tmp_path / "out", {"a": "1"}, resume=False, overwrite=False) as (folder, finished):
        assert not finished
        with (pytest.raises(SfmpError, match="no other run"),
              workplace(tmp_path / "out", {"a": "1"}, resume=True, overwrite=False)):
            pass
        assert folder.exists()
        with (folder / "lock").open() as lock, pytest.raises(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / "made").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _checkpoint(folder, text):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "sfmp"}}')
    (folder / "card").write_text(text)


def test_the_replaced_checkpoint_survives_between_the_renames(tmp_path, monkeypatch):
    out = tmp_path / "out"
    _checkpoint(out, "old")
    rename = os.replace

    def replace(source, target):
        rename(source, target)
        if str(target).endswith("old"):
            raise KeyboardInterrupt  # as if killed here

    monkeypatch.setattr("os.replace", replace)
    with (pytest.raises(KeyboardInterrupt),
          workplace(out, {"a": "1"}, resume=False, overwrite=True) as (folder, _)):
        _checkpoint(folder / "made", "new")
    monkeypatch.undo()
    assert not out.exists()
    with workplace(out, {"a": "1"}, resume=True, overwrite=True) as (folder, finished):
        assert not finished and (out / "card").read_text() == "old"
        shutil.rmtree(folder / "made")
        _checkpoint(folder / "made", "new")
    assert (out / "card").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bad_input_leaves_no_work_but_what_was_there(tmp_path):
    with (pytest.raises(KeyboardInterrupt),
          workplace(tmp_path / "out", {}, resume=False, overwrite=False) as (work, _)):
        (work / "layer").write_text("hours")
        raise KeyboardInterrupt
    with pytest.raises(SfmpError, match="the disk"), workplace(tmp_path / "out", {}, resume=True, overwrite=False):
        raise SfmpError("the disk")
    assert (work / "layer").read_text() == "hours"
    shutil.rmtree(work)
    with (pytest.raises(SfmpError, match="of the body"),
          workplace(tmp_path / "out", {}, resume=False, overwrite=False)):
        raise SfmpError("of the body")
    assert not list(tmp_path.iterdir())


def test_whatever_ends_the_clearing_up_the_run_is_known_to_be_finished(tmp_path, monkeypatch):
    """Killed at each removal of the last step: a later run finds itself finished, and can read the plan."""
    from sfmp.resume import _move as move

    for stop in range(1, 20):
        out, removed = tmp_path / f"out{stop}", []

        def ending(remove, stop=stop, removed=removed):
            def counted(*arguments, **options):
                removed.append(arguments)
                if len(removed) == stop:
                    raise KeyboardInterrupt  # as if killed here
                return remove(*arguments, **options)

            return counted

        def moved(*arguments, ending=ending):
            move(*arguments)
            for kind in ("unlink", "rmdir"):
                patch.setattr(os, kind, ending(getattr(os, kind)))

        with contextlib.suppress(KeyboardInterrupt), monkeypatch.context() as patch:
            patch.setattr("sfmp.resume._move", moved)
            with workplace(out, {"a": "1"}, resume=False, overwrite=False) as (folder, _):
                for name in ("plan.safetensors", "layer-00000.safetensors", "states-00000.safetensors"):
                    (folder / name).write_text(name)
                _checkpoint(folder / "made", "new")
        if not folder.exists():
            break
        assert (out / "card").read_text() == "new"
        if in_place(out):
            with workplace(out, {"a": "1"}, resume=True, overwrite=False) as (folder, finished):
                assert finished and (folder / "plan.safetensors").read_text() == "plan.safetensors"
            assert not folder.exists()
        else:  # only what no run reads any more is left
            assert not {path.name for path in folder.iterdir()} & {"complete", "layer-00000.safetensors"}
    assert stop > 5
