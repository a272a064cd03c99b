"""`atlas`: commands on runs that exist. A command is two functions here and a line in COMMANDS."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from atlas.errors import EXIT_DONE, EXIT_FAILED, AtlasError

# What a command needs is imported when it runs: `atlas --help` loads nothing.


class Command(NamedTuple):
    """`arguments` adds to the command's parser; `run` returns the exit code."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def sync_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, and how to send it."""
    run_argument(parser)
    parser.add_argument(
        "--follow", action="store_true", help="go on for as long as the run is being written"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="send every line again, for a store that lost some; what it has is not doubled",
    )


def sync(args: argparse.Namespace) -> int:
    """Send what MLflow lacks of a run and draw its report; without tracking, draw it only."""
    from atlas import shipper
    from atlas.run import Run

    run = Run.find(args.run, args.outputs)
    writer = shipper.Writer(run) if args.follow else None
    if writer and writer.is_parent:
        shipper.step_back()
    if run.config["tracking"]["kind"] == "none":
        from atlas.report import draw

        print(f"{draw(run)} drawn; tracking is off for this run, nothing is sent")
        return EXIT_DONE
    if writer and writer.is_parent:
        writer.wait_for_first_line()
    from atlas.sync import sync

    shipped = sync(run, args.follow, writer=writer, again=args.all)
    print(f"run {run.id}: {shipped}")
    return EXIT_FAILED if shipped.error or shipped.left else EXIT_DONE


def run_argument(parser: argparse.ArgumentParser) -> None:
    """The run a command is about, as `Run.find` takes it."""
    parser.add_argument("run", metavar="RUN", help="a run's directory, or its id")
    parser.add_argument(
        "--outputs", default="outputs", help="where ids are looked up (default: %(default)s)"
    )


COMMANDS = {
    "sync": Command("send a run's metrics to MLflow and draw its report", sync_arguments, sync),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; what a person can put right is a message, not a traceback."""
    parser = argparse.ArgumentParser(prog="atlas", description="Look after Atlas runs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.arguments(commands.add_parser(name, help=command.help, description=command.help))
    args = parser.parse_args(argv)
    try:
        return COMMANDS[args.command].run(args)
    except AtlasError as error:
        from atlas.shipper import masked

        print(masked(f"atlas {args.command}: {error}"), file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
