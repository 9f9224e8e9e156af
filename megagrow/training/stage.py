"""One stage, from where it stands to its last step: the story of training.

Nothing here depends on whether the stage is new, grown or resumed: it begins at a `Start`, and the sample that a
step sees, its learning rate and its place in the records follow from the iteration alone. That is why a run that is
killed at any moment ends with the same weights, to the last bit. Going back from a loss that is not finite is one
more `Start`: the last checkpoint's, with the data further on.
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
from megagrow.data.prepare import read_prepared
from megagrow.data.stream import Position, TrainStream, validation_samples
from megagrow.errors import LaunchError, UserError
from megagrow.log import get
from megagrow.parent_death import die_with_parent
from megagrow.plan import StagePlan, family_plan, learning_rate
from megagrow.records import EvalRecord, RollBackRecord, StageRecord, StepRecord
from megagrow.runtime import process
from megagrow.runtime.process import Ranks
from megagrow.training.deadline import Deadline, end_of_time
from megagrow.training.engine import Engine, StepResult
from megagrow.training.non_finite import Tally, Verdict, judge, too_much
from megagrow.training.observers import Observers, observe
from megagrow.training.signals import StopRequest
from megagrow.training.state import Saver, Start, decide, find_start
from megagrow.training.watchdog import START_S, Watchdog

_log = get("training")
_LOCK_WAIT_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """How training a stage ended: finished, or stopped at an iteration by a signal or the time limit."""

    iteration: int
    finished: bool


def train_stage(family: Family, index: int) -> Outcome:
    """Train a stage of a family to its end, or until it is asked to stop; called on every rank.

    Raises:
        UserError: data, checkpoint, layout, disk or numbers are not as they must be; the same error on every rank.
        LaunchError: another rank is gone.
    """
    stage = family.stages[index]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    watchdog = Watchdog(family.training.hang_timeout_seconds, process.rank())
    try:
        watchdog.begin("joining the job", at_least=START_S)
        ranks = _join(family, stage)
        with _alone(FamilyPaths(family).stage(index).lock, ranks):
            watchdog.begin("finding the checkpoint to go on from", at_least=START_S)
            start = decide(ranks, lambda: find_start(family, index))
            plan = family_plan(family).stages[index]
            if start.iteration >= plan.iterations:
                decide(ranks, lambda: _close_records(family, index, plan, start.consumed_tokens, 0.0))
                return Outcome(start.iteration, finished=True)
            return _Run(family, index, ranks, start, plan, watchdog).to_the_end()
    except RuntimeError as error:
        if gone := process.lost_rank(error):
            raise LaunchError(f"stage {stage.name}: another rank is gone: {gone}; the same command goes on") from None
        raise
    finally:
        watchdog.begin("leaving the job")
        process.stop()
        watchdog.close()


def _join(family: Family, stage: Stage) -> Ranks:
    layout = stage.parallel
    return process.start(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        data_parallel_size=layout.data_parallel_size,
        seed=family.seed,
        # a little later than the watchdog, which knows more; and ranks do not all start at once
        timeout_minutes=max(1.25 * family.training.hang_timeout_seconds, START_S) / 60,
    )


class _Run:
    """One process's part in one run of a stage."""

    def __init__(
        self, family: Family, index: int, ranks: Ranks, start: Start, plan: StagePlan, watchdog: Watchdog
    ) -> None:
        begun = time.monotonic()
        watchdog.begin("loading data and model", at_least=START_S)
        self._family, self._index, self._stage = family, index, family.stages[index]
        self._ranks, self._plan, self._watchdog = ranks, plan, watchdog
        if start.threads is not None and ranks.device.type == "cpu":
            torch.set_num_threads(start.threads)  # as it began: another cut of the sums would be other bits
        self._prepared = read_prepared(family)
        self._validation = validation_samples(self._prepared, family)
        fresh = partial(fill_fresh, shape=self._stage.model, seed=family.seed)
        self._engine = Engine(self._stage, ranks, fill=fresh if start.path is None else None)
        self._live = LiveCheckpoint(self._engine.chunks, self._engine.optimizer)
        self._tally, self._observers = Tally(), Observers(())
        common = self._go_to(start, rolled_back=False)
        if start.iteration > 0:  # a converted checkpoint may still have its parent's tally
            self._tally = Tally.from_common(common)
        end = end_of_time(family.training.time_limit_minutes, psutil.Process().create_time(), os.environ)
        # until the first save is measured, it is taken to last as long as this
        self._deadline = Deadline(end, save=time.monotonic() - begun)

    def _go_to(self, start: Start, *, rolled_back: bool) -> Mapping[str, Any]:
        """Let weights, data and records be those of a start; return what its checkpoint holds unsharded."""
        self._start = start
        common: Mapping[str, Any] = {}
        if start.path is not None:
            common = self._live.load(start.path, optimizer=True, rng=start.same_grid)
            _log.info("stage %s goes on from %s", self._stage.name, start.path)
        self._stream = TrainStream(self._prepared, self._family, start.position)
        self._saver = Saver(self._family, self._index, self._ranks, self._live, start)
        self._observers.close()
        if self._ranks.is_main:
            self._observers = observe(
                self._family, self._index, start.iteration, self._plan.iterations, start.lineage,
                rolled_back=rolled_back,
            )  # fmt: skip
        return common

    def to_the_end(self) -> Outcome:
        """Step, validate and save until the stage is finished or somebody asks to stop."""
        begun, stop, iteration, end = time.time(), StopRequest(), self._start.iteration, self._plan.iterations
        try:
            self._before_the_first_step()
            while iteration < end:
                iteration += 1
                if not self._deadline.leaves_room():
                    stop.ask("the time limit")
                result = self._step(iteration, bool(stop))
                if not result.finite and self._judge(iteration, result) == "roll_back":
                    iteration = self._roll_back(iteration, result)
                    continue
                if iteration == end or iteration % self._family.evaluation.eval_interval == 0:
                    self._evaluate(iteration)
                if iteration == end or result.stop or iteration % self._family.checkpoint.save_interval == 0:
                    self._save(iteration)
                self._saver.poll()
                if result.stop and iteration < end:
                    self._wait_for_saves()
                    _log.warning("stopped by %s after iteration %d; saved", stop.name, iteration)
                    return Outcome(iteration, finished=False)
            self._wait_for_saves()
            tokens, seconds = self._tokens(end), time.time() - begun
            decide(self._ranks, lambda: _close_records(self._family, self._index, self._plan, tokens, seconds))
            return Outcome(end, finished=True)
        finally:
            self._observers.close()
            stop.restore()

    def _before_the_first_step(self) -> None:
        """Validate what the stage begins with; where it may have to go back, there must be something to go back to."""
        if self._start.iteration == 0:
            self._evaluate(0)
        if self._start.path is None and self._family.training.non_finite == "roll_back":
            self._save(0)

    def _step(self, iteration: int, stop: bool) -> StepResult:
        """Take the step that ends at `iteration`, and record it."""
        self._watchdog.begin(f"step {iteration}")
        begun, batch = time.monotonic(), self._stage.batch.global_batch_size
        rate = learning_rate(self._stage.schedule, self._plan.max_lr, iteration - 1, self._plan.iterations)
        first = (iteration - 1 - self._start.iteration) * batch
        result = self._engine.step(self._stream.sample, first, rate, stop=stop)
        seconds = time.monotonic() - begun
        self._deadline.took(step=seconds)
        if result.finite:
            self._tally = self._tally.taken()
            self._record_step(iteration, result, rate, seconds)
        return result

    def _record_step(self, iteration: int, result: StepResult, rate: float, seconds: float) -> None:
        self._observers.hear(
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
                tokens_per_second=self._stage.tokens_per_step / seconds,
                skipped=not result.finite,
            )
        )

    def _judge(self, iteration: int, result: StepResult) -> Verdict:
        """Decide, alike on every rank, about a step that was not finite; UserError where the family says so."""
        training = self._family.training
        verdict, self._tally = judge(training, self._tally)
        what = f"loss {result.loss} and gradient norm {result.grad_norm} at iteration {iteration}"
        if verdict == "stop":
            raise UserError(
                f"stage {self._stage.name}: {what}{too_much(training)}: the step was not taken; the last checkpoint "
                f"is iteration {self._saver.last}. Lower schedule.max_lr ({self._plan.max_lr:g}) or clip_grad, or set "
                "training.non_finite to skip or roll_back, and start again"
            )
        if verdict == "skip":
            _log.warning("%s: skipped (%d in a row)", what, self._tally.skipped_in_a_row)
            rate = learning_rate(self._stage.schedule, self._plan.max_lr, iteration - 1, self._plan.iterations)
            self._record_step(iteration, result, rate, math.inf)
        return verdict

    def _roll_back(self, iteration: int, result: StepResult) -> int:
        """Go back to the last checkpoint, but on with the data; return the checkpoint's iteration."""
        self._wait_for_saves()
        self._watchdog.begin(f"going back from step {iteration}")
        found = decide(self._ranks, lambda: find_start(self._family, self._index))
        behind = replace(
            found,
            position=self._position(iteration),
            consumed_samples=self._samples(iteration),
            consumed_tokens=self._tokens(iteration),
        )
        _log.warning(
            "loss %s and gradient norm %s at iteration %d: back to iteration %d, on with the data (number %d)",
            result.loss, result.grad_norm, iteration, found.iteration, self._tally.rolled_back,
        )  # fmt: skip
        self._go_to(behind, rolled_back=True)
        self._observers.hear(
            RollBackRecord(
                time=time.time(),
                stage=self._stage.name,
                iteration=found.iteration + 1,
                bad_iteration=iteration,
                loss=result.loss,
                grad_norm=result.grad_norm,
                passed_over=behind.consumed_samples - found.consumed_samples,
                number=self._tally.rolled_back,
            )
        )
        if found.iteration == 0:
            self._evaluate(0)  # its record went with those of the steps
        return found.iteration

    def _evaluate(self, iteration: int) -> None:
        self._watchdog.begin(f"validation after step {iteration}")
        begun = time.monotonic()
        loss = self._engine.evaluate(self._validation)
        self._deadline.took(validation=time.monotonic() - begun)
        self._observers.hear(
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
            iteration,
            self._position(iteration),
            self._samples(iteration),
            self._tokens(iteration),
            self._flops(iteration),
        )
        self._saver.save(manifest, self._tally)
        self._deadline.took(save=self._saver.seconds or None)  # 0: in the background, and not done yet

    def _wait_for_saves(self) -> None:
        self._watchdog.begin("the end of background saves")
        self._saver.wait()

    def _position(self, iteration: int) -> Position:
        """Where the data goes on after an iteration."""
        return self._stream.position_after((iteration - self._start.iteration) * self._stage.batch.global_batch_size)

    def _samples(self, iteration: int) -> int:
        done = iteration - self._start.iteration
        return self._start.consumed_samples + done * self._stage.batch.global_batch_size

    def _tokens(self, iteration: int) -> int:
        return self._start.consumed_tokens + (iteration - self._start.iteration) * self._stage.tokens_per_step

    def _flops(self, iteration: int) -> float:
        """Training FLOPs of this stage after an iteration, by the exact count."""
        return iteration * self._stage.tokens_per_step * self._plan.flops_per_token.exact


def _close_records(family: Family, index: int, plan: StagePlan, consumed_tokens: int, seconds: float) -> None:
    """Write the record of a finished stage, unless it is there: a kill may have come between it and the last save."""
    paths, stage = FamilyPaths(family).stage(index), family.stages[index]
    known = list(records.read(paths.records))
    if any(isinstance(record, StageRecord) for record in known):
        return
    losses = {record.iteration: record.loss for record in known if isinstance(record, EvalRecord)}
    tokens = plan.iterations * stage.tokens_per_step
    records.append(
        paths.records,
        StageRecord(
            time=time.time(),
            stage=stage.name,
            iterations=plan.iterations,
            parameters=plan.parameters,
            stage_tokens=tokens,
            consumed_tokens=consumed_tokens,
            flops=tokens * plan.flops_per_token.exact,
            first_loss=losses.get(0),
            final_loss=losses.get(plan.iterations, math.nan),
            checkpoint=str(iterations.iteration_path(paths.checkpoints, plan.iterations)),
            seconds=seconds,
        ),
    )


@contextmanager
def _alone(lock: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the stage's lock on rank 0; a run that was just killed may need a moment to let go of it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as stream:
        decide(ranks, lambda: _lock(stream.fileno(), lock))
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
