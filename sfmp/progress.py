"""Progress bars on standard error, or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator


def bar(items: Collection, title: str, unit: str, show: bool):
    """Return `items`, shown as they are taken if `show`."""
    if not show:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=title, unit=unit)


@contextlib.contextmanager
def counter(total: int, title: str, unit: str, show: bool, done: int = 0) -> Iterator:
    """Give a function that counts one more; `done` were counted before."""
    if not show:
        yield lambda: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=title, unit=unit, initial=done) as shown:
        yield shown.update
