"""The training loop: what happens in one update, and when a run validates, saves and stops."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from atlas.config.schema import Settings
from atlas.errors import EXIT_DONE, EXIT_STOPPED, NonFiniteError
from atlas.record.tracker import Tracker
from atlas.run.signals import CODES, STATES, Stop
from atlas.run.status import State
from atlas.system.progress import Lines
from atlas.training.feeding.prefetch import ReadAhead
from atlas.training.feeding.randomness import StepSeeds
from atlas.training.feeding.stream import TrainStream, to_device
from atlas.training.feeding.workers import ending
from atlas.training.meters import Pending, Window
from atlas.training.optimization.ema import Ema
from atlas.training.optimization.gradient import Gradient, Sums
from atlas.training.optimization.precision import autocast
from atlas.training.parts import Parts
from atlas.training.ranks.agreement import Agreement, Requests
from atlas.training.ranks.sharding import make_replica
from atlas.training.ranks.world import World
from atlas.training.saving.checkpoint import Checkpoints
from atlas.training.saving.frozen import frozen_modules, frozen_names
from atlas.training.validation import Interrupted, Validation


@dataclass
class TrainState:
    """What is not a tensor and has to survive a restart."""

    step: int = 0  # updates that were taken
    best: dict[str, Any] | None = None  # {"metric", "value", "step"} of the best validation
    worse: int = 0  # validations since the best one
    validated: int = 0  # updates that had been taken at the last validation
    bad_samples: int = 0  # that were replaced so far, where data.on_bad=skip


@dataclass(frozen=True)
class Outcome:
    """How `fit` ended: the state of the run, why, and the exit code."""

    state: State
    reason: str | None
    code: int


class Trainer:
    """Trains `parts` from `state` on; one object a rank."""

    def __init__(
        self,
        settings: Settings,
        parts: Parts,
        world: World,
        *,
        stream: TrainStream,
        checkpoints: Checkpoints,
        tracker: Tracker,
        progress: Lines,
        stop: Stop,
        state: TrainState,
        ema: Ema | None,
    ) -> None:
        self.settings = settings.trainer
        self.parts = parts
        self.world = world
        self.stream = stream
        self.checkpoints = checkpoints
        self.tracker = tracker
        self.progress = progress
        self.stop = stop
        self.state = state
        self.ema = ema
        self.steps = self.settings.steps
        self.accumulate = self.settings.accumulate
        self.val_interval = validation_interval(self.settings.val_interval, stream.order.length)
        self.optimizer = parts.optimizer
        self.seeds = StepSeeds(settings.seed, world.rank, world.device)
        self.autocast = autocast(self.settings.precision, world.device)
        self.gradient = Gradient(self.optimizer, world, self.settings.clip_norm)
        self.agreement = Agreement(world)
        self.validation = self._validation(settings)
        self.replica = make_replica(parts.model, world, self.settings.compile)
        self.window = Window()
        self.ahead = ReadAhead(stream, stop, self.accumulate)
        self._eval_for_good = frozen_modules(parts.model)
        self._pending: Pending | None = None
        self._saved_step = state.step
        self._saved_at = self._began = time.monotonic()
        if self.settings.max_time is not None:
            # Only when `_time_up` says so too: a rank that gives up has to say why.
            stop.limit_waiting(60 * self.settings.max_time + 0.05)

    def fit(self) -> Outcome:
        """Train to the last step, or until something asks to stop."""
        self.train_mode()
        with ending(self.stream.iterate(self.state.step, self.steps)) as batches:
            ended = self._begin(batches)
            while ended is None and self.state.step < self.steps:
                self.train_step(self.state.step, batches)
                self.state.step += 1
                ended = self._between_steps(self.agreement.read())
        return ended or Outcome(State.FINISHED, None, EXIT_DONE)

    def train_step(self, step: int, batches: Iterator[Any]) -> None:
        """Update number `step`, from 0: each micro-batch forward and backward, then the update."""
        self.optimizer.set_rates(step)
        sums = Sums(detailed=self._log_due(step))
        replaced = self.ahead.replaced
        for micro, batch in enumerate(self.ahead.take()):
            self.seeds.training(step, micro)
            with self.replica.synchronised(micro == self.accumulate - 1):
                with self.autocast:
                    out = self.replica(to_device(batch, self.world.device))
                sums.add(out).backward()
        self.flush()  # the step before has reached the host by now
        sums.over_ranks(self.world)
        norm, good = self.gradient.finish(step, sums)
        if good is None:
            self._raise_if_bad()
        self._look_ahead(step + 1, batches)  # while the device is at work
        self.seeds.update(step)  # samples seed the same generators
        self.optimizer.step(good)
        if self.ema:
            self.ema.update(step)
        self._record(step, sums, norm, replaced)

    def validate(self) -> bool:
        """Measure the model as it stands; whether it is the best so far."""
        self._check_weights()
        assert self.validation is not None
        model = self.parts.model
        model.eval()
        try:
            with self._averages(), self.replica.evaluating():
                metrics = self.validation.run(
                    model, self.replica.caller, self._interrupted, self.stop.wait
                )
        finally:
            self.train_mode()
        improved = self._judge(metrics["val/loss"])
        self.tracker.log(self.state.step, metrics)
        self.progress.validated(self.state.step, metrics, improved)
        self.window = Window()  # validation has its own time
        return improved

    def _averages(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which the model has its averaged weights, where there are any."""
        return self.ema.applied() if self.ema else contextlib.nullcontext()

    def save(self) -> None:
        """Journal first, then the checkpoint, then the status that names it."""
        self._check_weights()
        state = self.replica.gathered(self.state_dict)
        if self.world.is_main:
            self.tracker.flush()
            best = self.state.best["step"] if self.state.best else None
            self.checkpoints.save(self.state.step, state, best)
            self.tracker.update_status(step=self.state.step, best=self.state.best)
        self._saved_step = self.state.step
        self._saved_at = time.monotonic()
        self.window = Window()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; what is frozen is kept once, beside the checkpoints."""
        frozen = frozen_names(self.parts.model)
        model = self.parts.model.state_dict()
        return {
            "format": 1,
            **asdict(self.state),
            "position": self.state.step * self.stream.effective_batch,
            "model": {name: value for name, value in model.items() if name not in frozen},
            "frozen": bool(frozen),
            "optimizer": self.optimizer.inner.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "spec": self.parts.spec,
        }

    def train_mode(self) -> None:
        """Training mode, but for frozen modules: their dropout and statistics stay off."""
        self.parts.model.train()
        for module in self._eval_for_good:
            module.eval()

    def flush(self) -> None:
        """Log the step whose values were left on the device."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        metrics = pending.metrics()
        if metrics.pop("first_bad") >= 0:
            self._raise_if_bad()
        self.tracker.log(pending.step, metrics)
        self.progress.update(pending.step, metrics)
        if warning := self.tracker.warning():
            self.progress.message(f"warning: {warning}")

    def _begin(self, batches: Iterator[Any]) -> Outcome | None:
        """Get ready for the first update, and make the validation that a stop kept this step from."""
        self._look_ahead(self.state.step, batches)
        requests = self.agreement.read()
        ended = None
        if requests.end or self._validation_missing():
            ended = self._between_steps(requests)
        if ended is None and self.state.step < self.steps and self.world.size > 1:
            # A copy: it is trained on after this, and a model may change its batch in place.
            batch = to_device(copy.deepcopy(self.ahead.first()), self.world.device)
            self.replica.warm_up(batch, self.state.step, self.seeds, self.autocast)
        return ended

    def _look_ahead(self, step: int, batches: Iterator[Any]) -> None:
        """Read the data of update `step`, and ask what the ranks want to be done before it."""
        if step < self.steps:
            self.window.waited += self.ahead.read(step, batches)
        self.agreement.start(self._requests())

    def _record(self, step: int, sums: Sums, norm: Any, replaced: int) -> None:
        self.window.steps += 1
        if self.stream.skips:
            self.state.bad_samples += self.world.count(replaced)
        if self.settings.log_samples:
            self.tracker.log_samples(step, self.stream.ids(step))
        if not sums.detailed:
            return
        batch = self.stream.effective_batch
        other = {
            **{f"lr/{name}": rate for name, rate in self.optimizer.rates.items()},
            **self.window.metrics(batch),
            "epoch": (step + 1) * batch / self.stream.order.length,
            **({"bad_samples": self.state.bad_samples} if self.stream.skips else {}),
        }
        values = {**sums.means(), "grad_norm": norm, "first_bad": self.gradient.first_bad}
        self._pending = Pending(step, values, self.world.device, other)
        self.window = Window()
        if self.world.device.type == "cpu":
            self.flush()

    def _between_steps(self, requests: Requests) -> Outcome | None:
        """What follows an update: validate, journal, save, stop; each only where it is due."""
        improved = False
        if self._validation_due() and not requests.end:
            with contextlib.suppress(Interrupted):  # then it is validated after the restart
                improved = self.validate()
            requests = requests.merged(self.agreement.read())
        ended = self._ended(requests)
        if improved or ended or requests.save or self._save_due():
            self.save()
        return ended

    def _requests(self) -> Requests:
        minutes = self.settings.save_minutes
        save = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return Requests(stop=self.stop.code, save=int(save), time_up=self._time_up())

    def _time_up(self) -> int:
        limit = self.settings.max_time
        return int(limit is not None and time.monotonic() - self._began >= 60 * limit)

    def _interrupted(self) -> bool:
        """Whether the ranks had agreed to stop a round of validation ago."""
        agreed = self.agreement.read()
        mine = Requests(stop=self.stop.code, time_up=self._time_up())
        self.agreement.start(mine.merged(agreed))
        return agreed.end

    def _ended(self, requests: Requests) -> Outcome | None:
        patience = self.settings.patience
        if self.state.step >= self.steps and not self._validation_missing():
            return None
        if requests.stop:
            state, reason = STATES[CODES[requests.stop]]  # type: ignore[index]
            return Outcome(state, reason, EXIT_STOPPED)
        if requests.time_up:
            reason = f"trainer.max_time={self.settings.max_time:g} min is over"
            return Outcome(State.KILLED, reason, EXIT_STOPPED)
        if patience and self.state.worse >= patience:
            reason = f"early stop: {patience} validations without improvement"
            return Outcome(State.FINISHED, reason, EXIT_DONE)
        return None

    def _judge(self, loss: float) -> bool:
        best = self.state.best
        # What is not finite is never the best: nothing would be smaller than it.
        improved = math.isfinite(loss) and not (best and best["value"] <= loss)
        self.state.validated = self.state.step
        self.state.worse = 0 if improved else self.state.worse + 1
        if improved:
            self.state.best = {"metric": "val/loss", "value": loss, "step": self.state.step}
        return improved

    def _log_due(self, step: int) -> bool:
        return step % self.settings.log_interval == 0 or step == self.steps - 1

    def _validation_due(self) -> bool:
        done = self.state.step
        if self.validation is None:
            return False
        return done == self.steps or (
            self.val_interval is not None and done % self.val_interval == 0
        )

    def _validation_missing(self) -> bool:
        done = self.state.step
        return done > 0 and self._validation_due() and self.state.validated != done

    def _save_due(self) -> bool:
        interval, done = self.settings.save_interval, self.state.step
        return done == self.steps or (interval is not None and done % interval == 0)

    def _check_weights(self) -> None:
        """Nothing is judged or saved after an update that was not finite."""
        self.flush()
        if int(self.gradient.first_bad) >= 0:
            self._raise_if_bad()

    def _raise_if_bad(self) -> None:
        step = int(self.gradient.first_bad)
        if step < 0:
            return
        saved = self.checkpoints.steps()
        raise NonFiniteError(
            f"loss or gradient was NaN or infinite in update {step}, which saw the samples "
            f"{shown(self.stream.ids(step))}; "
            + (f"{found}; " if (found := self.stream.blame(step)) else "")
            + (f"the last good checkpoint is {saved[-1]}" if saved else "nothing was saved before")
        )

    def _validation(self, settings: Settings) -> Validation | None:
        if self.parts.val is None:
            return None
        return Validation(
            self.parts.val,
            self.parts.train,
            self.world,
            self.seeds,
            self.autocast,
            seed=settings.seed,
            batch_size=settings.data.batch_size,
            workers=settings.data.workers,
            on_bad=settings.data.on_bad,
            batches=settings.trainer.val_batches,
        )


def validation_interval(wanted: int | str | None, samples: int) -> int | None:
    """Updates between validations; `auto` goes by the number of training samples."""
    if wanted == "auto":
        return 500 if samples < 10_000 else 1000 if samples <= 100_000 else 2000
    return None if wanted is None else int(wanted)


def shown(ids: list[int]) -> str:
    """The first ids, and how many there are more."""
    text = ", ".join(map(str, ids[:64]))
    return text + (f" and {len(ids) - 64} more" if len(ids) > 64 else "")
