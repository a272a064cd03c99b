"""Every key that Atlas knows: its meaning, type and bounds, and whether the id of a run hashes it.

One dataclass a section, one field a key. Everything else is read from these fields: the table that
a configuration is checked against (`KEYS`), the keys that the id leaves out (`EXCLUDED`), those that
it replaces by the effective batch (`BATCH_SPLIT`), and the typed settings of a run:

    settings = Settings.of(config)   # a checked or frozen configuration, converted once
    settings.trainer.steps           # an int
    settings.data.raw["own_key"]     # sections that take keys of the user's own keep the mapping

The type of a field says what is permitted: with `None` null, with `Auto` the word auto, and other
literals are the choices. Default values are in `conf/*.yaml`.
"""

# Without `from __future__ import annotations`: the keys are made from the types of the fields.
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from atlas.config.keys import key, keys_of, open_section, read, section, walk

Auto = Literal["auto"]
HEAD = "run"  # the section that Atlas adds to a configuration when it freezes it


@dataclass(frozen=True)
class TrainerSettings:
    """The training loop: how long, how exactly, and what is saved and logged when."""

    steps: int = key(minimum=1)  # optimizer updates in total
    accumulate: int = key(minimum=1, batch_split=True)  # micro-batches per update and rank
    # Updates between validations; auto: by the number of training samples; null: only at the end.
    val_interval: int | Auto | None = key(minimum=1)
    val_batches: int | None = key(minimum=1)  # batches per validation over all ranks; null: all
    log_interval: int = key(minimum=1, hashed=False)  # updates between logged points
    log_samples: bool = key(hashed=False)  # whether the sample ids of every update are recorded
    save_interval: int | None = key(minimum=1, hashed=False)  # updates between checkpoints
    save_minutes: float | None = key(above=0, hashed=False)  # longest time between checkpoints
    keep: int = key(minimum=1, hashed=False)  # newest checkpoints that are kept, besides the best
    patience: int | None = key(minimum=1)  # validations without improvement that end the run
    precision: Literal["fp32", "tf32", "bf16"] = key()
    compile: bool = key()  # whether the model is compiled by torch.compile
    deterministic: bool = key()  # whether only deterministic kernels are used
    clip_norm: float | None = key(above=0)  # largest global norm of the gradient
    ema: float | None = key(above=0, maximum=0.999999)  # decay of the averaged weights, per update
    max_time: float | None = key(
        above=0, hashed=False
    )  # minutes after which the run saves and ends
    progress: bool | Auto = key(hashed=False)  # progress bar; auto: on a terminal


@dataclass(frozen=True)
class OptimSettings:
    """The optimizer and the base learning rate."""

    lr: float = key(above=0)  # base learning rate, before scaling and multipliers
    scale_lr: Literal["none", "linear", "sqrt"] = key()  # how it grows with the effective batch
    base_batch_size: int = key(minimum=1)  # effective batch, in samples, that `lr` is meant for
    # Module path to the factor on the rate; 0 freezes the module.
    lr_multipliers: Mapping[str, float] | None = key()
    optimizer: Mapping[str, Any] = key()  # to be instantiated with groups of parameters


@dataclass(frozen=True)
class DataSettings:
    """The data sets and how they are read."""

    batch_size: int = key(minimum=1, batch_split=True)  # samples per rank and micro-batch
    workers: int = key(minimum=0, hashed=False)  # data worker processes per rank
    on_bad: Literal["error", "skip"] | None = key()  # what a bad sample does; null: error
    train: Mapping[str, Any] = key(unhashed=("cache_dir",))  # training set, to be instantiated
    val: Mapping[str, Any] | None = key(
        unhashed=("cache_dir",)
    )  # validation set, to be instantiated
    cache_features: bool | None = key()  # whether the frozen vision's output is computed once
    raw: Mapping[str, Any] = open_section(unhashed=("cache_dir",))


