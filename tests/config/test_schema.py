"""The schema: bounds of every kind of key, the tables read from it, and the typed settings."""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hydra import compose, initialize_config_dir

from atlas.config.dotted import flatten, lookup
from atlas.config.keys import Key, key, keys_of
from atlas.config.schema import BATCH_SPLIT, CLOSED, EXCLUDED, KEYS, SECTIONS, Settings
from atlas.errors import ConfigError
from launchers.launch import resolve

CONF = Path(__file__).resolve().parents[2] / "conf"
NAN, INF = float("nan"), float("inf")


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve(compose("config", list(overrides)))


# A key, values that are valid, and values that are not.
BOUNDS: dict[str, tuple[Key, list[Any], list[Any]]] = {
    "int": (Key(int), [0, -1, 10**9], [1.0, "1", True, None, [1], {}]),
    "int from 1": (Key(int, minimum=1), [1, 2], [0, -1, 0.5, None]),
    "int to 9": (Key(int, minimum=0, maximum=9), [0, 9], [10, -1]),
    "int or auto": (Key(int, minimum=1, auto=True), [1, "auto"], [0, "Auto", "", None]),
    "int or null": (Key(int, minimum=1, null=True), [1, None], [0, "null", "auto"]),
    "float": (Key(float), [1.5, 1, -1e30], [NAN, INF, -INF, "1", True, None]),
    "float above 0": (Key(float, above=0), [1e-300, 1], [0, 0.0, -1e-300]),
    "share": (Key(float, minimum=0, maximum=1), [0, 1, 0.5], [-1e-9, 1.000001]),
    "decay": (Key(float, above=0, maximum=0.9), [0.9, 0.1], [0, 0.91]),
    "bool": (Key(bool), [True, False], [0, 1, "true", None]),
    "bool or auto": (Key(bool, auto=True), [True, "auto"], ["yes", 1, None]),
    "str": (Key(str), ["", "a"], [1, None, ["a"]]),
    "choice": (Key(str, choices=("a", "b")), ["a", "b"], ["c", "", 1, None]),
    "choice or null": (Key(str, choices=("a",), null=True), ["a", None], ["b", "null"]),
    "mapping": (Key(dict), [{}, {"a": 1}], [[], "a", None]),
    "list or null": (Key(list, null=True), [[], [1], None], [{}, "a", (1,)]),
}


@pytest.mark.parametrize("kind", BOUNDS)
def test_bounds(kind: str) -> None:
    spec, valid, invalid = BOUNDS[kind]
    assert [value for value in valid if spec.problem(value) is not None] == []
    assert [value for value in invalid if spec.problem(value) is None] == []


def test_a_key_is_declared_by_its_type_and_limits() -> None:
    @dataclass
    class Section:
        count: int = key(minimum=1)
        part: float | None = key(above=0, maximum=1)
        often: int | Literal["auto"] | None = key()
        how: Literal["fast", "slow"] = key()
        which: Literal["one"] | None = key()
        table: Mapping[str, Any] | None = key()
        lines: list[str] | None = key()
        extra: int | None = key(minimum=0, optional=True)
        target: str = key(name="_target_")

    assert keys_of(Section) == {
        "count": Key(int, minimum=1),
        "part": Key(float, above=0, maximum=1, null=True),
        "often": Key(int, auto=True, null=True),
        "how": Key(str, choices=("fast", "slow")),
        "which": Key(str, choices=("one",), null=True),
        "table": Key(dict, null=True),
        "lines": Key(list, null=True),
        "extra": Key(int, minimum=0, optional=True),
        "_target_": Key(str),
    }


