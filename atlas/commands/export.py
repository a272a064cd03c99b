"""`atlas export`: write a run's policy as safetensors and JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from atlas.commands.arguments import add_run
from atlas.errors import EXIT_DONE

HELP = "write a run's policy as safetensors and JSON"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run, and where to write."""
    add_run(parser)
    parser.add_argument("--out", required=True, help="a new folder for the policy")


def run(args: argparse.Namespace) -> int:
    """Write the files, and print their names and sizes."""
    from atlas.policy.export import write
    from atlas.run.directory import Run

    for file in write(Run.find(args.run, args.outputs), Path(args.out)):
        print(f"{file}  {file.stat().st_size:,} bytes")
    return EXIT_DONE
