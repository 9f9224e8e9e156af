"""Finds the checkpoint that a stage starts from, and saves new ones.

A stage starts from its newest whole checkpoint: the one written by a conversion (iteration 0), one of its own, or, for
the first stage of a family, none. Rank 0 decides and broadcasts the decision, so all ranks start from the same point
or exit with the same error. A save is written to a staging directory, sealed with checksums, and published by one
rename.
"""

import multiprocessing
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import util
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megagrow.checkpoint.directory import (
    Ancestor,
    Manifest,
    check_lineage,
    integrity,
    iterations,
    read_manifest,
    recovery,
    write_manifest,
)
from megagrow.checkpoint.live.live import LiveCheckpoint, check_objects
from megagrow.checkpoint.tensors import GROWTH_RECORD
from megagrow.config import Family, Stage, check_same_model
from megagrow.config.function import filled
from megagrow.config.paths import FamilyPaths
from megagrow.data.stream import Position
from megagrow.errors import CheckpointError, LaunchError, UserError
from megagrow.history import (
    Change,
    StageHistory,
    current_settings,
    differences,
    history_of_manifest,
    refuse_difference,
)
from megagrow.log import get
from megagrow.parent_death import die_with_parent
from megagrow.plan import family_plan
from megagrow.runtime.process import Ranks
from megagrow.training.megatron_state import megatron_state
from megagrow.training.non_finite import TALLY_KEY, Tally

_log = get("training")
_Decision = TypeVar("_Decision")


@dataclass(frozen=True)
class Start:
    """The point that a stage starts or resumes from.

    Attributes:
        path: the checkpoint; None for fresh weights.
        iteration: iteration of the checkpoint.
        position: position in the data.
        consumed_samples, consumed_tokens: consumed by the family so far.
        flops, stage_tokens: spent on the stage so far.
        restores_rng: whether the checkpoint's RNG states fit this run.
        lineage: growth steps of the stage, oldest first.
        growth_record: text of the checkpoint's growth record, copied into later checkpoints.
        threads: number of CPU threads that the stage was trained with.
        history: history of the stage up to here; None for fresh weights.
        optimizer: whether the checkpoint has Adam's state; one that came without it starts with new moments.
    """

    path: Path | None
    iteration: int
    position: Position
    consumed_samples: int
    consumed_tokens: int
    flops: float
    restores_rng: bool
    lineage: tuple[Ancestor, ...] = ()
    growth_record: str | None = None
    threads: int | None = None
    stage_tokens: int = 0
    history: StageHistory | None = None
    optimizer: bool = True


FRESH_START = Start(None, 0, Position({}), 0, 0, 0.0, False)


def find_start(family: Family, index: int) -> Start:
    """Return the point that a stage starts or resumes from; called on one rank.

    Raises:
        CheckpointError: no whole checkpoint is left, or its shape differs from the stage's.
        LaunchError: a stage that grows has not been grown yet, or the checkpoint was made with other settings.
    """
    stage, save = family.stages[index], FamilyPaths(family).stage(index).checkpoints
    save.mkdir(parents=True, exist_ok=True)
    iterations.sweep(save)
    path = recovery.newest_whole(save, contents=family.checkpoint.verify_on_load)
    if path is None:
        if index == 0 and stage.load is None:
            return FRESH_START
        begins = f"begins with {stage.load}" if index == 0 else f"grows from {family.stages[index - 1].name!r}"
        raise LaunchError(
            f"{save}: stage {stage.name!r} {begins}, but has no checkpoint yet: "
            f"run `megagrow convert FAMILY --stage {stage.name}` first, or `megagrow run FAMILY`"
        )
    manifest = read_manifest(path)
    _check_shape(stage, manifest, path)
    if path != iterations.iteration_path(save, manifest.iteration):
        raise CheckpointError(
            f"{path}: contains iteration {manifest.iteration}; give the directory that name, or restore the right one"
        )
    history = history_of_manifest(manifest.model_dump(mode="json"))
    refuse_difference(family, index, history)
    objects = check_objects(path)
    layout = (manifest.layout.tensor_model_parallel_size, manifest.layout.pipeline_model_parallel_size)
    wanted = (stage.parallel.tensor_model_parallel_size, stage.parallel.pipeline_model_parallel_size)
    record_file = path / GROWTH_RECORD
    recovery.go_back(save, manifest.iteration)  # last, so that a refused start changes nothing
    return Start(
        path=path,
        iteration=manifest.iteration,
        position=Position.from_dict(manifest.position),
        consumed_samples=manifest.consumed_samples,
        consumed_tokens=manifest.consumed_tokens,
        flops=manifest.flops,
        # a converted checkpoint has no RNG states, and those of another layout do not match the ranks
        restores_rng=layout == wanted and any(key.startswith("rng_state/") for key in objects),
        lineage=manifest.lineage,
        growth_record=record_file.read_text() if record_file.is_file() else None,
        threads=manifest.threads,
        stage_tokens=history.tokens if manifest.history else _tokens_of(manifest, family, index),
        history=history,
        optimizer=manifest.optimizer,
    )


