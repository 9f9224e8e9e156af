"""One stage, from where it stands to its last step: the story of training.

Nothing here depends on whether the stage is new, grown or resumed: it begins at a `Start`, and the sample that a
step sees, its learning rate and its place in the records follow from the iteration alone. That is why a run that is
killed at any moment ends with the same weights, to the last bit.
"""

import fcntl
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megagrow import records
from megagrow.checkpoint import directory
from megagrow.checkpoint.manifest import Manifest
from megagrow.checkpoint.megatron_live import LiveCheckpoint, fill_fresh
from megagrow.config import Family
from megagrow.config.paths import FamilyPaths
from megagrow.data.prepare import read_prepared
from megagrow.data.stream import TrainStream, validation_samples
from megagrow.errors import LaunchError, UserError
from megagrow.lifeline import die_with_parent
from megagrow.log import get
from megagrow.plan import StagePlan, family_plan, learning_rate
from megagrow.records import EvalRecord, StageRecord, StepRecord
from megagrow.runtime import process
from megagrow.runtime.process import Ranks
from megagrow.training.engine import Engine
from megagrow.training.observers import Observers, observe
from megagrow.training.signals import StopRequest
from megagrow.training.state import Saver, Start, decide, find_start

_log = get("training")
_LOCK_WAIT_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """How training a stage ended: finished, or stopped at an iteration by a signal."""

    iteration: int
    finished: bool


def train_stage(family: Family, index: int) -> Outcome:
    """Train a stage of a family to its end, or until a signal asks to stop; called on every rank.

    Raises:
        UserError: data, checkpoint, layout or disk are not as they must be; the same error on every rank.
    """
    stage, paths = family.stages[index], FamilyPaths(family).stage(index)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    layout = stage.parallel
    ranks = process.start(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        data_parallel_size=layout.data_parallel_size,
        seed=family.seed,
    )
    try:
        with _alone(paths.lock, ranks):
            start = decide(ranks, lambda: find_start(family, index))
            plan = family_plan(family).stages[index]
            if start.iteration >= plan.iterations:
                decide(ranks, lambda: _close_records(family, index, plan, start.consumed_tokens, 0.0))
                return Outcome(start.iteration, finished=True)
            return _Run(family, index, ranks, start, plan).to_the_end()
    finally:
        process.stop()


class _Run:
    """One process's part in one run of a stage."""

    def __init__(self, family: Family, index: int, ranks: Ranks, start: Start, plan: StagePlan) -> None:
        self._family, self._index, self._stage = family, index, family.stages[index]
        self._ranks, self._start, self._plan = ranks, start, plan
        if start.threads is not None and ranks.device.type == "cpu":
            torch.set_num_threads(start.threads)  # as it began: another cut of the sums would be other bits
        prepared = read_prepared(family)
        self._stream = TrainStream(prepared, family, start.position)
        self._validation = validation_samples(prepared, family)
        fresh = partial(fill_fresh, shape=self._stage.model, seed=family.seed)
        self._engine = Engine(self._stage, ranks, fill=fresh if start.path is None else None)
        live = LiveCheckpoint(self._engine.chunks, self._engine.optimizer)
        if start.path is not None:
            live.load(start.path, optimizer=True, rng=start.same_grid)
            _log.info("stage %s goes on from %s", self._stage.name, start.path)
        self._saver = Saver(family, index, ranks, live, start)
        self._paths = FamilyPaths(family).stage(index)
        self._observers = Observers(())
        if ranks.is_main:
            self._observers = observe(family, index, self._paths, start.iteration, plan.iterations, start.lineage)

    def to_the_end(self) -> Outcome:
        """Step, validate and save until the stage is finished or a signal comes."""
        begun, stop, family = time.time(), StopRequest(), self._family
        try:
            if self._start.iteration == 0:
                self._evaluate(0)
            for iteration in range(self._start.iteration + 1, self._plan.iterations + 1):
                stopping = self._step(iteration, bool(stop))
                last = iteration == self._plan.iterations
                if last or iteration % family.evaluation.eval_interval == 0:
                    self._evaluate(iteration)
                if last or stopping or iteration % family.checkpoint.save_interval == 0:
                    self._save(iteration)
                self._saver.poll()
                if stopping and not last:
                    self._saver.wait()
                    _log.warning("stopped by %s after iteration %d; saved", stop.name, iteration)
                    return Outcome(iteration, finished=False)
            self._saver.wait()
            tokens, seconds = self._tokens(self._plan.iterations), time.time() - begun
            decide(self._ranks, lambda: _close_records(family, self._index, self._plan, tokens, seconds))
            return Outcome(self._plan.iterations, finished=True)
        finally:
            self._observers.close()
            stop.restore()

    def _step(self, iteration: int, stop: bool) -> bool:
        """Take the step that ends at `iteration`; return whether any rank was asked to stop."""
        begun, batch = time.monotonic(), self._stage.batch.global_batch_size
        rate = learning_rate(self._stage.schedule, self._plan.max_lr, iteration - 1, self._plan.iterations)
        first = (iteration - 1 - self._start.iteration) * batch
        result = self._engine.step(self._stream.sample, first, rate, stop=stop)
        if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
            raise UserError(
                f"stage {self._stage.name}: loss {result.loss} and gradient norm {result.grad_norm} at iteration "
                f"{iteration}: not saved; the last checkpoint is iteration {self._saver.last}. Lower schedule.max_lr "
                f"({self._plan.max_lr:g}) or clip_grad, and start again"
            )
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
                tokens_per_second=self._stage.tokens_per_step / (time.monotonic() - begun),
            )
        )
        return result.stop

    def _evaluate(self, iteration: int) -> None:
        loss = self._engine.evaluate(self._validation)
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
        done = iteration - self._start.iteration
        position = self._stream.position_after(done * self._stage.batch.global_batch_size)
        manifest: Manifest = self._saver.manifest(
            iteration, position, self._samples(iteration), self._tokens(iteration), self._flops(iteration)
        )
        self._saver.save(manifest)

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
            checkpoint=str(directory.iteration_path(paths.checkpoints, plan.iterations)),
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
