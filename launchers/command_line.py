"""The command line of train.py, parsed once: options, overrides, and what Hydra gets of them.

    typed = parse(["optim.lr=1e-3,1e-4", "-m", "--trust", "robots", "seed=1"])
    typed.is_sweep       True
    typed.trusted        ("robots",)
    typed.arguments()    ["-m", "optim.lr=1e-3,1e-4", "seed=1"]

Hydra stops with an error at options that it does not know, and at overrides on both sides of an
option. So Atlas's own options are taken out, and Hydra's are put ahead of the overrides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from atlas.config.options import take_option
from atlas.config.single_file import overrides_of
from atlas.run.trust import OPTION as TRUST

CONFIG_DIR = ("--config-dir", "-cd")
MULTIRUN = ("--multirun", "-m")
# Hydra's options that are followed by a value.
WITH_VALUE = (
    *(*CONFIG_DIR, "--config-name", "-cn", "--config-path", "-cp"),
    *("--package", "-p", "--cfg", "-c", "--info", "-i", "--experimental-rerun"),
)
# torch.distributed.launch adds this option to the command of every rank; RANK and LOCAL_RANK in the
# environment say the same.
LOCAL_RANK = ("--local-rank", "--local_rank")
# A run's id of digits alone, or as 12345e6789, which Hydra takes for a number.
NUMBER = re.compile(r"(?<=[=,])\d+(e\d+)?(?=,|$)")


@dataclass(frozen=True)
class CommandLine:
    """What was typed, sorted by who reads it."""

    options: tuple[str, ...] = ()  # Hydra's, each followed by its value
    overrides: tuple[str, ...] = ()
    trusted: tuple[str, ...] = ()  # prefixes given by --trust
    config_file: str | None = None  # given by --config

    @property
    def is_sweep(self) -> bool:
        """Whether several runs are asked for (-m)."""
        return any(option in MULTIRUN for option in self.options)

    @property
    def config_dir(self) -> str | None:
        """The folder of the user's own configuration, given by --config-dir."""
        values, _ = take_option(self.options, *CONFIG_DIR)
        return values[-1] if values else None

    def sets(self, key: str) -> bool:
        """Return whether an override gives `key` a value."""
        return any(override.startswith(f"{key}=") for override in self.overrides)

    def all_overrides(self) -> list[str]:
        """Return the overrides for Hydra: the values in the --config file, then what was typed."""
        from_file = [] if self.config_file is None else overrides_of(self.config_file)
        return [*from_file, *self.overrides]

    def arguments(self) -> list[str]:
        """Return the arguments for Hydra."""
        return [*self.options, *self.all_overrides()]


def parse(arguments: Sequence[str], takes_file: bool = False) -> CommandLine:
    """Return the command line in `arguments`; with `takes_file` it knows --config FILE."""
    trusted, rest = take_option(arguments, TRUST)
    _, rest = take_option(rest, *LOCAL_RANK)
    files, rest = take_option(rest, "--config") if takes_file else ([], rest)
    options, overrides = _options_and_overrides(rest)
    return CommandLine(
        tuple(options),
        tuple(map(_id_as_text, overrides)),
        tuple(trusted),
        files[-1] if files else None,
    )


def _options_and_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    options: list[str] = []
    overrides: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        options.append(argument)
        if argument in WITH_VALUE and (value := next(remaining, None)) is not None:
            options.append(value)
    return options, overrides


def _id_as_text(override: str) -> str:
    """Quote ids of runs that Hydra would read as numbers."""
    if override.startswith(("resume=", "init_from=")):
        return NUMBER.sub(r"'\g<0>'", override)
    return override