def _tokens_of(manifest: Manifest, family: Family, index: int) -> int:
    """The tokens that a stage was trained on according to an older manifest, which has only their FLOPs."""
    return round(manifest.flops / family_plan(family).stages[index].flops_per_token.exact)


def history_at(family: Family, index: int, start: Start, *, iteration: int, tokens: int, flops: float) -> StageHistory:
    """The history of a stage that has been trained from a start to an iteration with the family's settings.

    Args:
        family, index: the family, and the index of the stage.
        start: the point that it was trained from; settings that have changed since are listed as changes.
        iteration: steps taken by the stage.
        tokens, flops: spent on the stage.
    """
    before, now = start.history, current_settings(family, index)
    if before is None or "growth" not in before.settings:
        del now["growth"]
    found = differences(before.settings, now) if before else []
    changes = [Change(iteration=start.iteration, key=key, before=old, after=new) for key, old, new in found]
    return StageHistory(
        state="finished" if iteration >= now["iterations"] else "training",
        iteration=iteration,
        tokens=tokens,
        flops=flops,
        settings={**before.settings, **now} if before else now,
        origin=before.origin if before else None,
        changes=(*(before.changes if before else ()), *changes),
    )


def schedule_settings(family: Family, index: int) -> dict[str, float | int | str | bool]:
    """Everything that determines a stage's learning rate: its `Schedule`, its peak and its number of steps."""
    plan = family_plan(family).stages[index]
    fields = family.stages[index].schedule.model_dump(exclude={"max_lr", "override_opt_param_scheduler"})
    return {**fields, "max_lr": plan.peak_lr, "iterations": plan.iterations}


def _check_shape(stage: Stage, manifest: Manifest, path: Path) -> None:
    """Refuse weights of another model than the stage's; once training has started, every other change as well."""
    check_lineage(path, manifest)
    different = f"{path}: the checkpoint's shape differs from the stage's"
    try:
        check_same_model(manifest.shape, stage.model, ("the checkpoint", "the stage"))
    except ValueError as error:
        raise CheckpointError(f"{different}: {error}") from None
    before, now = filled(manifest.shape), filled(stage.model)
    if manifest.schedule is not None and before != now:
        names = [name for name in now if before[name] != now[name]]
        found = [f"{name} is {before[name]} in the checkpoint and {now[name]} in the stage" for name in names]
        raise CheckpointError(f"{different}: {', '.join(found)}")


def decide_on_main(ranks: Ranks, decision: Callable[[], _Decision]) -> _Decision:
    """Run `decision` on rank 0 and return its result on every rank; a UserError is raised on every rank."""
    answer: list[Any] = [None, None]
    if ranks.is_main:
        try:
            answer = [decision(), None]
        except UserError as error:
            answer = [None, error]
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    result: _Decision = answer[0]
    return result


