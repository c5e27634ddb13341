"""Provenance: atomic results, the same bytes every time, manifests that can be trusted, code hashes."""

import ast
import hashlib
import json
import os

import numpy as np
import pandas as pd
import pytest

from sfmp import code_hash
from sfmp.provenance import manifest_path, start
from sfmp.spec import SfmpError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begin(out, inputs=None, **parameters):
    return start("02_salience", {"out": out, "inputs": inputs or {}, "tier": "test", **parameters}, seed=3)


def figure():
    from matplotlib.figure import Figure

    drawing = Figure()
    axes = drawing.subplots()
    axes.plot([0, 1], [1, 0], label="line")
    axes.legend()
    return drawing


def test_manifest_names_inputs_outputs_parameters_and_environment(folder):
    (folder / "in.txt").write_text("words")
    run = begin({"table": "r/table.csv"}, {"text": "in.txt", "all": ["in.txt"]}, n_windows=4)
    run.save_csv("table", pd.DataFrame({"x": [0.1]}))
    run.record(tokens=np.int64(7))
    run.finish()
    manifest = json.loads(manifest_path(folder / "r/table.csv").read_text())
    assert manifest["inputs"][0] == {
        "path": "in.txt",
        "sha256": hashlib.sha256(b"words").hexdigest(),
        "bytes": 5,
    }
    written = (folder / "r/table.csv").read_bytes()
    assert manifest["outputs"] == [
        {
            "name": "table",
            "path": "r/table.csv",
            "sha256": hashlib.sha256(written).hexdigest(),
            "bytes": len(written),
        }
    ]
    assert (
        manifest["parameters"]["n_windows"] == 4
        and manifest["seed"] == 3
        and manifest["notes"] == {"tokens": 7}
    )
    assert manifest["versions"]["python"] and manifest["hardware"]["memory_bytes"] > 0
    assert manifest["peak_memory_bytes"] > 10_000_000 and manifest["wall_seconds"] >= 0
    assert set(manifest["code"]) == {"modules", "notebook_sha256", "commit", "dirty"}


def test_results_are_the_same_bytes_on_every_run(folder):
    frame = pd.DataFrame({"run": ["a", "b"], "perplexity": [1 / 3, np.nan]})

    def write_all():
        run = begin({"figure": "f.png", "table": "t.csv", "record": "r.json"})
        run.save_figure("figure", figure(), frame)
        run.save_csv("table", frame)
        run.save_json("record", {"x": np.float64(1 / 3), "missing": float("nan"), "bits": np.arange(3)})
        run.finish()
        names = ("f.png", "f.svg", "f.csv", "t.csv", "r.json")
        return {name: (folder / name).read_bytes() for name in names}

    first = write_all()
    for name in first:
        (folder / name).unlink()
    assert write_all() == first
    assert json.loads(first["r.json"]) == {"x": 1 / 3, "missing": None, "bits": [0, 1, 2]}
    assert pd.read_csv(folder / "t.csv").perplexity[0] == 1 / 3
    assert manifest_path(folder / "f.png").is_file()


def test_failed_writer_leaves_the_old_result_and_no_litter(folder):
    run = begin({"data": "data.bin"})
    run.write("data", lambda path: path.write_bytes(b"old"))

    def broken(path):
        path.write_bytes(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        run.write("data", broken)
    assert (folder / "data.bin").read_bytes() == b"old"
    assert os.listdir(folder) == ["data.bin"]


def test_folder_results_are_replaced_whole(folder):
    run = begin({"model": "model"})
    run.write("model", lambda path: (path.mkdir(), (path / "old.txt").write_text("1")))
    run.write("model", lambda path: (path.mkdir(), (path / "new.txt").write_text("2")))
    run.finish()
    assert [path.name for path in (folder / "model").iterdir()] == ["new.txt"]
    assert manifest_path(folder / "model").is_file()


def test_missing_input_is_named(folder):
    with pytest.raises(SfmpError, match=r"02_salience: inputs .*nowhere\.bin.* do not exist"):
        begin({}, {"windows": "nowhere.bin"})


def test_unknown_input_name_is_named(folder):
    with pytest.raises(SfmpError, match="input 'window' is not among"):
        begin({}).inputs["window"]


def test_unwritten_output_fails_and_stale_manifest_goes(folder):
    manifest_path(folder / "a.csv").write_text("{}")
    run = begin({"a": "a.csv"})
    assert not manifest_path(folder / "a.csv").exists()
    with pytest.raises(SfmpError, match=r"outputs \['a'\] were not written"):
        run.finish()


def test_writer_that_writes_nothing_is_an_error(folder):
    with pytest.raises(SfmpError, match="nothing was written for output 'a'"):
        begin({"a": "a.bin"}).write("a", lambda path: None)


def test_notebook_opened_by_hand_writes_to_scratch(folder, monkeypatch):
    (folder / "Snakefile").touch()
    (folder / "notebooks").mkdir()
    monkeypatch.chdir(folder / "notebooks")
    run = begin({})
    assert run.save_json("record", {}) == folder / "results/scratch/02_salience/record.json"
    run.finish()


def test_seed_governs_numpy(folder):
    begin({})
    first = np.random.rand()
    begin({})
    assert np.random.rand() == first


def test_objects_that_json_cannot_hold_are_refused(folder):
    with pytest.raises(SfmpError, match="cannot store object"):
        begin({}).save_json("record", {"x": object()})


# --- code hash


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A small package `sfmp` of its own: a imports b lazily, b imports c, d stands alone."""
    package = tmp_path / "sfmp"
    package.mkdir()
    (package / "__init__.py").write_text('_PUBLIC = {"work": "a"}\n')
    (package / "a.py").write_text("def work():\n    from sfmp.b import help\n    return help()\n")
    (package / "b.py").write_text("from . import c\n\ndef help():\n    return c.ONE\n")
    (package / "c.py").write_text('"""Doc."""\nONE = 1\n')
    (package / "d.py").write_text("TWO = 2\n")
    monkeypatch.setattr(code_hash, "ROOT", tmp_path)

    def forget():
        for cached in (code_hash._tree, code_hash._public_names, code_hash.module_hash, code_hash.code_hash):
            cached.cache_clear()

    forget()
    yield package, forget
    forget()


def test_closure_follows_lazy_and_relative_imports(repository):
    assert code_hash.closure({"sfmp.a"}) == ["sfmp.a", "sfmp.b", "sfmp.c"]
    names = code_hash.imported_modules(ast.parse("from sfmp import work\nimport sfmp.d, numpy"))
    assert names >= {"sfmp.a", "sfmp.d"} and "numpy" not in names


def test_real_edits_change_the_hash_and_comments_do_not(repository):
    package, forget = repository

    def hash_after(name, text):
        (package / name).write_text(text)
        forget()
        return code_hash.code_hash("sfmp.a")

    before = code_hash.code_hash("sfmp.a")
    assert hash_after("c.py", '"""Other words."""\n\n# why\nONE  =  1\n') == before
    assert hash_after("d.py", "TWO = 3\n") == before
    assert hash_after("c.py", "ONE = 2\n") != before


def test_unknown_module_is_named(repository):
    with pytest.raises(SfmpError, match="sfmp.missing"):
        code_hash.code_hash("sfmp.missing")


def test_broken_notebook_is_named(tmp_path):
    (tmp_path / "x.ipynb").write_text("{}")
    with pytest.raises(SfmpError, match=r"x\.ipynb: expected a Jupyter notebook"):
        code_hash.notebook_hash(tmp_path / "x.ipynb")