def test_what_the_id_leaves_out() -> None:
    assert {
        "name",
        "outputs",
        "objective",
        "resume",
        "fresh",
        "dry_run",
        "run",
        "cluster",
        "tracking",
        "data.workers",
        "data.cache_dir",
        "data.train.cache_dir",
        "data.val.cache_dir",
        "trainer.log_interval",
        "trainer.log_samples",
        "trainer.save_interval",
        "trainer.save_minutes",
        "trainer.keep",
        "trainer.max_time",
        "trainer.progress",
    } == EXCLUDED
    assert {"data.batch_size", "trainer.accumulate"} == BATCH_SPLIT


def test_sections() -> None:
    assert set(SECTIONS) == {*CLOSED, "model", "schedule", "data", "cluster"}
    assert set(CLOSED) == {"trainer", "optim", "tracking"}


@pytest.mark.parametrize("data", ["tabletop", "babyai", "lerobot"])
@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_every_key_has_a_default(data: str, cluster: str) -> None:
    root = ["data.root=/data"] if data == "lerobot" else []
    config = composed(f"data={data}", f"cluster={cluster}", *root)
    assert [name for name in KEYS if not lookup(config, name)[0]] == []


def test_every_default_of_a_closed_section_has_a_key() -> None:
    config = composed()
    config = {name: value for name, value in config.items() if name not in SECTIONS} | {
        name: config[name] for name in CLOSED
    }
    known = [name for name, spec in KEYS.items() if spec.type is dict]  # their keys are the user's
    assert [
        name
        for name in flatten(config)
        if name not in KEYS and not name.startswith(tuple(f"{prefix}." for prefix in known))
    ] == []


def test_settings_have_the_values_of_the_configuration() -> None:
    config = composed()
    settings = Settings.of(config)

    def field_of(name: str) -> Any:
        value: Any = settings
        for part in name.split("."):
            value = getattr(value, part.strip("_"))
        return value

    assert {name: field_of(name) for name in KEYS} == {
        name: lookup(config, name)[1] for name in KEYS
    }
    assert settings.data.raw is config["data"] and settings.model.raw is config["model"]


def test_values_have_the_types_of_their_keys() -> None:
    settings = Settings.of(
        composed("optim.lr=1", "trainer.max_time=30", "trainer.ema=null", "tracking.wait_s=5")
    )
    assert [type(v) for v in (settings.optim.lr, settings.trainer.max_time)] == [float, float]
    assert settings.trainer.ema is None and settings.trainer.val_interval == "auto"
    assert settings.trainer.progress == "auto" and type(settings.tracking.wait_s) is float


def test_an_older_configuration_has_no_keys_that_came_later() -> None:
    config = composed()
    whole = Settings.of(copy.deepcopy(config))
    for name, spec in KEYS.items():
        *parents, last = name.split(".")
        node = config
        for part in parents:
            node = node[part]
        if spec.null and node[last] is None:
            del node[last]
    del config["schedule"]["warmup"]  # a schedule of the user's own may have none
    older = Settings.of(config)
    assert older.trainer == whole.trainer and older.tracking == whole.tracking
    assert older.data.on_bad is None and older.cluster.sharding is None
    assert older.schedule.warmup is None


@pytest.mark.parametrize("name", ["trainer.steps", "seed", "model._target_", "cluster.device"])
def test_a_key_that_may_not_be_null_is_missing(name: str) -> None:
    config = composed()
    *parents, last = name.split(".")
    node = config
    for part in parents:
        node = node[part]
    del node[last]
    with pytest.raises(ConfigError, match=f"^{name} is missing"):
        Settings.of(config)


def test_settings_cannot_be_changed() -> None:
    settings = Settings.of(composed())
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 1  # type: ignore[misc]


def test_the_effective_batch() -> None:
    settings = Settings.of(composed("data.batch_size=3", "trainer.accumulate=2"))
    assert settings.effective_batch(4) == 3 * 2 * 4
    assert not settings.cluster.is_sharded(4)
    sharded = Settings.of(composed("cluster.sharding=fsdp2"))
    assert sharded.cluster.is_sharded(2) and not sharded.cluster.is_sharded(1)
