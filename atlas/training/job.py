"""One rank of one run, from its directory to its outcome: what `atlas.worker` enters."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from atlas.config.schema import Settings, TrainerSettings
from atlas.data.protocol import Prepares
from atlas.errors import AtlasError
from atlas.protocol import offers
from atlas.record.tracker import NullTracker, RunTracker, Tracker
from atlas.run.directory import Run
from atlas.run.failures import note_step, state_after
from atlas.run.lock import Lock
from atlas.run.signals import Stop
from atlas.run.trust import require_trust
from atlas.system.progress import open_progress
from atlas.training.build import arrange, build, doubts
from atlas.training.feeding import features
from atlas.training.feeding.stream import TrainStream
from atlas.training.optimization.ema import Ema
from atlas.training.optimization.precision import set_determinism
from atlas.training.parts import Parts
from atlas.training.ranks.sharding import shard
from atlas.training.ranks.world import World, join_ranks, leave_ranks
from atlas.training.saving.checkpoint import Checkpoints, best_weights, load_weights
from atlas.training.saving.frozen import frozen_state
from atlas.training.trainer import Outcome, Trainer, TrainState

log = logging.getLogger(__name__)


def train(run: Run, config: Mapping[str, Any], lock: Lock | None, stop: Stop) -> Outcome:
    """Train `run` by its frozen `config` as the rank that the environment names.

    Rank 0 holds the `lock`. Raise `AtlasError` for a configuration that may not be instantiated.
    """
    require_trust(run.config_file, config)
    settings = Settings.of(config)
    set_determinism(settings.trainer.deterministic)
    world = join_ranks(settings.cluster.device)
    try:
        parts = build(settings, world.size, world.device)
        for doubt in doubts(settings.data.raw, parts) if world.is_main else ():
            print(f"warning: {doubt}", flush=True)
        checkpoints = Checkpoints(run.checkpoints, settings.trainer.keep)
        state, ema = begin(settings, world, parts, checkpoints)
        trainer = functools.partial(
            Trainer,
            settings,
            parts,
            world,
            stream=open_stream(settings, parts.train, world),
            checkpoints=checkpoints,
            stop=stop,
            state=state,
            ema=ema,
        )
        tracker = open_tracker(run, lock, settings)
        return fit(tracker, settings.trainer, world, state, trainer)
    finally:
        leave_ranks()


def open_tracker(run: Run, lock: Lock | None, settings: Settings) -> Tracker:
    """Return what this rank records with; only rank 0 has the `lock`, and records."""
    if lock is None:
        return NullTracker()
    return RunTracker(run, lock, settings.tracking, settings.trainer.log_samples)


def begin(
    settings: Settings, world: World, parts: Parts, checkpoints: Checkpoints
) -> tuple[TrainState, Ema | None]:
    """What has to come before the first update, in the order that it has to come in."""
    for data in (parts.train, parts.val):
        if data is not None and offers(data, Prepares):
            data.prepare()  # what takes long and is shared, before workers and steps
    if world.is_main:
        checkpoints.repair()
    world.barrier()
    state, ema = restore(settings, parts, checkpoints)
    if settings.data.cache_features:  # the features of the weights that are there now
        features.attach(parts, settings.trainer.precision, world.device)
    if world.is_main:
        checkpoints.point_best(state.best["step"] if state.best else None)
        checkpoints.save_frozen(frozen_state(parts.model))
    if settings.cluster.is_sharded(world.size):
        again = functools.partial(arrange, settings, parts.model, world.size, world.device)
        ema = shard(parts, ema, world, again)
    return state, ema


def fit(
    tracker: Tracker,
    settings: TrainerSettings,
    world: World,
    state: TrainState,
    trainer: Callable[..., Trainer],
) -> Outcome:
    """Train from `state` on, and record how it ended; `trainer` lacks only what it reports to."""
    progress = open_progress(settings.progress, world.is_main, settings.steps, state.step)
    try:
        tracker.resume(state.step)
        outcome = trainer(tracker=tracker, progress=progress).fit()
    except BaseException as error:
        note_step(error, state.step)
        progress.close()
        with contextlib.suppress(OSError, AtlasError):  # a full disk: `error` tells of it
            tracker.close(*state_after(error))
        raise
    progress.close()
    left = tracker.close(outcome.state, outcome.reason, step=state.step, best=state.best)
    if left:
        print(f"warning: {left}")
    return outcome


def open_stream(settings: Settings, data: Any, world: World) -> TrainStream:
    """What the updates of this rank are fed with."""
    return TrainStream(
        data,
        seed=settings.seed,
        batch_size=settings.data.batch_size,
        accumulate=settings.trainer.accumulate,
        workers=settings.data.workers,
        world=world,
        on_bad=settings.data.on_bad,
    )


def restore(
    settings: Settings, parts: Parts, checkpoints: Checkpoints
) -> tuple[TrainState, Ema | None]:
    """The state to go on from: the newest checkpoint, another run's weights, or the beginning."""
    saved, decay = checkpoints.latest(), settings.trainer.ema
    if saved is None:
        if reference := settings.init_from:
            weights = best_weights(reference, settings.outputs)
            load_weights(parts.model, weights, f"init_from={reference}")
        return TrainState(), Ema(parts.model, decay) if decay else None
    load_weights(parts.model, saved["model"], str(checkpoints.folder))
    parts.optimizer.inner.load_state_dict(saved["optimizer"])
    ema = Ema(parts.model, decay) if decay else None
    if ema:
        ema.load_state_dict(saved["ema"])
    log.info("going on from step %d", saved["step"])
    # What an older Atlas did not save yet keeps its default.
    names = [field.name for field in fields(TrainState) if field.name in saved]
    return TrainState(**{name: saved[name] for name in names}), ema
