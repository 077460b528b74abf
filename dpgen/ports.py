"""Forward `python -m dpgen.ports`, which SLURM jobs that are already queued call, to `dpgen.distributed.ports`."""

import sys

from dpgen.distributed.ports import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
