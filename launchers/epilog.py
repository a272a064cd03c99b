"""The entry point of batch scripts, `python -m launchers.epilog RUN/slurm/JOB`: a stable name."""

import sys
from pathlib import Path

from launchers.slurm.epilog import main

if __name__ == "__main__":
    main(Path(sys.argv[1]))
