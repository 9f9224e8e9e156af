"""Proves a checkpoint whole: it has every tensor of its shape exactly once, in its shape, finite, and unchanged.

Reads one layer of one tensor at a time, without a model. Findings are returned, not printed; an empty list of faults
is the proof.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megagrow.checkpoint.directory import MANIFEST, check_format, check_lineage, integrity, read_manifest
from megagrow.checkpoint.formats import open_checkpoint
from megagrow.checkpoint.formats.torch_dist import TorchDistReader
from megagrow.checkpoint.index import Box, OpenCheckpoint, Source, TensorInfo, slice_text, split_evenly, whole_box
from megagrow.checkpoint.tensors import check_tensors, optimizer_key
from megagrow.config import ModelShape, check_same_model
from megagrow.errors import CheckpointError


@dataclass
class Findings:
    """The result of a verification.

    Attributes:
        tensors, values, bytes: how much was read.
        objects: number of small objects that were opened with the allow-list.
        checks: the checks that passed.
        faults: what is wrong, a line each.
        unchecked: what could not be checked, because a foreign checkpoint does not record it.
    """

    tensors: int = 0
    values: int = 0
    bytes: int = 0
    objects: int = 0
    checks: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def attempt(self, name: str, check: Callable[[], None]) -> bool:
        """Carry out a check, and keep its name if it passes, or its error; return whether it passed."""
        try:
            check()
        except CheckpointError as error:
            self.faults.append(str(error))
            return False
        self.checks.append(name)
        return True


def verify(
    path: Path,
    parent: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    shape: ModelShape | None = None,
) -> Findings:
    """Return the findings on a checkpoint.

    Args:
        path: its directory.
        parent: if given, the checkpoint must have been grown from this one.
        progress: called with (tensors read, tensors in all).
        shape: if given, the checkpoint must hold this model: the same tensors, and the same function.

    Raises:
        CheckpointError: `path` is not a checkpoint that can be checked.
    """
    if not (path / MANIFEST).is_file():
        return _verify_foreign(path, parent, progress, shape)
    check_format(path)
    findings = Findings()
    attempt = findings.attempt

    if not attempt("files are whole and match integrity.json", lambda: integrity.check(path)):
        return findings
    try:
        reader = TorchDistReader(path)
        manifest = read_manifest(path)
    except CheckpointError as error:
        findings.faults.append(str(error))
        return findings
    attempt(
        "every tensor of the shape is there, in its global shape, and no other",
        lambda: check_tensors(reader.tensors, manifest.shape, optimizer=manifest.optimizer),
    )
    findings.checks.append("chunks cover every tensor exactly once")  # the reader refuses any other
    attempt("values are finite", lambda: _check_values(path, reader, findings, progress))
    if manifest.lineage:
        attempt("no growth step changed the function's settings", lambda: check_lineage(path, manifest))
    if shape is not None:
        attempt("it is a model of the given stage", lambda: _check_shape(path, manifest.shape, shape))
    if manifest.optimizer:
        attempt("weights are the rounded masters", lambda: _check_masters(path, reader))
    attempt("objects import nothing foreign", lambda: _check_objects(reader, findings))
    if parent is not None:
        attempt("it descends from the given parent", lambda: _check_descent(path, parent))
    return findings


def _verify_foreign(
    path: Path, parent: Path | None, progress: Callable[[int, int], None], shape: ModelShape | None
) -> Findings:
    """The findings on a checkpoint that megagrow did not write, of any format that it reads."""
    findings = Findings()
    attempt = findings.attempt
    opened: OpenCheckpoint | None = None

    def open_it() -> None:
        nonlocal opened
        opened = open_checkpoint(path)

    if not attempt("its files can be read, and chunks cover every tensor exactly once", open_it) or opened is None:
        return findings
    findings.checks[-1] = f"{opened.format}: {findings.checks[-1]}"
    tensors, found = opened.source.tensors, opened.shape
    known = integrity.recorded(path)
    if known is None:
        findings.unchecked.append("whether a value has changed: it has no checksums")
    else:
        attempt("files match integrity.json", lambda: integrity.compare(path, known, contents=True))
    masters = [key for key in tensors if optimizer_key("param", key) in tensors]
    if found is None:
        findings.unchecked.append("whether every tensor of the model is there: nothing tells its shape")
    else:
        attempt(
            "every tensor of the shape is there, in its global shape, and no other",
            lambda: check_tensors(tensors, found, optimizer=bool(masters)),
        )
    attempt("values are finite", lambda: _check_values(path, opened.source, findings, progress))
    if masters:
        attempt("weights are the rounded masters", lambda: _check_masters(path, opened.source))
    if shape is not None and found is not None:
        attempt("it is a model of the given stage", lambda: _check_shape(path, found, shape))
    findings.unchecked.append("where it comes from: it has no lineage")
    if parent is not None:
        findings.faults.append(f"{path}: has no lineage; to compare it with {parent}: verify --deep {path} --parent")
    return findings


def _check_values(path: Path, reader: Source, findings: Findings, progress: Callable[[int, int], None]) -> None:
    total = len(reader.tensors)
    for done, (key, info) in enumerate(reader.tensors.items(), start=1):
        for box in _by_layer(info):
            values = reader.read(key, box)
            if not torch.isfinite(values).all():
                bad = int((~torch.isfinite(values)).sum())
                raise CheckpointError(f"{path}: {key}{slice_text(box)}: {bad} values are not finite")
            findings.values += values.numel()
        findings.tensors += 1
        findings.bytes += info.bytes
        progress(done, total)


def _check_masters(path: Path, reader: Source) -> None:
    """Raise CheckpointError unless the model's weights are the optimizer's masters, rounded to the model's type."""
    for key, info in reader.tensors.items():
        master = optimizer_key("param", key)
        for box in _by_layer(info) if master in reader.tensors else ():
            weights = reader.read(key, box)
            if not torch.equal(weights, reader.read(master, box).to(weights.dtype)):
                raise CheckpointError(f"{path}: {key}{slice_text(box)}: is not {master}, rounded: one of them is wrong")


def _check_objects(reader: TorchDistReader, findings: Findings) -> None:
    for key in reader.objects:
        reader.read_object(key)
        findings.objects += 1
    reader.common()


def _check_shape(path: Path, found: ModelShape, wanted: ModelShape) -> None:
    try:
        check_same_model(found, wanted, ("the checkpoint", "the stage"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not a model of the stage: {error}") from None


def _check_descent(path: Path, parent: Path) -> None:
    lineage = read_manifest(path).lineage
    if not lineage:
        raise CheckpointError(f"{path}: was not grown; it has no parent")
    if lineage[-1].sha256 != integrity.fingerprint(parent):
        raise CheckpointError(
            f"{path}: its parent is {lineage[-1].path} (sha256 {lineage[-1].sha256[:12]}), and {parent} is another"
        )


def _by_layer(info: TensorInfo) -> Iterator[Box]:
    """Cut a stacked tensor into its layers, so that only one is in memory at a time."""
    return split_evenly(whole_box(info.shape), info.shape[0] if len(info.shape) > 2 else 1)
