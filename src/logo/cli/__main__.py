"""`python -m logo.cli`, for launchers that start modules, such as `torchrun -m`."""

from __future__ import annotations

from logo.cli import main

if __name__ == "__main__":
    main()
