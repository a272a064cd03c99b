"""Builds models without their weights and shows them a batch: what a job would trip over.

Run as a child process, `python -m atlas.training.dry_run.preflight`, by those who queue runs and must not
import torch. Reads `{"sys_path", "world_size", "configs"}` as JSON and writes a list of reports.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from atlas.config.schema import Settings
from atlas.data.protocol import spec_of
from atlas.errors import AtlasError, ConfigError
from atlas.run.directory import Run
from atlas.training.build import build_data, build_optimizer, create_model, needs_spec
from atlas.training.feeding import features
from atlas.training.feeding.stream import Fetcher, Order, to_device
from atlas.training.optimization import optimizer as optim
from atlas.training.optimization.gradient import loss_of
from atlas.training.ranks import sharding
from atlas.training.saving.checkpoint import BEST, best_weights, compare

T = TypeVar("T")
META = torch.device("meta")
CPU = torch.device("cpu")
SAMPLES = 2  # in the batch that is tried; one alone is refused by batch norm
# Errors that tell of this machine rather than of the configuration.
ELSEWHERE = (OSError, ImportError, MemoryError, NotImplementedError)
ELSEWHERE_WORDS = ("cuda", "nvidia", "gpu", "out of memory", "meta tensor", "not compiled with")


@dataclass
class Report:
    """What is wrong with one configuration, and what could not be told on this machine."""

    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def attempt(self, what: str, act: Callable[[], T]) -> T | None:
        """The outcome of `act`; None where it failed, which is entered under `what`."""
        try:
            return act()
        except ConfigError as error:
            self.problems += error.problems
        except Exception as error:  # a person's own code: anything can come
            self.enter(what, error)
        return None

    def enter(self, what: str, error: Exception) -> None:
        """File `error` under problems, or under what this machine cannot tell."""
        text = f"{what}: {type(error).__name__}: {_first_line(error)}"
        (self.unchecked if is_of_this_machine(error) else self.problems).append(text)


def check(config: Mapping[str, Any], world_size: int) -> Report:
    """Build the parts of `config` and send a batch of two samples through its model."""
    report, settings = Report(), Settings.of(config)
    data = report.attempt("data", lambda: build_data(settings))
    if data is None and needs_spec(settings.model.target):
        return report
    spec = spec_of(data[0]) if data else None
    model = _model(settings, spec, report)
    if model is None:
        return report
    if settings.init_from:
        report.attempt("init_from", lambda: _try_source(settings, model, report))
    groups = report.attempt(
        "optim.lr_multipliers",
        lambda: optim.group_parameters(model, settings.optim.lr_multipliers or {}),
    )
    if groups is not None:
        optim.freeze(groups)
        if settings.cluster.is_sharded(world_size):
            report.attempt("cluster.sharding", lambda: sharding.check_shardable(model))
        sets = [part for part in data or () if part is not None]
        if settings.data.cache_features:
            report.attempt("data.cache_features", lambda: features.check(model, sets))
        small = [_small(group) for group in groups]
        report.attempt("optim", lambda: build_optimizer(settings, small, world_size, CPU))
    if data is not None:
        _try_batches(settings, spec, model, data, report)
    return report


def is_of_this_machine(error: Exception) -> bool:
    """Whether the same could well work on the machine that the run is for."""
    if isinstance(error, AtlasError):
        return False
    text = str(error).lower()
    return isinstance(error, ELSEWHERE) or any(word in text for word in ELSEWHERE_WORDS)


def room() -> float:
    """Bytes of weights that this process may take for a trial on the CPU."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min(4e9, 1024 * float(line.split()[1]) / 4)
    return 1e9


def _model(settings: Settings, spec: Any, report: Report) -> nn.Module | None:
    """The model without its weights where it lets itself be built so, else with them."""
    try:
        with META:
            return create_model(settings.model.raw, spec, settings.seed)
    except ConfigError as error:
        report.problems += error.problems
        return None
    except Exception:  # what a constructor may do with tensors, meta tensors cannot all
        return report.attempt(
            "model", lambda: create_model(settings.model.raw, spec, settings.seed)
        )


def _try_source(settings: Settings, model: nn.Module, report: Report) -> None:
    """Whether the weights to start from are of such a model."""
    reference, outputs = str(settings.init_from), settings.outputs
    best = Run.find(reference, outputs).checkpoints / BEST
    size = sum(file.stat().st_size for file in best.glob("*"))
    if size > room():
        report.unchecked.append(
            f"init_from={reference}: {size / 1e9:.1f} GB are too much to read here"
        )
        return
    try:
        compare(model, best_weights(reference, outputs), f"init_from={reference}")
    except AtlasError as error:
        raise ConfigError(str(error)) from error


def _small(group: optim.Group) -> optim.Group:
    """`group` with parameters of the same number of dimensions and no elements."""

    def emptied(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        return [nn.Parameter(torch.empty((0,) * p.ndim, dtype=p.dtype)) for p in parameters]

    return optim.Group(
        group.name, group.multiplier, emptied(group.decayed), emptied(group.undecayed)
    )


def _try_batches(
    settings: Settings,
    spec: Any,
    model: nn.Module,
    data: tuple[Any, Any | None],
    report: Report,
) -> None:
    """A batch of each data set through `model`; with real weights where it needs them."""
    for key, dataset, training in (("data.train", data[0], True), ("data.val", data[1], False)):
        if dataset is None:
            continue
        batch = report.attempt(key, functools.partial(_batch, dataset, settings))
        if batch is None:
            continue
        what = f"model on a batch of {key}"
        if _is_meta(model):
            trial = _try_on_meta(model.train(training), batch)
            if trial is None:
                continue
            if real := _with_weights(settings, spec, model, f"{what}: {trial}", report):
                model = real
            else:
                return
        report.attempt(what, functools.partial(_forward, model.train(training), batch))


def _try_on_meta(model: nn.Module, batch: Any) -> str | None:
    """What went wrong without weights; None where nothing did."""
    try:
        _forward(model, to_device(batch, META))
    except Exception as error:
        return _first_line(error)
    return None


def _with_weights(
    settings: Settings, spec: Any, model: nn.Module, why: str, report: Report
) -> nn.Module | None:
    """The model with its weights, unless they are too much for a machine that many people use."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size <= room():
        return report.attempt(
            "model", lambda: create_model(settings.model.raw, spec, settings.seed)
        )
    report.unchecked.append(
        f"{why} (without weights), and {size / 1e9:.1f} GB of them are too much to try with here"
    )
    return None


def _forward(model: nn.Module, batch: Any) -> None:
    loss_of(model(batch), trained=model.training)


def _batch(dataset: Any, settings: Settings) -> Any:
    count = min(SAMPLES, len(dataset), settings.data.batch_size)
    ids = Order(len(dataset), settings.seed).ids(0, count)
    fetcher = Fetcher(dataset, settings.seed, settings.data.on_bad)
    return fetcher.good(ids, range(count), refill=True)[1]


def _is_meta(model: nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters())


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def main() -> None:
    """Answer on what was standard output: a person's own code prints there too."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    question = json.load(sys.stdin)
    sys.path[:] = list(dict.fromkeys([*question["sys_path"], *sys.path]))
    reports = [check(config, question["world_size"]) for config in question["configs"]]
    json.dump([asdict(report) for report in reports], answer)
    answer.close()


if __name__ == "__main__":
    main()