class Saver:
    """Saves a stage's checkpoints, deletes old ones, and finishes background saves.

    Attributes:
        last: iteration of the newest published checkpoint.
        seconds: duration of its save, from the start until it was published; 0 before the first save.
    """

    def __init__(
        self, family: Family, index: int, ranks: Ranks, live: LiveCheckpoint, start: Start, tokenizer: Path | None
    ) -> None:
        self._family, self._stage = family, family.stages[index]
        self._ranks, self._live, self._start = ranks, live, start
        self._tokenizer, self._index, self._save = tokenizer, index, FamilyPaths(family).stage(index).checkpoints
        self.last: int | None = start.iteration if start.path is not None else None
        self.seconds = 0.0
        # Megatron-Core writes from forked processes; one that outlived a killed trainer would keep its lock
        util.register_after_fork(self, _die_with_trainer)

    def save(self, manifest: Manifest, tally: Tally) -> None:
        """Save the running state as the checkpoint of `manifest.iteration`; CheckpointError if it cannot be written."""
        final = iterations.iteration_path(self._save, manifest.iteration)
        started = time.monotonic()
        self._live.wait()
        staging = decide_on_main(self._ranks, lambda: _new_staging_or_error(final))

        def finish() -> None:
            decide_on_main(self._ranks, lambda: self._publish(staging, final, manifest, started))
            self.last, self.seconds = manifest.iteration, time.monotonic() - started

        common = megatron_state(self._family, self._index, manifest, self._tokenizer)
        if tally != Tally():
            common[TALLY_KEY] = tally.to_dict()
        try:
            self._live.save(staging, common, finish, background=self._family.checkpoint.async_save)
        except CheckpointError:
            if self._ranks.is_main:
                shutil.rmtree(staging, ignore_errors=True)
            raise

    def poll(self) -> None:
        """Publish background saves that have been written."""
        if self._family.checkpoint.async_save:
            self._live.poll()

    def wait(self) -> None:
        """Wait for all background saves and publish them."""
        self._live.wait()

    def manifest(self, history: StageHistory, position: Position, samples: int, tokens: int) -> Manifest:
        """Build the manifest of a checkpoint of this stage; samples and tokens are the family's."""
        return Manifest(
            family=self._family.name,
            stage=self._stage.name,
            iteration=history.iteration,
            shape=self._stage.model,
            layout=self._stage.parallel,
            precision=self._stage.precision,
            position=position.to_dict(),
            consumed_samples=samples,
            consumed_tokens=tokens,
            flops=history.flops,
            schedule=schedule_settings(self._family, self._index),
            threads=torch.get_num_threads() if self._ranks.device.type == "cpu" else None,
            lineage=self._start.lineage,
            history=history,
        )

    def _publish(self, staging: Path, final: Path, manifest: Manifest, started: float) -> None:
        try:
            write_manifest(staging, manifest)
            if self._start.growth_record is not None:
                (staging / GROWTH_RECORD).write_text(self._start.growth_record)
            integrity.seal(staging)
            if final.exists():  # put there by someone else while this run was training
                recovery.set_ahead_aside(self._save, manifest.iteration - 1)
            iterations.publish(staging, final)
            iterations.write_tracker(self._save, manifest.iteration)
            iterations.retain(self._save, self._family.checkpoint.keep)
        except OSError as error:
            raise CheckpointError(f"{staging}: {error.strerror}; earlier checkpoints are unchanged") from None
        _log.info("saved %s in %.1f s", final, time.monotonic() - started)


def _die_with_trainer(saver: Saver) -> None:
    """Called by multiprocessing at the start of every process forked from a trainer, directly or indirectly."""
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        die_with_parent(trainer.pid)


def _new_staging_or_error(final: Path) -> Path:
    try:
        return iterations.new_staging(final)
    except OSError as error:
        raise CheckpointError(f"{final.parent}: {error.strerror}; cannot save here") from None
