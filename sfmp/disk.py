"""A full disk, or a place where nothing may be written, is one clear error and no traceback."""

from __future__ import annotations

import contextlib
import errno
import re
from pathlib import Path

from sfmp.checks import SfmpError

_FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "a full quota", errno.EFBIG: "a file larger than allowed"}
_CLOSED = {errno.EACCES: "no permission", errno.EPERM: "no permission", errno.EROFS: "a read-only file system",
           errno.ENOTDIR: "a file where a folder should be"}


class DiskError(SfmpError):
    """Nothing can be written there any more; what is written is whole."""


@contextlib.contextmanager
def writing_to(folder: Path, advice: str):
    """Turn what the system says of a full or closed disk inside the context into one `DiskError`.

    Parameters
    ----------
    folder : path
        Where files are written; named in the error.
    advice : str
        What to do, the end of the sentence.
    """
    try:
        yield
    except Exception as error:  # also safetensors' own error, which only its text tells from others
        number = error.errno if isinstance(error, OSError) else _number(str(error))
        found = {**_FULL, **_CLOSED}.get(number)
        if found is None or isinstance(error, SfmpError):
            raise
        raise DiskError(f"{folder}: expected room to write, found {found} ({error}); {advice}") from error


def _number(text):
    found = re.search(r"\(os error (\d+)\)", text)
    return int(found.group(1)) if found else None
