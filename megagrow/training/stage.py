"""Train one stage from its starting point to its last step: the training loop.

The loop is the same for a new, a grown and a resumed stage: it starts from a `Start`, and the samples of a step, its
learning rate and its record follow from the iteration alone. That is why a run that is killed at any moment ends with
the same weights, to the last bit. A roll back after a loss that is not finite is one more `Start`: the last
checkpoint, with the data continuing after the bad step.
"""

import fcntl
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from megagrow import records
from megagrow.checkpoint.directory import Manifest, iterations
from megagrow.checkpoint.live.live import LiveCheckpoint, fill_fresh
from megagrow.config import Family, Stage
from megagrow.config.paths import FamilyPaths
from megagrow.data.record import read_prepared
from megagrow.data.stream import Position, TrainStream, validation_samples
from megagrow.errors import LaunchError, UserError
from megagrow.history import StageHistory, refuse_edits, write_history
from megagrow.log import get
from megagrow.parent_death import die_with_parent
from megagrow.plan import StagePlan, family_plan, learning_rate
from megagrow.records import EvalRecord, RollBackRecord, StageRecord, StepRecord
from megagrow.runtime import process
from megagrow.runtime.process import Ranks
from megagrow.training.deadline import Deadline, exit_time
from megagrow.training.engine import Engine, StepResult
from megagrow.training.non_finite import Action, Tally, choose_action, limit_reached
from megagrow.training.observers import Observers, make_observers
from megagrow.training.signals import StopRequest
from megagrow.training.state import Saver, Start, decide_on_main, find_start, history_at
from megagrow.training.watchdog import START_S, Watchdog

_log = get("training")
_LOCK_WAIT_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """Result of training a stage: finished, or stopped at an iteration by a signal or the time limit."""

    iteration: int
    finished: bool


def train_stage(family: Family, index: int) -> Outcome:
    """Train a stage of a family to its last step, or until a stop is requested; called on every rank.

    Raises:
        UserError: data, checkpoint, layout, disk or loss is faulty; the same error on every rank.
        LaunchError: another rank died, or a stage of the family was made with other settings than it has now.
    """
    stage = family.stages[index]
    if stage.finished:
        raise LaunchError(f"stages.{index} ({stage.name!r}) is finished as it was loaded: there is nothing to train")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    watchdog = Watchdog(family.training.hang_timeout_seconds, process.rank())
    try:
        watchdog.begin("joining the job", at_least=START_S)
        ranks = _join(family, stage)
        decide_on_main(ranks, lambda: refuse_edits(family))  # before the lock, which would make the stage look alive
        _log.info("stage %s: %s", stage.name, ranks.describe())
        with _stage_lock(FamilyPaths(family).stage(index).lock, ranks):
            watchdog.begin("finding the checkpoint to resume from", at_least=START_S)
            start = decide_on_main(ranks, lambda: find_start(family, index))
            plan = family_plan(family).stages[index]
            history = decide_on_main(ranks, lambda: _begin_history(family, index, start))
            if start.iteration >= plan.iterations:
                decide_on_main(ranks, lambda: _close_records(family, index, history, start.consumed_tokens, 0.0))
                return Outcome(start.iteration, finished=True)
            return _StageRun(family, index, ranks, start, plan, watchdog).run()
    except RuntimeError as error:
        if failure := process.describe_lost_rank(error):
            raise LaunchError(
                f"stage {stage.name}: another rank died: {failure}; run the same command again to resume"
            ) from None
        raise
    finally:
        watchdog.begin("leaving the job")
        process.stop()
        watchdog.close()


def _join(family: Family, stage: Stage) -> Ranks:
    layout = stage.parallel
    return process.start(
        **layout.groups,
        seed=family.seed,
        # a little after the watchdog, whose error is more specific; ranks do not all start at once
        timeout_minutes=max(1.25 * family.training.hang_timeout_seconds, START_S) / 60,
    )


