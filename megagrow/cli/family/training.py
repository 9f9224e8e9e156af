"""The verbs data and train; heavy subpackages are imported after the yaml has been checked."""

import contextlib
import operator
import os
from pathlib import Path

from megagrow import extras, log, slurm_step
from megagrow.cli.output import show_note
from megagrow.cli.stages import stage_index
from megagrow.config import Family, load
from megagrow.errors import DataError


def prepare_data(file: Path, overrides: list[str]) -> None:
    """Make a family's tokenizer and tokens."""
    family = load(file, overrides)
    from megagrow.data.prepare import prepare

    prepared = prepare(family)
    for name, tokens in prepared.tokens.items():
        print(f"{name}: {tokens:,} tokens in {prepared.documents[name]:,} documents at {prepared.prefixes[name]}")
        if name in prepared.taken:
            print(f"{name}: {prepared.taken[name]}")
    show_repeated_sources(family)


def show_repeated_sources(family: Family) -> None:
    """Show which sources a family reads more than once, as far as their tokens are there."""
    from megagrow.data.record import repeated_sources
    from megagrow.plan import family_plan

    batches = [stage.batch.global_batch_size * stage.model.seq_length for stage in family.stages]
    steps = [stage.iterations for stage in family_plan(family).stages]
    with contextlib.suppress(DataError):  # a plan needs no data; the verb that does will tell
        for line in repeated_sources(family, sum(map(operator.mul, batches, steps))):
            show_note(line)


def train_stage(file: Path, overrides: list[str], stage: str) -> None:
    """Train one stage on this rank; if srun started one task per rank, the rank is read from Slurm's variables."""
    if slurm_step.has_several_tasks() and "RANK" not in os.environ:
        from megagrow.runtime import slurm

        if slurm.set_torchrun_variables():
            log.setup()  # again, because only now is the rank known
    family = load(file, overrides)
    index = stage_index(family, stage)
    # a tracker that fails is only disabled: without this, the curves would be missed when the training has ended
    if family.trackers.tensorboard and not extras.is_installed("tensorboard"):
        raise extras.missing("tensorboard", "trackers.tensorboard")
    from megagrow.training.stage import train_stage as train

    train(family, index)
