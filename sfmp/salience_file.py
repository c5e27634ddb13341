"""Salience in a file, and the check that every map passes: float32, at least zero, finite."""

import contextlib
import json
from collections.abc import Mapping

import torch

from sfmp.checks import SfmpError, write_atomically
from sfmp.readers import Salience


def save_salience(salience: Mapping[str, torch.Tensor], path, meta: Mapping | None = None) -> None:
    """Write name -> float32 [N, K], its `readers` if known and JSON-able `meta` to one safetensors file, atomically."""
    from safetensors.numpy import save_file

    tensors = {name: _checked(name, torch.as_tensor(value)).numpy() for name, value in salience.items()}
    # One metadata key only: safetensors writes several in an order that differs from run to run.
    readers = getattr(salience, "readers", None)
    known = {} if readers is None else {"readers": readers}
    record = {"sfmp_salience": json.dumps({"format_version": 1, **(meta or {}), **known}, sort_keys=True)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=record))


def load_salience(path) -> Salience:
    """Read what `save_salience` wrote; raises SfmpError naming a matrix that is negative, NaN or infinite."""
    with _opened(path) as file:
        readers = _record(path, file).get("readers")
        return Salience({name: _checked(f"{path}: {name}", file.get_tensor(name)) for name in file.keys()}, readers)


def salience_meta(path) -> dict:
    """Return the `meta` stored with a salience file."""
    with _opened(path) as file:
        return {key: value for key, value in _record(path, file).items() if key != "readers"}


def _record(path, file):
    record = (file.metadata() or {}).get("sfmp_salience")
    if record is None:
        raise SfmpError(f"{path}: expected a file written by save_salience, found another safetensors file")
    meta = json.loads(record)
    if meta.pop("format_version", None) != 1:
        raise SfmpError(f"{path}: expected salience of format_version 1; compute it again with this version")
    return meta


@contextlib.contextmanager
def _opened(path):
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise SfmpError(f"{path}: expected a file of save_salience, found a damaged one: {error}") from error
    with file as opened:
        yield opened


def _checked(name, value):
    value = value.detach().float().cpu().contiguous()
    if value.ndim != 2 or value.numel() == 0:
        raise SfmpError(f"{name}: expected a salience matrix [N, K], found shape {tuple(value.shape)}")
    low, high = torch.aminmax(value)  # NaN propagates, and no mask as large as the matrix is made
    if not (low >= 0 and high < torch.inf):
        raise SfmpError(f"{name}: expected finite salience >= 0, found {_worst(value)}; "
                        "compute it again with the model in float32 or bfloat16")
    return value


def _worst(value):
    for title, mask in (("NaN", value.isnan()), ("infinite", value.isinf()), ("negative", value < 0)):
        if mask.any():
            return f"{int(mask.sum())} {title} of {value.numel()} values"


def finished(salience: Mapping[str, torch.Tensor], readers=None) -> Salience:
    """Return every matrix as float32 on the CPU; raises SfmpError naming one that is negative or not finite."""
    return Salience({name: _checked(name, value) for name, value in salience.items()}, readers)
