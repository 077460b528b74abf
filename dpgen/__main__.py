"""`python -m dpgen`, `torchrun -m dpgen`, and the console script `dpgen`."""

from __future__ import annotations

import sys

from dpgen.cli import main as _main


def main() -> None:
    """Ends the process with the command's exit status."""
    sys.exit(_main(sys.argv[1:]))


if __name__ == "__main__":
    main()
