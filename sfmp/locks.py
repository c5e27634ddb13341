"""Recovery from ``kill -9``: release the lock of a dead Snakemake, and end the notebooks it left running.

Snakemake locks a working directory with files that name no process, so after ``kill -9`` it refuses to start
until it is told ``--unlock``. Each run of ours therefore notes who holds the lock; the next one releases a
lock only if its holder ran on this machine and is gone. Anything else is left to Snakemake.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

from sfmp.checks import write_atomically

HOLDERS = Path(".snakemake/holders")
LOCKS = Path(".snakemake/locks")
MARK = "SFMP_WORKFLOW"


def _identity(process) -> str:
    return f"{process.pid}@{process.create_time():.2f}"


def own_mark() -> str:
    """Return the mark that the jobs of this process carry in their environment variable SFMP_WORKFLOW."""
    import psutil

    return _identity(psutil.Process())


def take_lock() -> None:
    """Note that this process works in the directory; called when execution starts."""
    value = {"host": platform.node(), "mark": own_mark(), "pid": os.getpid()}
    write_atomically(
        HOLDERS / f"{os.getpid()}.json", lambda path: path.write_text(json.dumps(value), encoding="utf-8")
    )


def leave_lock() -> None:
    """Remove the note of :func:`take_lock`; called when execution ends, well or badly."""
    (HOLDERS / f"{os.getpid()}.json").unlink(missing_ok=True)


def release_stale_lock() -> str | None:
    """Release the lock of a dead Snakemake in the working directory.

    Returns
    -------
    str or None
        What was done, to be printed; None where there was nothing to do.
    """
    import psutil

    locks = list(LOCKS.glob("*.lock"))
    notes = {path: json.loads(path.read_text(encoding="utf-8")) for path in HOLDERS.glob("*.json")}
    if not locks or not notes:
        return None
    for note in notes.values():
        if note["host"] != platform.node():
            return None
        if psutil.pid_exists(note["pid"]) and _identity(psutil.Process(note["pid"])) == note["mark"]:
            return None
    marks = {note["mark"] for note in notes.values()}
    orphans = [process for process in psutil.process_iter() if _carries(process, marks)]
    for process in orphans:
        process.kill()
    psutil.wait_procs(orphans, timeout=10)
    for path in (*locks, *notes):
        path.unlink(missing_ok=True)
    return "An earlier run here was killed; released its lock" + (
        f" and ended {len(orphans)} processes it had left running." if orphans else "."
    )


def _carries(process, marks: set[str]) -> bool:
    """Whether a process was started by a run with one of these marks; unreadable processes are not ours."""
    import psutil

    try:
        return process.pid != os.getpid() and process.environ().get(MARK) in marks
    except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
