"""The verbs data and train; heavy subpackages are imported after the yaml has been checked."""

import os
from pathlib import Path

from megagrow import log, slurm_step
from megagrow.cli.stages import stage_index
from megagrow.config import load


def prepare_data(file: Path, overrides: list[str]) -> None:
    """Make a family's tokenizer and tokens."""
    family = load(file, overrides)
    from megagrow.data.prepare import prepare

    prepared = prepare(family)
    for name, tokens in prepared.tokens.items():
        print(f"{name}: {tokens:,} tokens in {prepared.documents[name]:,} documents at {prepared.prefixes[name]}")


def train_stage(file: Path, overrides: list[str], stage: str) -> None:
    """Train one stage on this rank; if srun started one task per rank, the rank is read from Slurm's variables."""
    if slurm_step.has_several_tasks() and "RANK" not in os.environ:
        from megagrow.runtime import slurm

        if slurm.set_torchrun_variables():
            log.setup()  # again, because only now is the rank known
    family = load(file, overrides)
    index = stage_index(family, stage)
    from megagrow.training.stage import train_stage as train

    train(family, index)
