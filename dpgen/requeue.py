"""Forward `python -m dpgen.requeue`, which SLURM jobs that are already queued call, to `dpgen.lifecycle.requeue`."""

import os
import sys

from dpgen.lifecycle.requeue import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
