"""From a composed configuration to a submitted run: what `train.py` calls."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
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
from atlas.run import trust
from atlas.run.directory import Run
from atlas.run.provenance import Provenance
from atlas.run.resume import adopt, announce, keep_effective_batch, require_source
from atlas.run.status import State
from atlas.run.summary import summary
from atlas.system.terminal import ignore_closed_output
from atlas.version import ROOT
from launchers import command_line, torchrun
from launchers.base import Launcher
from launchers.command_line import CommandLine
from launchers.dry_run import print_plan
from launchers.hydra_errors import explain, first_line, is_hydras, is_of_a_file
from launchers.local.ranks import warm_context

# Set by a person who wants to see where an error comes from.
FULL_ERROR = "HYDRA_FULL_ERROR" in os.environ


def start(main: Callable[[], Any], takes_file: bool = False) -> None:
    """Run the `main` of train.py: alone, or as one of the ranks that torchrun has started.

    `takes_file`: the command line may hold --config FILE.
    """
    ignore_closed_output()
    sys.path.append(str(ROOT / "launchers" / "plugins"))  # where Hydra finds the sweeper
    typed = command_line.parse(sys.argv[1:], takes_file)
    trust.add_prefixes(typed.trusted)

    def compose() -> None:
        sys.argv[1:] = typed.arguments()
        main()

    with reported(typed):
        if torchrun.is_torchrun():
            torchrun.refuse("launchers.local.", typed.is_sweep)
            torchrun.main(compose)
        else:
            if typed.is_sweep and not typed.sets("cluster"):
                warm_context()  # it imports torch while the sweep is composed
            compose()


def launch(cfg: DictConfig) -> None:
    """Check `cfg`, create its run and hand it to its launcher; exits with the run's exit code."""
    with reported():  # here too, or Hydra adds words of its own to an error
        _launch(cfg)


def _launch(cfg: DictConfig) -> None:
    provenance = _provenance()
    config = resolve(cfg)
    if config.get("resume"):
        config, provenance = adopt(config, provenance)
    check(config)
    require_source(config)
    config["outputs"] = str(Path(config["outputs"]).absolute())
    launcher = launcher_of(config)
    launcher.check()
    run = _run_of(config, launcher.world_size)
    if config["dry_run"]:
        print_plan(run, config, launcher)
        return
    if run.judge_state() is State.FINISHED and not config["fresh"]:
        print(summary(run))
        return
    run.refuse_if_live()  # before anything is printed about resuming it
    announce(run, config, launcher.world_size, provenance)
    launcher.preflight([config])
    if config["fresh"] and (aside := run.move_aside()):
        print(f"moved the run that was there aside: {aside}")
    run.create(config, launcher.world_size, provenance)
    print(f"run {run.id} in {run.path}", flush=True)
    for handle in launcher.submit([run]):
        if text := handle.describe():
            print(text, flush=True)
        code = EXIT_DONE if launcher.is_detached else handle.wait()
        if code != EXIT_DONE:
            raise SystemExit(code)


def launcher_of(config: dict[str, Any]) -> Launcher:
    """The launcher that `cluster` describes, or the one that joins torchrun's ranks."""
    if not torchrun.is_torchrun():
        launcher: Launcher = instantiate(config["cluster"], _convert_="all")
        return launcher
    torchrun.refuse(config["cluster"]["_target_"], multirun=False)
    cluster = config["cluster"]
    return torchrun.TorchrunLauncher(cluster["device"], cluster.get("sharding"))


def _run_of(config: dict[str, Any], world_size: int) -> Run:
    if not config["resume"]:
        return Run.locate(config, world_size)
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
        raise ConfigError(_unresolved(error)) from error
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def _resolve_around_missing(cfg: DictConfig) -> dict[str, Any]:
    """Raises `ConfigError` for mandatory values that are missing, and for all else that is wrong."""
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    missing = [key for key, value in flatten(raw).items() if value == "???"]
    filled = OmegaConf.create(raw)
    for key in missing:
        OmegaConf.update(filled, key, "")
    found: list[str] = []
    try:
        others: Any = OmegaConf.to_container(filled, resolve=True)
        check(others)
    except ConfigError as error:
        found = [text for text in error.problems if not text.startswith(tuple(missing))]
    except OmegaConfBaseException as error:
        found = [_unresolved(error)]
    raise ConfigError([*map(not_set, missing), *found])


def _unresolved(error: OmegaConfBaseException) -> str:
    return f"{error.full_key or 'the configuration'}: {first_line(error)}"


@contextlib.contextmanager
def reported(typed: CommandLine | None = None) -> Iterator[None]:
    """Show errors that the user can correct as a message, all others as Python does.

    `typed` is for errors of composing it; later ones are not about a single override.
    """
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
        print(
            f"error: {explain(error, typed or CommandLine(), ROOT / 'conf', check)}",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


def own_modules(hydra: Any) -> list[str]:
    """The folders given by --config-dir, where a person's modules sit beside their YAML files.

    They join `sys.path`. `hydra` is Hydra's own part of a composed configuration.
    """
    sources = hydra.runtime.config_sources
    own = [str(Path(s.path).absolute()) for s in sources if s.provider == "command-line"]
    sys.path[:0] = [path for path in own if path not in sys.path]
    return own


def _provenance() -> Provenance:
    hydra = HydraConfig.get()
    return Provenance.collect(list(hydra.overrides.task), own_modules(hydra))
