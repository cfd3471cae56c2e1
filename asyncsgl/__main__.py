"""``python -m asyncsgl`` is the command ``asyncsgl``."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