@dataclass(frozen=True)
class ClusterSettings:
    """Where the run trains; the launcher that `raw` names has keys of its own."""

    nodes: int = key(minimum=1)  # machines
    nproc_per_node: int | Auto = key(minimum=1)  # ranks on each machine; auto: one a visible GPU
    device: Literal["auto", "cpu", "cuda"] = key()
    sharding: Literal["fsdp2"] | None = (
        key()
    )  # how weights are sharded; null: each rank has them all
    raw: Mapping[str, Any] = open_section()

    def is_sharded(self, world_size: int) -> bool:
        """Return whether each rank holds a shard of the weights; a single rank holds them all."""
        return world_size > 1 and self.sharding is not None


@dataclass(frozen=True)
class TrackingSettings:
    """Where metrics are sent besides the journal."""

    kind: Literal["mlflow", "none"] = key()
    uri: str | None = key()  # MLflow's tracking URI; null: from the environment, else sqlite
    artifact_root: str | None = key()  # folder or URI for artifacts of a new experiment
    log_best: bool = key()  # whether the best checkpoint becomes an artifact
    wait_s: float = key(minimum=0)  # seconds that the end of a run waits for points to be sent

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "TrackingSettings":
        """Return this section of a frozen `config`, for processes that need no other."""
        return read(cls, config["tracking"], "tracking.")

    @property
    def is_on(self) -> bool:
        """Whether metrics are sent at all."""
        return self.kind != "none"


@dataclass(frozen=True)
class ScheduleSettings:
    """The factor on the base rate at every update, to be instantiated from `raw`."""

    target: str = key(name="_target_")
    warmup: int | None = key(minimum=0, optional=True)  # updates over which the rate rises from 0
    floor: float | None = key(minimum=0, maximum=1, optional=True)  # fraction that it decays to
    raw: Mapping[str, Any] = open_section()


@dataclass(frozen=True)
class ModelSettings:
    """The model, to be instantiated from `raw`."""

    target: str = key(name="_target_")
    raw: Mapping[str, Any] = open_section()


@dataclass(frozen=True)
class Settings:
    """The configuration of one run as typed values."""

    name: str = key(hashed=False)  # folder below `outputs`, and experiment in MLflow
    seed: int = key(minimum=0, maximum=2**63 - 1)  # of weights, order, dropout and augmentation
    outputs: str = key(hashed=False)  # folder that runs are in
    objective: str = key(
        hashed=False
    )  # metric that sweeps compare; with a leading - the larger wins
    init_from: str | None = key()  # run (id or folder) whose best weights training starts from
    resume: str | None = key(hashed=False)  # run (id or folder) to resume
    fresh: bool = key(hashed=False)  # whether an existing run is moved aside and started over
    dry_run: bool = key(hashed=False)  # whether only the plan is printed
    trainer: TrainerSettings = section()
    optim: OptimSettings = section()
    data: DataSettings = section()
    cluster: ClusterSettings = section(hashed=False)
    tracking: TrackingSettings = section(hashed=False)
    schedule: ScheduleSettings = section()
    model: ModelSettings = section()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Settings":
        """Return the settings of a checked or frozen `config`.

        Keys that may be null can be missing: older versions of Atlas did not have all of them. Raise
        `ConfigError` for any other missing key.
        """
        return read(cls, config)

    def effective_batch(self, world_size: int) -> int:
        """Return how many samples one update sees over all ranks."""
        return self.data.batch_size * world_size * self.trainer.accumulate


KEYS = keys_of(Settings)
SECTIONS = tuple(item.name for item in fields(Settings) if "limits" not in item.metadata)
# The sections in which every key is Atlas's own; elsewhere keys of the user's own are welcome.
CLOSED = tuple(
    name
    for name in SECTIONS
    if not any(n == name and "raw" in i.metadata for n, i in walk(Settings))
)
# What can change without changing the result: where a run runs, how it is watched, how often it is
# saved. Everything else, keys of the user's own included, is part of the identity.
EXCLUDED = frozenset(
    {
        HEAD,
        *(name for name, item in walk(Settings) if not item.metadata.get("hashed", True)),
        *(
            f"{name}.{k}"
            for name, item in walk(Settings)
            for k in item.metadata.get("unhashed", ())
        ),
    }
)
# How the effective batch is split over ranks and micro-batches; the id hashes their product.
BATCH_SPLIT = frozenset(n for n, item in walk(Settings) if item.metadata.get("batch_split"))
