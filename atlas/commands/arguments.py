"""Arguments that several commands have: the run that a command is about."""

from __future__ import annotations

import argparse

NAMED = "a run's directory, or its id"


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add RUN and --outputs: `Run.find(args.run, args.outputs)` is the run."""
    parser.add_argument("run", metavar="RUN", help=NAMED)
    _add_outputs(parser)


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Add RUN, once or more often, as `args.runs`, and --outputs."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help=NAMED)
    _add_outputs(parser)


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--outputs", default="outputs", help="where ids are looked up (default: %(default)s)"
    )
