"""What a conversion into a torch_dist checkpoint should produce."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.convert.plan import StoredPrecision
from megagrow.errors import CheckpointError

_LONGEST_STAGING = len(".iter_0000000.converting")


@dataclass(frozen=True)
class TargetSpec:
    """The stage that a checkpoint becomes.

    Attributes:
        stage: name of the stage.
        shape, layout, growth, precision: of that stage.
        seed: of the random parts.
        source_shape: shape of the source, for checkpoints that do not record it.
        optimizer: also convert Adam's state.
        family: name of the family that the stage is in; None for a conversion from directory to directory.
        load: what the family names as the checkpoint that the stage begins with; None if it grows from another stage.
        schedule: "fresh": a grown checkpoint is iteration 0 and step 0 of its schedule and data, with its moments;
            "continue": it keeps its parent's iteration, and its places in both.
        ignored_arguments: saved arguments that Megatron-LM does not have and the user knows to be harmless.
    """

    stage: str
    shape: ModelShape
    layout: ParallelLayout
    growth: GrowthConfig
    precision: StoredPrecision
    seed: int
    source_shape: ModelShape | None = None
    optimizer: bool = True
    family: str | None = None
    load: str | None = None
    schedule: Literal["fresh", "continue"] = "fresh"
    ignored_arguments: tuple[str, ...] = ()


def check_place(target: Path) -> None:
    """Raise CheckpointError, before anything is read or written, unless a directory exists or can be made.

    Args:
        target: the directory that a conversion writes, or a directory of iterations.
    """
    try:
        os.fspath(target).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{target}: the name is not UTF-8, and records could not contain it") from None
    for place in (target, *target.absolute().parents):
        try:
            mode = os.stat(place).st_mode
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                raise CheckpointError(f"{place}: a link to {os.readlink(place)}, which does not exist") from None
            if len(os.fsencode(place.name)) + _LONGEST_STAGING > os.pathconf("/", "PC_NAME_MAX"):
                raise CheckpointError(f"{place.name:.60}...: the name is too long") from None
            continue
        except (OSError, ValueError) as error:
            what = error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(f"{str(place):.300}: {what}; choose another target") from None
        if not stat.S_ISDIR(mode):
            raise CheckpointError(f"{place}: not a directory; choose another target, or remove it")
        if not os.access(place, os.W_OK | os.X_OK):
            raise CheckpointError(f"{place}: not writable; choose another target")
        return
