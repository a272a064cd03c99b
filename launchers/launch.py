"""From the command line to a submitted run, in the order of the calls.

    start    parses the command line; Hydra composes what it says and calls
    launch   which resolves the configuration, checks it, freezes it in the directory of its run
             (`Run.create`) and submits that run to its launcher

A sweep leaves this path at Hydra, which calls its plugins instead of `launch` (launchers/sweep.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from atlas.config.checks import check, not_set
from atlas.config.dotted import flatten
from atlas.errors import EXIT_DONE, ConfigError
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
from launchers.dry_run import print_plan
from launchers.hydra_errors import first_line, report_errors
from launchers.local.ranks import warm_context


def start(main: Callable[[], Any], takes_file: bool = False) -> None:
    """Run `main`, Hydra's entry point: alone, or as one of the ranks that torchrun has started.

    With `takes_file` the command line may hold --config FILE.
    """
    ignore_closed_output()
    sys.path.append(str(ROOT / "launchers" / "plugins"))  # where Hydra finds the sweeper
    typed = command_line.parse(sys.argv[1:], takes_file)
    trust.add_prefixes(typed.trusted)

    def compose() -> None:
        sys.argv[1:] = typed.arguments()
        main()

    with report_errors(typed):
        if torchrun.is_torchrun():
            torchrun.refuse("launchers.local.", typed.is_sweep)
            torchrun.main(compose)
        else:
            if typed.is_sweep and not typed.sets("cluster"):
                warm_context()  # imports torch while the sweep is composed
            compose()


@report_errors()  # in `start` it would be too late: Hydra prints a text of its own before that
def launch(cfg: DictConfig) -> None:
    """Check `cfg`, create its run and submit it; exit with the run's exit code if it failed."""
    hydra = HydraConfig.get()
    provenance = Provenance.collect(list(hydra.overrides.task), user_modules(hydra))
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
    run.refuse_if_live()  # before `announce` says that it resumes
    announce(run, config, launcher.world_size, provenance)
    launcher.preflight([config])
    if config["fresh"] and (aside := run.move_aside()):
        print(f"moved the existing run to {aside}")
    run.create(config, launcher.world_size, provenance)
    print(f"run {run.id} in {run.path}", flush=True)
    for handle in launcher.submit([run]):
        if text := handle.describe():
            print(text, flush=True)
        code = EXIT_DONE if launcher.is_detached else handle.wait()
        if code != EXIT_DONE:
            raise SystemExit(code)


def launcher_of(config: dict[str, Any]) -> Launcher:
    """Return the launcher that `cluster` describes, or under torchrun the one for its ranks."""
    if not torchrun.is_torchrun():
        launcher: Launcher = instantiate(config["cluster"], _convert_="all")
        return launcher
    torchrun.refuse(config["cluster"]["_target_"], is_sweep=False)
    cluster = config["cluster"]
    return torchrun.TorchrunLauncher(cluster["device"], cluster.get("sharding"))


def _run_of(config: dict[str, Any], world_size: int) -> Run:
    if not config["resume"]:
        return Run.locate(config, world_size)
    run = Run.find(config["resume"], config["outputs"])
    keep_effective_batch(config, run, world_size)
    return run


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """Return `cfg` as plain values, with its interpolations resolved."""
    try:
        config = OmegaConf.to_container(cfg, resolve=True)
    except InterpolationToMissingValueError:
        return _resolve_around_missing(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(_unresolved(error)) from error
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def _resolve_around_missing(cfg: DictConfig) -> dict[str, Any]:
    """Raise `ConfigError` with every missing value and everything else that is wrong."""
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


def user_modules(hydra: Any) -> list[str]:
    """Return the folders given by --config-dir, after putting them on `sys.path`.

    Users keep their modules there, next to their YAML files. `hydra` is Hydra's own section of a
    composed configuration.
    """
    sources = hydra.runtime.config_sources
    folders = [str(Path(s.path).absolute()) for s in sources if s.provider == "command-line"]
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
    return folders