class _StageRun:
    """One process's share of one run of a stage."""

    def __init__(
        self, family: Family, index: int, ranks: Ranks, start: Start, plan: StagePlan, watchdog: Watchdog
    ) -> None:
        started = time.monotonic()
        watchdog.begin("loading data and model", at_least=START_S)
        self._family, self._index, self._stage = family, index, family.stages[index]
        self._ranks, self._plan, self._watchdog = ranks, plan, watchdog
        if start.threads is not None and ranks.device.type == "cpu":
            # as before: sums split over another number of threads round differently
            torch.set_num_threads(start.threads)
        source = "new weights" if start.path is None else f"the checkpoint {start.path}"
        _log.info("stage %s: loading its data, the model and %s", self._stage.name, source)
        # one rank scans a pair that changed since it was scanned; an error is raised on all
        decide_on_main(ranks, lambda: read_prepared(family, check_ids=True))
        self._prepared = read_prepared(family)
        self._validation = validation_samples(self._prepared, family)
        fresh = partial(fill_fresh, shape=self._stage.model, seed=family.seed)
        self._engine = Engine(self._stage, ranks, fill=fresh if start.path is None else None)
        self._live = LiveCheckpoint(self._engine.chunks, self._engine.optimizer)
        self._tally, self._observers = Tally(), Observers(())
        common = self._load(start, rolled_back=False)
        if start.iteration > 0:  # a converted checkpoint may still hold its parent's tally
            self._tally = Tally.from_common(common)
        end = exit_time(family.training.time_limit_minutes, psutil.Process().create_time(), os.environ)
        # until a save has been measured, assume that it takes as long as loading did
        self._deadline = Deadline(end, save=time.monotonic() - started)

    def _load(self, start: Start, *, rolled_back: bool) -> Mapping[str, Any]:
        """Load weights, data position and records of a start; return its checkpoint's unsharded state."""
        self._start = start
        common: Mapping[str, Any] = {}
        if start.path is not None:
            common = self._live.load(start.path, optimizer=start.optimizer, rng=start.restores_rng)
            moments = "" if start.optimizer else ", which has no moments: Adam begins with new ones"
            _log.info("stage %s resumes from %s%s", self._stage.name, start.path, moments)
        self._stream = TrainStream(self._prepared, self._family, start.position, self._index)
        tokenizer = self._prepared.tokenizer
        self._saver = Saver(self._family, self._index, self._ranks, self._live, start, tokenizer)
        self._observers.close()
        if self._ranks.is_main:
            self._observers = make_observers(
                self._family, self._index, start.iteration, self._plan.iterations, start.lineage,
                rolled_back=rolled_back,
            )  # fmt: skip
        return common

    def run(self) -> Outcome:
        """Step, validate and save until the stage is finished or a stop is requested."""
        started, stop, iteration, end = time.time(), StopRequest(), self._start.iteration, self._plan.iterations
        try:
            self._before_the_first_step()
            while iteration < end:
                iteration += 1
                if not self._deadline.allows_another_step():
                    stop.request("the time limit")
                result = self._step(iteration, bool(stop))
                if not result.finite and self._handle_non_finite(iteration, result) == "roll_back":
                    iteration = self._roll_back(iteration, result)
                    continue
                if iteration == end or iteration % self._family.evaluation.eval_interval == 0:
                    self._evaluate(iteration)
                if iteration == end or result.stop or iteration % self._family.checkpoint.save_interval == 0:
                    self._save(iteration)
                self._saver.poll()
                if result.stop and iteration < end:
                    self._wait_for_saves()
                    _log.warning("stopped by %s after iteration %d; saved", stop.reason, iteration)
                    return Outcome(iteration, finished=False)
            self._wait_for_saves()
            history, tokens, seconds = self._history(end), self._tokens(end), time.time() - started
            decide_on_main(self._ranks, lambda: _close_records(self._family, self._index, history, tokens, seconds))
            return Outcome(end, finished=True)
        finally:
            self._observers.close()
            stop.restore()

    def _before_the_first_step(self) -> None:
        """Validate the initial weights, and save them where a roll back may need them."""
        if self._start.iteration == 0:
            self._evaluate(0)
        if self._start.path is None and self._family.training.non_finite == "roll_back":
            self._save(0)

    def _step(self, iteration: int, stop: bool) -> StepResult:
        """Take and record the step that ends at `iteration`."""
        self._watchdog.begin(f"step {iteration}")
        started, batch = time.monotonic(), self._stage.batch.global_batch_size
        rate = learning_rate(self._stage.schedule, self._plan.peak_lr, iteration - 1, self._plan.iterations)
        first = (iteration - 1 - self._start.iteration) * batch
        result = self._engine.step(self._stream.sample, first, rate, stop=stop)
        seconds = time.monotonic() - started
        self._deadline.record_times(step=seconds)
        if result.finite:
            self._tally = self._tally.taken()
            self._record_step(iteration, result, rate, seconds)
        return result

    def _record_step(self, iteration: int, result: StepResult, rate: float, seconds: float) -> None:
        self._observers.on_record(
            StepRecord(
                time=time.time(),
                stage=self._stage.name,
                iteration=iteration,
                loss=result.loss,
                grad_norm=result.grad_norm,
                learning_rate=rate,
                consumed_samples=self._samples(iteration),
                consumed_tokens=self._tokens(iteration),
                flops=self._flops(iteration),
                stage_tokens=self._stage_tokens(iteration),
                tokens_per_second=self._stage.tokens_per_step / seconds,
                skipped=not result.finite,
            )
        )

    def _handle_non_finite(self, iteration: int, result: StepResult) -> Action:
        """Choose the action for a step that was not finite, the same on every rank; UserError for the action `stop`."""
        training = self._family.training
        action, self._tally = choose_action(training, self._tally)
        what = f"loss {result.loss} and gradient norm {result.grad_norm} at iteration {iteration}"
        if action == "stop":
            raise UserError(
                f"stage {self._stage.name}: {what}{limit_reached(training)}: the step was not taken; the last "
                f"checkpoint is iteration {self._saver.last}. Lower schedule.max_lr ({self._plan.peak_lr:g}) or "
                "clip_grad, or set training.non_finite to skip or roll_back, and start again"
            )
        if action == "skip":
            _log.warning("%s: skipped (%d in a row)", what, self._tally.skipped_in_a_row)
            rate = learning_rate(self._stage.schedule, self._plan.peak_lr, iteration - 1, self._plan.iterations)
            self._record_step(iteration, result, rate, math.inf)
        return action

    def _roll_back(self, iteration: int, result: StepResult) -> int:
        """Go back to the last checkpoint, but continue with the data; return the checkpoint's iteration."""
        self._wait_for_saves()
        self._watchdog.begin(f"going back from step {iteration}")
        found = decide_on_main(self._ranks, lambda: find_start(self._family, self._index))
        start = replace(
            found,
            position=self._position(iteration),
            consumed_samples=self._samples(iteration),
            consumed_tokens=self._tokens(iteration),
            stage_tokens=self._stage_tokens(iteration),
        )
        _log.warning(
            "loss %s and gradient norm %s at iteration %d: rolling back to iteration %d (roll back number %d), "
            "continuing with the data after the bad step",
            result.loss, result.grad_norm, iteration, found.iteration, self._tally.rolled_back,
        )  # fmt: skip
        self._load(start, rolled_back=True)
        self._observers.on_record(
            RollBackRecord(
                time=time.time(),
                stage=self._stage.name,
                iteration=found.iteration + 1,
                bad_iteration=iteration,
                loss=result.loss,
                grad_norm=result.grad_norm,
                passed_over=start.consumed_samples - found.consumed_samples,
                number=self._tally.rolled_back,
            )
        )
        if found.iteration == 0:
            self._evaluate(0)  # its record was removed with those of the steps
        return found.iteration

    def _evaluate(self, iteration: int) -> None:
        self._watchdog.begin(f"validation after step {iteration}")
        started = time.monotonic()
        loss = self._engine.evaluate(self._validation)
        self._deadline.record_times(validation=time.monotonic() - started)
        self._observers.on_record(
            EvalRecord(
                time=time.time(),
                stage=self._stage.name,
                iteration=iteration,
                loss=loss,
                samples=len(self._validation),
                consumed_tokens=self._tokens(iteration),
                flops=self._flops(iteration),
            )
        )

    def _save(self, iteration: int) -> None:
        self._watchdog.begin(f"the save of iteration {iteration}")
        manifest: Manifest = self._saver.manifest(
            self._history(iteration),
            self._position(iteration),
            self._samples(iteration),
            self._tokens(iteration),
        )
        self._saver.save(manifest, self._tally)
        self._deadline.record_times(save=self._saver.seconds or None)  # 0: a background save that has not finished

    def _wait_for_saves(self) -> None:
        self._watchdog.begin("the end of background saves")
        self._saver.wait()

    def _position(self, iteration: int) -> Position:
        """Position in the data after an iteration."""
        return self._stream.position_after((iteration - self._start.iteration) * self._stage.batch.global_batch_size)

    def _samples(self, iteration: int) -> int:
        done = iteration - self._start.iteration
        return self._start.consumed_samples + done * self._stage.batch.global_batch_size

    def _tokens(self, iteration: int) -> int:
        return self._start.consumed_tokens + (iteration - self._start.iteration) * self._stage.tokens_per_step

    def _stage_tokens(self, iteration: int) -> int:
        """Tokens that this stage was trained on up to an iteration, with those that roll backs passed over."""
        return self._start.stage_tokens + (iteration - self._start.iteration) * self._stage.tokens_per_step

    def _flops(self, iteration: int) -> float:
        """Training FLOPs spent on this stage up to an iteration, by the exact count."""
        # one product, so that a run that was resumed has the same bits
        return self._stage_tokens(iteration) * self._plan.flops_per_token.exact

    def _history(self, iteration: int) -> StageHistory:
        tokens, flops = self._stage_tokens(iteration), self._flops(iteration)
        return history_at(self._family, self._index, self._start, iteration=iteration, tokens=tokens, flops=flops)


