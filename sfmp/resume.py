"""Work that outlives ``kill -9``: a folder beside the output, what it was made from, and one owner at a time.

Every result in the folder is a file that is written elsewhere and renamed, so what is there is whole, and a later run
starts from it. The folder also says what it was made from; a run that would make something else is refused.

Model files are told apart by name, size, time of change and safetensors header, not by their content: reading 140 GB
to start again costs minutes, and whoever changes weights changes the time. A copy of the same model counts as another.

Source: METHOD.md section 3, item 9; DESIGN.md section 7.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from sfmp.checks import SfmpError, write_atomically
from sfmp.disk import writing_to
from sfmp.model_source import check_new
from sfmp.stages import located

_SMALL_FILES, _WEIGHT_FILES = (".json", ".model", ".txt", ".jinja"), (".safetensors", ".bin")
_IDENTITY, _LOCK, _MADE, _COMPLETE, _OLD = "identity.json", "lock", "made", "complete", "old"
PLAN = "plan.safetensors"  # in the work folder; what a run that finds itself finished returns


def fingerprint(source: str, config, spec, windows, **choices) -> dict[str, str]:
    """Return everything that decides the bytes of a checkpoint, as text by title.

    Parameters
    ----------
    source : str
        As `sfmp.model_source.load` takes it.
    config : transformers.PreTrainedConfig
        Of the model.
    spec : QuantSpec
    windows : int64 tensor [n, seqlen]
    choices : other options that matter, by name

    Returns
    -------
    dict of str to str
        Model, specification, calibration, code (syntax trees of every module of the package it reaches), libraries,
        threads (sums of products depend on how many share them), and each of `choices`.

    Notes
    -----
    Not in it is the kind of processor: on another one, or another GPU, sums may round in another way.
    """
    import numpy
    import safetensors
    import torch
    import transformers

    from sfmp import data
    from sfmp.code_hash import code_hash

    versions = {module.__name__: module.__version__ for module in (torch, transformers, numpy, safetensors)}
    return {
        "model": _model_fingerprint(source, config),
        "specification": json.dumps(spec.to_dict(), sort_keys=True),
        "calibration": data.fingerprint(windows),
        "code of sfmp": code_hash("sfmp.stream_quantize"),
        "libraries": " ".join(f"{name} {version}" for name, version in versions.items()),
        "threads": str(torch.get_num_threads()),
        **{name: str(value) for name, value in choices.items()},
    }


def _model_fingerprint(source, config):
    name, _ = located(source)
    folder = Path(name)
    if not folder.is_dir():  # of the Hub, where a commit never changes
        return f"{name} {config._commit_hash}"
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _SMALL_FILES:
            found.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        elif path.suffix in _WEIGHT_FILES:
            state = path.stat()
            found.update(f"{path.name} {state.st_size} {state.st_mtime_ns} {_header(path)}\n".encode())
    return found.hexdigest()


def _header(path):
    """Hash of what a safetensors file says it holds."""
    if path.suffix != ".safetensors":
        return ""
    with path.open("rb") as file:
        return hashlib.sha256(file.read(int.from_bytes(file.read(8), "little"))).hexdigest()


@contextlib.contextmanager
def workplace(out: Path, identity: Mapping[str, str], *, resume: bool,
              overwrite: bool) -> Iterator[tuple[Path, bool]]:
    """Own the work folder of an output; move what was made there to `out` when the body ends well.

    Parameters
    ----------
    out : path
        The finished folder. Work is done in ``.NAME.work`` beside it, and the body leaves its result in the folder
        `made` of that.
    identity : mapping
        What decides the result (`fingerprint`).
    resume : bool
        Continue what an earlier run left; without any, begin.
    overwrite : bool
        Replace a checkpoint in `out`; without `resume`, also discard earlier work.

    Yields
    ------
    (Path, bool)
        The work folder, and whether nothing is left to do: an earlier run was killed when `out` was in its place.

    Raises
    ------
    SfmpError
        Earlier work was made from something else (named), or is there and `resume` is false, or is in use; or nothing
        can be written there: work is kept then.
    """
    folder = work_folder(out)
    if folder.exists() and not resume and not overwrite:
        raise SfmpError(f"{folder}: expected no unfinished work, found some of an earlier run; pass --resume to "
                        "continue it, or remove that folder to begin again")
    with contextlib.ExitStack() as held:
        with writing_to(folder, "choose a place where you may write"):
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context((folder / _LOCK).open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it whatever ends the process
        except OSError as error:
            raise SfmpError(f"{folder}: expected no other run that makes {out}, found one; wait for it or end it"
                            ) from error
        with writing_to(folder, "make room and go on with --resume"):
            begun = resume and (folder / _IDENTITY).exists()
            finished = _prepare(folder, out, identity, resume)
            try:
                yield folder, finished
            except SfmpError:
                if not begun:  # nothing to continue: the same input ends here again
                    _discard(folder)
                raise
            if not finished:
                _move(folder, out, overwrite)
            _discard(folder)


def in_place(out) -> bool:
    """Return whether a run was killed after it had put its result in `out`, before its work folder was gone."""
    out = Path(out)
    folder = work_folder(out)
    return (folder / _COMPLETE).exists() and not made(folder).exists() and out.exists()


def work_folder(out) -> Path:
    """Return where unfinished work on an output folder is kept."""
    out = Path(out)
    return out.with_name(f".{out.name}.work")


def made(folder: Path) -> Path:
    """Return where the result is put together, inside the work folder."""
    return folder / _MADE


def _prepare(folder, out, identity, resume):
    """Leave what this run can use; return whether it has nothing to do."""
    if (folder / _OLD).exists() and not out.exists():
        os.replace(folder / _OLD, out)  # killed between the two renames of `_move`
    if not resume:
        _clear(folder)
    _check_identity(folder, identity)
    for left in folder.glob(".*.tmp"):
        left.unlink()
    if in_place(out):
        return True
    (folder / _COMPLETE).unlink(missing_ok=True)
    return False


def _discard(folder):
    """Remove a work folder. Whatever ends that in between, what is left is known by `in_place`, or nothing needs it."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (_COMPLETE, _IDENTITY, _LOCK, PLAN):
            path.unlink()
    (folder / _COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _clear(folder):
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _check_identity(folder, identity):
    path = folder / _IDENTITY
    if not path.exists():
        _clear(folder)
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(dict(identity), indent=1)))
        return
    if wrong := differences(json.loads(path.read_text("utf-8")), identity):
        raise SfmpError(f"{folder}: cannot resume work that was made from something else: {wrong}. Give what it was "
                        "begun with, or remove that folder to begin again")


def differences(before: Mapping[str, str], identity: Mapping[str, str]) -> str:
    """Return what differs between what something was made from and what it is to be made from; "" if nothing does."""
    differing = [key for key in {**before, **identity} if before.get(key) != identity.get(key)]
    return "; ".join(f"{key}: expected {_short(before.get(key))}, found {_short(identity.get(key))}"
                     for key in differing)


def _short(value):
    return "none" if value is None else value if len(value) <= 200 else f"{value[:200]}…"


def _move(folder, out, overwrite):
    """Put the result in its place; a checkpoint that was there lies in the work folder for an instant."""
    check_new(out, overwrite)
    write_atomically(folder / _COMPLETE, lambda temporary: temporary.write_text(""))
    if out.exists():
        shutil.rmtree(folder / _OLD, ignore_errors=True)
        os.replace(out, folder / _OLD)
    os.replace(made(folder), out)
