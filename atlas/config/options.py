"""Atlas's own options on a command line whose other arguments belong to another parser."""

from __future__ import annotations

from collections.abc import Sequence


def take_option(arguments: Sequence[str], *names: str) -> tuple[list[str], list[str]]:
    """Return the values of an option with one of `names`, and the arguments without it.

    Both `--name VALUE` and `--name=VALUE` count; a name at the very end has the value "".
    """
    values: list[str] = []
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name not in names:
            rest.append(argument)
        else:
            values.append(value if equals else next(remaining, ""))
    return values, rest