def _begin_history(family: Family, index: int, start: Start) -> StageHistory:
    """Write what the stage is trained with from here on, where `status` and `report` find it; return it."""
    history = history_at(family, index, start, iteration=start.iteration, tokens=start.stage_tokens, flops=start.flops)
    write_history(FamilyPaths(family).stage(index), history)
    return history


def _close_records(family: Family, index: int, history: StageHistory, consumed_tokens: int, seconds: float) -> None:
    """Write the record of a finished stage, unless it exists: an earlier run may have been killed before writing it."""
    paths, stage = FamilyPaths(family).stage(index), family.stages[index]
    write_history(paths, history)
    known = list(records.read(paths.records))
    # a stage that got more tokens after its end has the record of that end, too
    if any(isinstance(record, StageRecord) and record.iterations >= history.iteration for record in known):
        return
    losses = {record.iteration: record.loss for record in known if isinstance(record, EvalRecord)}
    records.append(
        paths.records,
        StageRecord(
            time=time.time(),
            stage=stage.name,
            iterations=history.iteration,
            parameters=family_plan(family).stages[index].parameters,
            stage_tokens=history.tokens,
            consumed_tokens=consumed_tokens,
            flops=history.flops,
            first_loss=losses.get(0),
            final_loss=losses.get(history.iteration, math.nan),
            checkpoint=str(iterations.iteration_path(paths.checkpoints, history.iteration)),
            seconds=seconds,
        ),
    )


@contextmanager
def _stage_lock(lock: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the stage's lock on rank 0; a run that was just killed may need a moment to release it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as stream:
        decide_on_main(ranks, lambda: _lock(stream.fileno(), lock))
        yield


def _lock(handle: int, lock: Path) -> None:
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > deadline:
                raise LaunchError(f"{lock}: another process is training this stage; stop it first") from None
            time.sleep(0.5)
