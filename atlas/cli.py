"""`atlas`: commands on existing runs. A command is a module of `atlas/commands` and a line here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from atlas.commands import evaluate, export, sync, verify_resume
from atlas.config.options import take_option
from atlas.config.secrets import mask_uris
from atlas.errors import EXIT_FAILED, EXIT_INTERRUPTED, AtlasError
from atlas.run import trust
from atlas.system.terminal import ignore_closed_output

COMMANDS: dict[str, ModuleType] = {
    "sync": sync,
    "verify-resume": verify_resume,
    "evaluate": evaluate,
    "export": export,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; what the user can fix is a message, not a traceback."""
    if argv is None:
        ignore_closed_output()
    trusted, rest = take_option(sys.argv[1:] if argv is None else argv, trust.OPTION)
    trust.add_prefixes(trusted)
    args = parser().parse_args(rest)
    try:
        code: int = COMMANDS[args.command].run(args)
        return code
    except AtlasError as error:
        print(mask_uris(f"atlas {args.command}: {error}"), file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with a parser for every command."""
    parser = argparse.ArgumentParser(
        prog="atlas",
        description="Look after Atlas runs. To start or resume one: python train.py.",
        epilog="With any command, --trust PREFIX lets a run that another user owns name modules "
        "under PREFIX (docs/reliability.md).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        module.arguments(commands.add_parser(name, help=module.HELP, description=module.HELP))
    return parser


if __name__ == "__main__":
    sys.exit(main())
