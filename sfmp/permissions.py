"""Who may read a finished checkpoint: safetensors writes files for their owner only, other writers follow the umask."""

from __future__ import annotations

from pathlib import Path


def share_weights(folder) -> None:
    """Give the weight files of a checkpoint folder the permissions of its ``config.json``."""
    folder = Path(folder)
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)
