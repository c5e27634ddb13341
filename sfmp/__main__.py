"""``python -m sfmp``: the same command as ``sfmp``."""

from sfmp.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
