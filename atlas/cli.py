"""`atlas`: commands on runs that exist. A command is two functions here and a line in COMMANDS."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from atlas.errors import EXIT_DONE, EXIT_FAILED, AtlasError

if TYPE_CHECKING:
    from atlas.run.directory import Run

# What a command needs is imported when it runs: `atlas --help` loads nothing.


class Command(NamedTuple):
    """`arguments` adds to the command's parser; `run` returns the exit code."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def sync_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, and how to send it."""
    run_argument(parser, many=True)
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
    from atlas.run.directory import Run

    runs = [Run.find(reference, args.outputs) for reference in args.runs]
    if len(runs) > 1 and args.follow:
        return follow_pool(runs)
    return max(sync_one(run, args) for run in runs)


def follow_pool(runs: list[Run]) -> int:
    """Be the one shipper of a pool's runs."""
    from atlas.record.report import draw_as_they_end
    from atlas.record.shipping.writer import Writer, step_back

    writer = Writer(None)
    step_back()
    tracked = [run for run in runs if run.read_config()["tracking"]["kind"] != "none"]
    missing = 0
    if tracked:
        from atlas.record.shipping.sync import sync_all

        for shipped in sync_all(tracked, writer):
            missing += bool(shipped.error or shipped.left)
            print(shipped)
    draw_as_they_end([run for run in runs if run not in tracked], writer)
    return EXIT_FAILED if missing else EXIT_DONE


def sync_one(run: Run, args: argparse.Namespace) -> int:
    """Send one run, or follow it."""
    from atlas.record.shipping.writer import Writer, step_back

    writer = Writer(run) if args.follow else None
    if writer and writer.is_parent:
        step_back()
    if run.read_config()["tracking"]["kind"] == "none":
        from atlas.record.report import draw

        print(f"{draw(run)} drawn; tracking is off for this run, nothing is sent")
        return EXIT_DONE
    if writer and writer.is_parent:
        writer.wait_for_first_line()
    from atlas.record.shipping.sync import sync

    shipped = sync(run, args.follow, writer=writer, again=args.all)
    print(f"run {run.id}: {shipped}")
    return EXIT_FAILED if shipped.error or shipped.left else EXIT_DONE


def run_argument(parser: argparse.ArgumentParser, many: bool = False) -> None:
    """The run (or `runs`) that a command is about, as `Run.find` takes it."""
    if many:
        parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's directory, or its id")
    else:
        parser.add_argument("run", metavar="RUN", help="a run's directory, or its id")
    parser.add_argument(
        "--outputs", default="outputs", help="where ids are looked up (default: %(default)s)"
    )


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    """What is run, for how long, and where it is killed."""
    from atlas.commands.verify_resume import arguments

    arguments(parser)


def verify(args: argparse.Namespace) -> int:
    """Prove on one's own model that a killed run ends as if it had not been."""
    from atlas.commands.verify_resume import run

    return run(args)


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, where to compute, and where to write."""
    run_argument(parser)
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="where to compute (default: %(default)s)",
    )
    parser.add_argument(
        "--out", help="folder for evaluation.json and .png (default: the run's directory)"
    )


def evaluate(args: argparse.Namespace) -> int:
    """Measure a run's policy on its held-out episodes, beside what needs no network."""
    from pathlib import Path

    from atlas.policy.evaluate import evaluate, table
    from atlas.run.directory import Run

    run = Run.find(args.run, args.outputs)
    out = Path(args.out) if args.out else None
    print(table(evaluate(run, args.device, out)))
    print(f"\nwritten to {out or run.path}: evaluation.json, evaluation.png")
    return EXIT_DONE


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN, and where to write."""
    run_argument(parser)
    parser.add_argument("--out", required=True, help="a new folder for the policy")


def export(args: argparse.Namespace) -> int:
    """Write a run's policy as a folder of safetensors and JSON."""
    from pathlib import Path

    from atlas.policy.export import write
    from atlas.run.directory import Run

    for file in write(Run.find(args.run, args.outputs), Path(args.out)):
        print(f"{file}  {file.stat().st_size:,} bytes")
    return EXIT_DONE


COMMANDS = {
    "sync": Command("send a run's metrics to MLflow and draw its report", sync_arguments, sync),
    "verify-resume": Command(
        "run a model straight and with a kill, and compare both to the bit",
        verify_arguments,
        verify,
    ),
    "evaluate": Command(
        "measure a run's policy on its held-out episodes", evaluate_arguments, evaluate
    ),
    "export": Command("write a run's policy as safetensors and JSON", export_arguments, export),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; what a person can put right is a message, not a traceback."""
    from atlas.config.options import take_option
    from atlas.run import trust
    from atlas.system.terminal import ignore_closed_output

    parser = argparse.ArgumentParser(
        prog="atlas",
        description="Look after Atlas runs. To start or resume one: python train.py.",
        epilog="With any command, --trust PREFIX lets a run that somebody else owns name modules "
        "under PREFIX (docs/reliability.md).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.arguments(commands.add_parser(name, help=command.help, description=command.help))
    if argv is None:
        ignore_closed_output()
    trusted, rest = take_option(sys.argv[1:] if argv is None else argv, trust.OPTION)
    trust.add_prefixes(trusted)
    args = parser.parse_args(rest)
    try:
        return COMMANDS[args.command].run(args)
    except AtlasError as error:
        from atlas.config.secrets import mask_uris

        print(mask_uris(f"atlas {args.command}: {error}"), file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
