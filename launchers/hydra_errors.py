"""Errors of a command line as one message that names every wrong override.

Hydra stops at the first override that it cannot compose, and reports it by a traceback or in its own
words. `report_errors` prints instead what is wrong, with key, value and remedy, for all overrides.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from atlas.config.checks import check
from atlas.errors import EXIT_FAILED, EXIT_INTERRUPTED, AtlasError, ConfigError, nearest
from atlas.version import ROOT
from launchers.command_line import CommandLine

MULTIPLIERS = "optim.lr_multipliers"
# Set by users who want a traceback; read before `report_errors` sets it itself.
WANTS_TRACEBACK = "HYDRA_FULL_ERROR" in os.environ


@contextlib.contextmanager
def report_errors(typed: CommandLine | None = None) -> Iterator[None]:
    """Print errors that the user can correct as a message and exit; others keep their traceback.

    `typed` is the command line, as long as it is not composed. After that no error is about a
    single override.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints errors and exits by itself
    try:
        yield
    except KeyboardInterrupt:  # no run has started, so nothing is lost
        raise SystemExit(EXIT_INTERRUPTED) from None
    except Exception as error:
        if WANTS_TRACEBACK or not is_correctable(error):
            raise
        print(f"error: {explain(error, typed or CommandLine())}", file=sys.stderr)
        raise SystemExit(EXIT_FAILED) from None


def is_correctable(error: Exception) -> bool:
    """Return whether the user can correct `error`, so that a message without a traceback is enough."""
    return isinstance(error, AtlasError) or _is_of_file(error) or _is_of_composition(error)


def explain(error: Exception, typed: CommandLine) -> str:
    """Return the message for `error` and for everything else that is wrong with what was `typed`.

    Composition stops at the first wrong override. So that one is left out and the rest is composed
    again, until that succeeds and the configuration can be checked as a whole.
    """
    if isinstance(error, AtlasError):
        return str(error)
    if _is_of_file(error):
        return (
            f"{error.filename}: {error.strerror}; runs are written below outputs/name, which must "
            "be folders that you can write to"
        )
    overrides = [text for text in typed.all_overrides() if text.startswith("~") or "=" in text]
    problems = [describe(error)]
    while (culprit := _culprit(error, overrides)) is not None:
        overrides.remove(culprit)
        try:
            check(_compose(overrides, typed.config_dir))
        except ConfigError as found:
            problems += found.problems
            break
        except Exception as found:
            if not _is_of_composition(found):
                raise
            error = found
            problems.append(describe(error))
        else:
            break
    return str(ConfigError(list(dict.fromkeys(problems))))


def describe(error: Exception) -> str:
    """Return the text for one of Hydra's or OmegaConf's errors: key, value, problem, remedy."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={name} is not an option{nearest(name, error.options)}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        key, parent = str(cause.full_key), cause.parent_node
        if isinstance(parent, DictConfig) and "not in struct" in str(cause):
            known = [str(name) for name in parent]
            remedy = f"to add a key of your own: +{key}=…"
            # With + Hydra would take the dots of a module's path as levels.
            if key.startswith(f"{MULTIPLIERS}."):
                module = key.removeprefix(f"{MULTIPLIERS}.")
                remedy = f"another module of the model: '++{MULTIPLIERS}={{{module}:…}}'"
            near = nearest(key.rpartition(".")[2], known)
            return f"{key} is not a key of the configuration{near} ({remedy})"
        return f"{key}: {first_line(cause)}"
    text = " ".join(str(error).split())
    if isinstance(error, HydraException):
        return text
    return f"the overrides cannot be composed: {text} (is the value of a group not a name?)"


def first_line(error: OmegaConfBaseException) -> str:
    """Return what OmegaConf says, without its remarks on its own types."""
    return str(error.msg or error).strip().splitlines()[0]


def _is_of_composition(error: Exception) -> bool:
    return isinstance(error, HydraException | OmegaConfBaseException) or _is_raised_by_hydra(error)


def _is_raised_by_hydra(error: Exception) -> bool:
    """Return whether `error` was raised in Hydra's code: for `model=3` it is a plain ValueError."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    folder = Path(hydra.__file__).parent
    return trace is not None and folder in Path(trace.tb_frame.f_code.co_filename).parents


def _is_of_file(error: Exception) -> TypeGuard[OSError]:
    """Return whether the system refused a file: a name too long, no permission, a full disk."""
    # Hydra's error on an unknown choice of a group is an OSError too, without these attributes.
    return isinstance(error, OSError) and bool(error.strerror and error.filename)


def _culprit(error: Exception, overrides: list[str]) -> str | None:
    """Return the override that `error` is about, or None."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, OverrideParseException):
        return error.override if error.override in overrides else None
    names = {override: override.partition("=")[0].lstrip("+~") for override in overrides}
    if isinstance(error, MissingConfigException):
        group = str(error.missing_cfg_file).rpartition("/")[0]
        return next((text for text, name in names.items() if name == group), None)
    key = str(getattr(cause, "full_key", "") or "")
    exact = [text for text, name in names.items() if name == key]
    around = [
        text
        for text, name in names.items()
        if key and (key.startswith(f"{name}.") or name.startswith(f"{key}."))
    ]
    return next(iter(exact + around), None)


def _compose(overrides: list[str], config_dir: str | None) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    if config_dir:
        overrides = [*overrides, f"hydra.searchpath=[{Path(config_dir).absolute()}]"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", overrides), resolve=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}
