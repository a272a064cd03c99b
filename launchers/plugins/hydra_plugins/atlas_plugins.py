"""Atlas's plugins for Hydra: a sweeper that composes once, and a launcher for Hydra's sweepers.

Hydra imports every `hydra_plugins` module at every start, so nothing heavy is imported here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class AtlasSweeper(Sweeper):
    """Runs every combination of the swept values as one batch."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what Hydra gives its plugins: the loader of configurations and the base of them."""
        self._loader: Any = hydra_context.config_loader
        self._config = config

    def sweep(self, arguments: list[str]) -> Any:
        """Run every combination of the values in `arguments`, the overrides that were typed."""
        from launchers.launch import user_modules
        from launchers.sweep import Trial, run_sweep

        parsed = OverridesParser.create(config_loader=self._loader).parse_overrides(arguments)
        swept = [override for override in parsed if override.is_sweep_override()]
        fixed = [
            str(override.input_line) for override in parsed if not override.is_sweep_override()
        ]
        choices = [
            [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()] for o in swept
        ]
        combinations = [list(combination) for combination in itertools.product(*choices)]
        configs = self._compose(swept, fixed, combinations)
        keys = [override.get_key_element() for override in swept]
        trials = [
            Trial(config, [*fixed, *combination], combination, keys)
            for config, combination in zip(configs, combinations, strict=True)
        ]
        return run_sweep(trials, user_modules(self._config.hydra))

    def _compose(
        self, swept: list[Override], fixed: list[str], combinations: list[list[str]]
    ) -> list[dict[str, Any]]:
        """Return one configuration per combination.

        Composing takes about 90 ms. If only plain values are swept, it is done once and the values
        are put in. If a group is swept, each combination is composed separately.
        """
        from launchers.launch import resolve

        if any(not self._is_plain(override) for override in swept):
            return [
                resolve(without_hydra(self._loader.load_sweep_config(self._config, [*fixed, *c])))
                for c in combinations
            ]
        base = without_hydra(
            self._loader.load_sweep_config(self._config, [*fixed, *combinations[0]])
        )
        configs = []
        parser = OverridesParser.create(config_loader=self._loader)
        for combination in combinations:
            for override in parser.parse_overrides(combination):
                OmegaConf.update(base, override.key_or_group, override.value(), merge=True)
            configs.append(resolve(base))
        return configs

    def _is_plain(self, override: Override) -> bool:
        group: bool = self._loader.repository.group_exists(override.key_or_group)
        return not group and override.package is None and not override.is_delete()


class AtlasLauncher(Launcher):
    """Runs the trials of one of Hydra's sweepers, such as Optuna's, and returns their objectives."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what Hydra gives its plugins: the loader of configurations and the base of them."""
        self._loader: Any = hydra_context.config_loader
        self._config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run one trial for each of `job_overrides`, and return how each ended."""
        from launchers.launch import resolve, user_modules
        from launchers.sweep import Trial, objectives

        fixed = set.intersection(*(set(overrides) for overrides in job_overrides))
        trials = []
        for overrides in job_overrides:
            config = self._loader.load_sweep_config(self._config, list(overrides))
            swept = [o for o in overrides if o not in fixed] or list(overrides)
            keys = [text.lstrip("+").partition("=")[0] for text in swept]
            trials.append(Trial(resolve(without_hydra(config)), list(overrides), swept, keys))
        modules = user_modules(self._config.hydra)
        return [self._job_return(value) for value in objectives(trials, modules)]

    @staticmethod
    def _job_return(value: float | Exception) -> JobReturn:
        """Return `value` as Hydra wants it; an exception is raised when the sweeper reads it."""
        returned = JobReturn()
        failed = isinstance(value, Exception)
        returned.status = JobStatus.FAILED if failed else JobStatus.COMPLETED
        returned.return_value = value
        return returned


def without_hydra(config: DictConfig) -> DictConfig:
    """Return a composed configuration without Hydra's own section."""
    OmegaConf.set_readonly(config, False)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    OmegaConf.set_struct(config, True)
    return config
