"""A stable name: batch scripts in the queue call `python -m launchers.epilog FOLDER`."""

import sys
from pathlib import Path

from launchers.slurm.epilog import main

if __name__ == "__main__":
    main(Path(sys.argv[1]))
