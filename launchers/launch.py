"""From a composed configuration to a submitted run: what `train.py` calls."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from atlas.config.checks import check, not_set
from atlas.config.dotted import flatten
from atlas.errors import EXIT_DONE, EXIT_INTERRUPTED, AtlasError, ConfigError
from atlas.run.directory import Command, Run
from atlas.run.resume import adopt, announce, check_source, keep_effective_batch
from atlas.run.summary import outline, summary
from atlas.run.trust import taken
from atlas.system.terminal import outlive
from atlas.version import ROOT
from launchers import torchrun
from launchers.base import Launcher
from launchers.hydra_errors import explain, first_line, is_hydras, is_of_a_file
from launchers.local.ranks import warm_context

# Hydra's options that are followed by a value; --config is Atlas's own, of atlas/train.py.
WITH_VALUE = (
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"),
    *("--package", "-p", "--cfg", "-c", "--info", "-i", "--experimental-rerun", "--config"),
)
# A run's id of digits alone, or as 12345e6789, which Hydra takes for a number.
NUMBER = re.compile(r"(?<=[=,])\d+(e\d+)?(?=,|$)")
# Set by a person who wants to see where an error comes from.
FULL_ERROR = "HYDRA_FULL_ERROR" in os.environ


def launch(cfg: DictConfig) -> None:
    """Check `cfg`, create its run and hand it to its launcher; exits with the run's exit code."""
    with reported():  # here too, or Hydra adds words of its own to an error
        _launch(cfg)


def _launch(cfg: DictConfig) -> None:
    command = _command()
    config = resolve(cfg)
    if config.get("resume"):
        config = adopt(config, command)
    check(config)
    check_source(config)
    config["outputs"] = str(Path(config["outputs"]).absolute())
    launcher = launcher_of(config)
    launcher.check()
    run = _run_of(config, launcher.world_size)
    if config["dry_run"]:
        describe(run, config, launcher)
        return
    if run.judge_state() == "finished" and not config["fresh"]:
        print(summary(run))
        return
    run.refuse_if_live()  # before it is said to go on
    announce(run, config, launcher.world_size, command)
    launcher.preflight([config])
    if config["fresh"] and (aside := run.move_aside()):
        print(f"moved the run that was there aside: {aside}")
    run.create(config, launcher.world_size, command)
    print(f"run {run.id} in {run.path}", flush=True)
    for handle in launcher.submit([run]):
        if text := handle.describe():
            print(text, flush=True)
        code = EXIT_DONE if launcher.detached else handle.wait()
        if code != EXIT_DONE:
            raise SystemExit(code)


def launcher_of(config: dict[str, Any]) -> Launcher:
    """The launcher that `cluster` describes, or the one that joins torchrun's ranks."""
    if not torchrun.is_torchrun():
        launcher: Launcher = instantiate(config["cluster"])
        return launcher
    torchrun.refuse(config["cluster"]["_target_"], multirun=False)
    cluster = config["cluster"]
    return torchrun.TorchrunLauncher(cluster["device"], cluster.get("sharding"))


def start(main: Callable[[], Any]) -> None:
    """Run the `main` of train.py: alone, or as one of the ranks that torchrun has started."""
    outlive()
    sys.path.append(str(ROOT / "launchers" / "plugins"))  # where Hydra finds the sweeper
    with reported():
        arguments = torchrun.without_launcher_arguments(taken(sys.argv[1:]))
        sys.argv[1:] = ids_as_text(options_first(arguments))
        if not torchrun.is_torchrun():
            if _is_sweep(sys.argv) and not any(a.startswith("cluster=") for a in sys.argv):
                warm_context()  # it imports torch while the sweep is composed
            main()
            return
        torchrun.refuse("launchers.local.", multirun=_is_sweep(sys.argv))
        torchrun.main(main)


def _is_sweep(arguments: Sequence[str]) -> bool:
    return "-m" in arguments or "--multirun" in arguments


def options_first(arguments: Sequence[str]) -> list[str]:
    """`arguments` with Hydra's options ahead of the overrides: it takes no others behind those."""
    options: list[str] = []
    overrides: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        options.append(argument)
        if argument in WITH_VALUE and (value := next(waiting, None)) is not None:
            options.append(value)
    return [*options, *overrides]


def ids_as_text(arguments: Sequence[str]) -> list[str]:
    """`arguments` with quotes around ids of runs that would be read as numbers."""
    return [
        NUMBER.sub(r"'\g<0>'", argument)
        if argument.startswith(("resume=", "init_from="))
        else argument
        for argument in arguments
    ]


def describe(run: Run, config: dict[str, Any], launcher: Launcher) -> None:
    """Print the plan; nothing is written or started."""
    print(outline(run, config, launcher), flush=True)
    from atlas.training.dry_run.plan import detail

    print(detail(config, launcher.world_size, launcher.elsewhere))
    if script := launcher.script(run, config):
        print(f"\n{script}")


def _run_of(config: dict[str, Any], world_size: int) -> Run:
    if not config["resume"]:
        return Run.plan(config, world_size)
    run = Run.find(config["resume"], config["outputs"])
    keep_effective_batch(config, run, world_size)
    return run


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """All of `cfg` as plain values, interpolations resolved; missing values stay `???`."""
    try:
        config = OmegaConf.to_container(cfg, resolve=True)
    except InterpolationToMissingValueError:
        return _resolve_around_missing(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{error.full_key or 'the configuration'}: {first_line(error)}"
        ) from error
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def _resolve_around_missing(cfg: DictConfig) -> dict[str, Any]:
    """Raises `ConfigError` for mandatory values that are missing, and for all else that is wrong."""
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    missing = [key for key, value in flatten(raw).items() if value == "???"]
    filled = OmegaConf.create(raw)
    for key in missing:
        OmegaConf.update(filled, key, "")
    others: Any = OmegaConf.to_container(filled, resolve=True)
    found: list[str] = []
    try:
        check(others)
    except ConfigError as error:
        found = [text for text in error.problems if not text.startswith(tuple(missing))]
    raise ConfigError([*map(not_set, missing), *found])


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Show what is a person's to mend as a message, everything else as Python does."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints and exits by itself
    try:
        yield
    except KeyboardInterrupt:  # nothing runs yet, so nothing is lost
        raise SystemExit(EXIT_INTERRUPTED) from None
    except Exception as error:
        known = isinstance(error, AtlasError | HydraException | OmegaConfBaseException)
        known = known or is_of_a_file(error)
        if FULL_ERROR or not (known or is_hydras(error)):
            raise
        print(f"error: {explain(error, ROOT / 'conf', check)}", file=sys.stderr)
        raise SystemExit(1) from None


def own_modules(hydra: Any) -> list[str]:
    """The folders given by --config-dir, where a person's modules sit beside their YAML files.

    They join `sys.path`. `hydra` is Hydra's own part of a composed configuration.
    """
    sources = hydra.runtime.config_sources
    own = [str(Path(s.path).absolute()) for s in sources if s.provider == "command-line"]
    sys.path[:0] = [path for path in own if path not in sys.path]
    return own


def _command() -> Command:
    hydra = HydraConfig.get()
    return Command(list(hydra.overrides.task), own_modules(hydra))
