"""`atlas evaluate`: measure a run's policy on its held-out episodes."""

from __future__ import annotations

import argparse
from pathlib import Path

from atlas.commands.arguments import add_run
from atlas.errors import EXIT_DONE

HELP = "measure a run's policy on its held-out episodes"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run, where to compute, and where to write."""
    add_run(parser)
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="where to compute (default: %(default)s)",
    )
    parser.add_argument(
        "--out", help="folder for evaluation.json and .png (default: the run's directory)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the errors of the policy next to those of baselines without learning."""
    from atlas.policy.evaluate import evaluate, table
    from atlas.run.directory import Run

    found = Run.find(args.run, args.outputs)
    out = Path(args.out) if args.out else None
    print(table(evaluate(found, args.device, out)))
    print(f"\nwritten to {out or found.path}: evaluation.json, evaluation.png")
    return EXIT_DONE
