"""A configuration that cannot be composed, explained: every wrong override, in one message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from atlas.errors import AtlasError, ConfigError, nearest
from launchers.command_line import CommandLine

MULTIPLIERS = "optim.lr_multipliers"


def explain(
    error: Exception, typed: CommandLine, conf: Path, check: Callable[[dict[str, Any]], None]
) -> str:
    """Words for `error` and for all else that is wrong with the command line.

    Composition stops at the first wrong override; here that one is left out and the rest is
    composed again, until it can be, and then `check`ed.
    """
    if isinstance(error, AtlasError):
        return str(error)
    if is_of_a_file(error):
        return (
            f"{error.filename}: {error.strerror}; runs are written below outputs/name, which have to "
            "be folders that can be written to"
        )
    overrides = [text for text in typed.all_overrides() if text.startswith("~") or "=" in text]
    problems = [words(error)]
    while (culprit := _culprit(error, overrides)) is not None:
        overrides.remove(culprit)
        try:
            check(_compose(conf, overrides, typed.config_dir))
        except ConfigError as found:
            problems += found.problems
            break
        except Exception as found:
            if not isinstance(found, HydraException | OmegaConfBaseException) and not is_hydras(
                found
            ):
                raise
            error = found
            problems.append(words(error))
        else:
            break
    return str(ConfigError(list(dict.fromkeys(problems))))


def words(error: Exception) -> str:
    """One of Hydra's or OmegaConf's errors in words that name key, value and remedy."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={name} is not an option{nearest(name, error.options)}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        key, parent = str(cause.full_key), cause.parent_node
        if isinstance(parent, DictConfig) and "not in struct" in str(cause):
            known = [str(name) for name in parent]
            own = f"to add a key of your own: +{key}=…"
            if key.startswith(f"{MULTIPLIERS}."):  # where + would take a path's dots for levels
                module = key.removeprefix(f"{MULTIPLIERS}.")
                own = f"another module of the model: '++{MULTIPLIERS}={{{module}:…}}'"
            near = nearest(key.rpartition(".")[2], known)
            return f"{key} is not a key of the configuration{near} ({own})"
        return f"{key}: {first_line(cause)}"
    text = " ".join(str(error).split())
    if isinstance(error, HydraException):
        return text
    return f"the overrides cannot be composed: {text} (is a group given what is no name?)"


def first_line(error: OmegaConfBaseException) -> str:
    """What OmegaConf says, less its remarks on its own types."""
    return str(error.msg or error).strip().splitlines()[0]


def is_hydras(error: Exception) -> bool:
    """Whether `error` was raised inside Hydra: `model=3` is a plain ValueError of its."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    folder = Path(hydra.__file__).parent
    return trace is not None and folder in Path(trace.tb_frame.f_code.co_filename).parents


def is_of_a_file(error: Exception) -> TypeGuard[OSError]:
    """Whether the operating system refused a file: a name too long, no permission, a full disk."""
    # One of Hydra's errors, of an option that is not there, is an OSError too.
    return isinstance(error, OSError) and bool(error.strerror and error.filename)


def _culprit(error: Exception, overrides: list[str]) -> str | None:
    """The override that `error` is about."""
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


def _compose(conf: Path, overrides: list[str], config_dir: str | None) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    if config_dir:
        overrides = [*overrides, f"hydra.searchpath=[{Path(config_dir).absolute()}]"]
    with initialize_config_dir(str(conf), version_base="1.3"):
        config = OmegaConf.to_container(compose("config", overrides), resolve=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}
