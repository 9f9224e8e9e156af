"""Prove a checkpoint whole: every tensor of its shape there once, in its shape, finite, and unchanged since written.

Works on one tensor of one layer at a time, without a model. Findings are returned, not printed; an empty list of
faults is the proof.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megagrow.checkpoint.directory import check_format, integrity, read_manifest
from megagrow.checkpoint.formats.torch_dist import TorchDistReader
from megagrow.checkpoint.index import Box, TensorInfo
from megagrow.checkpoint.tensors import check_tensors, optimizer_key
from megagrow.errors import CheckpointError


@dataclass
class Findings:
    """What verification saw.

    Attributes:
        tensors, values, bytes: how much was read.
        objects: small objects that were opened by the allow-list.
        checks: what was found right.
        faults: what was found wrong, a line each.
    """

    tensors: int = 0
    values: int = 0
    bytes: int = 0
    objects: int = 0
    checks: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def verify(
    path: Path, parent: Path | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Findings:
    """Return the findings on a checkpoint and, if given, on its descent from `parent`.

    Raises:
        CheckpointError: there is no checkpoint in `path` that anything could be found about.
    """
    check_format(path)
    findings = Findings()

    def attempt(what: str, check: Callable[[], None]) -> bool:
        try:
            check()
        except CheckpointError as error:
            findings.faults.append(str(error))
            return False
        findings.checks.append(what)
        return True

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
    findings.checks.append("chunks cover every tensor exactly once")  # or the reader would have refused it
    attempt("values are finite", lambda: _check_values(reader, findings, progress))
    if manifest.optimizer:
        attempt("weights are the rounded masters", lambda: _check_masters(reader))
    attempt("objects import nothing foreign", lambda: _check_objects(reader, findings))
    if parent is not None:
        attempt("it descends from the given parent", lambda: _check_descent(path, parent))
    return findings


def _check_values(reader: TorchDistReader, findings: Findings, progress: Callable[[int, int], None]) -> None:
    total = len(reader.tensors)
    for done, (key, info) in enumerate(reader.tensors.items(), start=1):
        for box in _slabs(info):
            values = reader.read(key, box)
            if not torch.isfinite(values).all():
                bad = int((~torch.isfinite(values)).sum())
                raise CheckpointError(f"{reader.path}: {key}{_at(box)}: {bad} values are not finite")
            findings.values += values.numel()
        findings.tensors += 1
        findings.bytes += info.bytes
        progress(done, total)


def _check_masters(reader: TorchDistReader) -> None:
    """Raise CheckpointError where the model's weights are not the optimizer's masters in the model's own type."""
    for key, info in reader.tensors.items():
        master = optimizer_key("param", key)
        for box in _slabs(info) if master in reader.tensors else ():
            weights = reader.read(key, box)
            if not torch.equal(weights, reader.read(master, box).to(weights.dtype)):
                raise CheckpointError(f"{reader.path}: {key}{_at(box)}: is not {master}, rounded: one of them is wrong")


def _check_objects(reader: TorchDistReader, findings: Findings) -> None:
    for key in reader.objects:
        reader.read_object(key)
        findings.objects += 1
    reader.common()


def _check_descent(path: Path, parent: Path) -> None:
    lineage = read_manifest(path).lineage
    if not lineage:
        raise CheckpointError(f"{path}: was not grown; it has no parent")
    if lineage[-1].sha256 != integrity.fingerprint(parent):
        raise CheckpointError(
            f"{path}: its parent is {lineage[-1].path} (sha256 {lineage[-1].sha256[:12]}), and {parent} is another"
        )


def _slabs(info: TensorInfo) -> list[Box]:
    """A tensor's boxes, one a layer where it is stacked, so that one layer is in memory at a time."""
    whole = tuple((0, size) for size in info.shape)
    if len(info.shape) < 3:
        return [whole]
    return [((layer, layer + 1), *whole[1:]) for layer in range(info.shape[0])]


def _at(box: Box) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"
