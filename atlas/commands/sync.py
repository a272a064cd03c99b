"""`atlas sync`: send what MLflow does not have of a run, and draw its report.

A launcher starts it too, as `atlas sync --follow RUN…`: that process is the shipper of its runs.
"""

from __future__ import annotations

import argparse

from atlas.commands.arguments import add_runs
from atlas.errors import EXIT_DONE, EXIT_FAILED

HELP = "send a run's metrics to MLflow and draw its report"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the runs, and how they are sent."""
    add_runs(parser)
    parser.add_argument("--follow", action="store_true", help="keep syncing until the run ends")
    parser.add_argument(
        "--all",
        action="store_true",
        help="send every line again, for a store that lost some; nothing is stored twice",
    )


def run(args: argparse.Namespace) -> int:
    """Sync the runs, and print what was done for each."""
    from atlas.record.shipping.sync import sync
    from atlas.run.directory import Run

    is_complete = True
    runs = [Run.find(reference, args.outputs) for reference in args.runs]
    for result in sync(runs, follow=args.follow, again=args.all):
        print(result, flush=True)
        is_complete = is_complete and result.is_complete
    return EXIT_DONE if is_complete else EXIT_FAILED
