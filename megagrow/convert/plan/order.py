"""The order of a conversion, as plain values: any process that sees the files can plan the same work from it.

The order is stored in the journal. Workers read it there, no matter which process started the conversion. A later run
compares its own order with it, so that a conversion is only finished under the plan that it was started with.
"""

import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

import megagrow
from megagrow.checkpoint.index import DType, OpenCheckpoint
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.convert.plan.masters import differing_master, has_masters
from megagrow.convert.plan.plan import ConversionPlan, plan_conversion
from megagrow.errors import CheckpointError
from megagrow.growth.maps import GrowthStep
from megagrow.growth.operators import plan_growth

StoredPrecision = Literal["bf16", "fp16", "fp32"]
Format = Literal["torch_dist", "huggingface", "legacy"]
DTYPE_OF_PRECISION = {"bf16": DType.BFLOAT16, "fp16": DType.FLOAT16, "fp32": DType.FLOAT32}
REVISION = 2
"""Version of how targets are cut into files. A conversion started under another version is not resumed."""


class Order(BaseModel):
    """All settings of a conversion that determine its result.

    Attributes:
        source: checkpoint to read.
        to: format of the target; the older Megatron format cannot be grown into.
        small, large: shapes of source and target.
        growth: operators and their options.
        layout, precision: of the target.
        optimizer: also convert Adam's state.
        sha256: use sha256 in integrity.json instead of a faster hash.
        seed: of the random parts.
        tokenizer: tokenizer file or directory to copy into a Hugging Face target.
        ignored_arguments: saved arguments that Megatron-LM does not have and the user knows to be harmless.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Path
    to: Format = "torch_dist"
    small: ModelShape
    large: ModelShape
    growth: GrowthConfig
    layout: ParallelLayout
    precision: StoredPrecision
    optimizer: bool = True
    sha256: bool = False
    seed: int = 0
    tokenizer: Path | None = None
    ignored_arguments: tuple[str, ...] = ()

    @property
    def grows(self) -> bool:
        """Whether the target is another shape than the source."""
        return self.small != self.large

    @property
    def step(self) -> GrowthStep:
        """The growth step with its maps."""
        return plan_growth(self.small, self.large, self.growth, self.seed)

    def conversion(self, opened: OpenCheckpoint) -> ConversionPlan:
        """Plan the conversion; CheckpointError if the source does not hold exactly the tensors of its shape."""
        source = opened.source
        dtype = DTYPE_OF_PRECISION[self.precision]
        masters = has_masters(source.tensors, self.small)
        differing = differing_master(source, self.small, quantized=_is_quantized(opened)) if masters else None
        if differing is not None and self.optimizer:
            raise CheckpointError(
                f"{differing}: the weights are not the optimizer's masters, so one of them is wrong (Megatron-Core "
                "saves masters shifted where an optimizer has several padded buckets); --no-optimizer takes the weights"
            )
        return plan_conversion(
            source.tensors,
            self.step,
            self.layout,
            dtype,
            optimizer=self.optimizer,
            masters=masters and differing is None,
        )

    def identity(self, files: Mapping[str, "FileState"]) -> dict[str, Any]:
        """Everything that determines the target's bytes, including the source's files (their `file_states`)."""
        return {
            "order": self.model_dump(mode="json"),
            SOURCE_FILES: files,
            "revision": REVISION,
            "version": megagrow.__version__,
        }


def _is_quantized(opened: OpenCheckpoint) -> bool:
    """Whether the model's own weights were 8- or 4-bit numbers, which a checkpoint stores in 16 bits."""
    args = opened.common.get("args")
    return isinstance(args, dict) and bool(args.get("fp8_param_gather") or args.get("fp4_param_gather"))


SOURCE_FILES = "source files"
FileState = dict[str, int | str]
_STATE_OF_OLD = re.compile(r"(\d+) bytes at (\d+)")


def same_settings(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity without the source's files, as this version writes it: settings that an older version did not have
    are at their defaults. `changed_files` compares the files.
    """
    found = {key: value for key, value in identity.items() if key != SOURCE_FILES}
    with suppress(KeyError, ValidationError):
        found["order"] = Order.model_validate(found["order"]).model_dump(mode="json")
    return found


def changed_files(before: Mapping[str, Any], now: Mapping[str, FileState]) -> list[str]:
    """The files that are not the same any more, are new or are gone, sorted.

    Only what both sides know is compared: an older version recorded size and modification time alone, as one text.
    Inodes are compared on one device of one machine, since some file systems number them anew at each mount.
    """
    return sorted(
        name
        for name in {*before, *now}
        if name not in before or name not in now or not _is_same(_known_state(before[name]), now[name])
    )


def _known_state(recorded: Any) -> FileState:
    if isinstance(recorded, str) and (match := _STATE_OF_OLD.fullmatch(recorded)):
        return {"size": int(match[1]), "modified": int(match[2])}
    return recorded if isinstance(recorded, dict) else {"size": "unknown"}


def _is_same(before: FileState, now: FileState) -> bool:
    known = before.keys() & now.keys() - {"device"}
    if before.get("device") != now.get("device"):
        known -= {"inode"}
    return bool(known) and all(before[key] == now[key] for key in known)


def file_states(path: Path) -> dict[str, FileState]:
    """The state of every file of a checkpoint, to notice when one is written to or replaced.

    A modification time can be set back, by `rsync --times` or `touch -r`; the time of the last change cannot (the
    ctime; it also moves when a file is renamed, linked or gets other permissions).
    """
    found: dict[str, FileState] = {}
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = Path(folder) / name
            try:
                status = file.stat()
            except OSError:  # removed meanwhile, or a dangling link
                continue
            found[str(file.relative_to(path))] = {
                "size": status.st_size,
                "modified": status.st_mtime_ns,
                "changed": status.st_ctime_ns,
                "inode": status.st_ino,
                "device": f"{socket.gethostname()}:{status.st_dev}",
            }
    return found
