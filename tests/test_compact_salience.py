"""Compact salience in a file: read as written, and refused where it does not fit; plans from it: test_stream.py."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from sfmp.allocate import block_problem
from sfmp.compact_salience import load_problem, merged, save_problem
from sfmp.spec import QuantSpec, SfmpError

SPEC = QuantSpec(bpw=4.0, group_size=32, block_rows=32)


def test_compact_salience_of_another_kind_is_refused(tmp_path):
    salience = {"b": torch.rand(40, 70), "a": torch.rand(8, 33)}
    path = tmp_path / "salience.safetensors"
    problem = block_problem(salience, SPEC)
    save_problem(problem, path)
    again = load_problem(path)
    assert list(again.grids) == ["a", "b"] and again.spec == SPEC
    for key in ("sums", "losses"):
        assert all(np.array_equal(getattr(again, key)[name], getattr(problem, key)[name]) for name in salience)
    for change in ({"group_size": 64, "bpw": 3.5}, {"block_rows": 16}, {"reorder": "rows"}, {"skip": ("a",)}):
        with pytest.raises(SfmpError, match=f"expected {next(iter(change))}="):
            load_problem(path, dataclasses.replace(SPEC, **change))
    with pytest.raises(SfmpError, match="objective"):
        load_problem(path, dataclasses.replace(SPEC, objective="measured"))
    with pytest.raises(SfmpError, match="same specification"):
        merged([problem, block_problem(salience, dataclasses.replace(SPEC, bpw=3.5))])
    with pytest.raises(SfmpError, match="same specification"):
        merged([])
    save_file({"a.sums": np.zeros(3)}, path)
    with pytest.raises(SfmpError, match="format_version 1"):
        load_problem(path)
    path.write_bytes(b"no such file")
    with pytest.raises(SfmpError, match="compute the salience again"):
        load_problem(path)
