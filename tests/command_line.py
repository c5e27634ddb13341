"""The command line in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def command(*arguments, **options):
    """Run ``python -m sfmp`` with its output as text."""
    return subprocess.run([sys.executable, "-m", "sfmp", *map(str, arguments)], capture_output=True, text=True,
                          env=ENVIRONMENT, timeout=300, **options)
