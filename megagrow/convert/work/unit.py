"""Makes the units of a planned target: each worker claims free units until all are done.

A file is allocated in its full size, written from its first byte to its last and hashed on the way. When all files of
a unit are on the disk, their sizes and hashes are recorded in the journal, while the next unit is being made. A unit
that an interrupted worker has started is made again from its first byte, to the same bytes.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from megagrow.convert.targets import OutputFile, PlannedTarget
from megagrow.convert.work.disk import OutputStream
from megagrow.convert.work.journal import Journal

_SHORTEST_WAIT, _LONGEST_WAIT = 0.01, 0.2
"""Seconds between looks at the units of other workers: short, so that the end is noticed promptly."""


def make_units(target: PlannedTarget, staging: Path, journal: Journal, *, sha256: bool, first: int = 0) -> None:
    """Make units until all are done, by this worker or by others.

    Args:
        target: the planned target.
        staging: the directory that its files are written into.
        journal: of the conversion.
        sha256: hash files by sha256, as Megatron does, instead of xxh3_128, which takes a tenth of the time.
        first: unit to start with, so that workers do not all claim the same one.
    """
    files = target.units
    order = [*range(first, len(files)), *range(first)]
    with journal.alive(), ThreadPoolExecutor(1) as background:
        closing: Future[None] | None = None
        idle = 0.0
        while True:
            done = journal.finished_units()
            left = [unit for unit in order if unit not in done]
            if not left:
                return
            is_busy = False
            for unit in left:
                if journal.is_done(unit) or not journal.claim_unit(unit):
                    continue
                is_busy = True
                if journal.is_done(unit):  # by another worker, between the check and the claim
                    journal.release_unit(unit)
                    continue
                streams = _make(target, unit, staging, journal, sha256=sha256)
                if closing is not None:
                    closing.result()
                journal.note_non_finite(unit, target.finite.taken())
                closing = background.submit(_close, journal, unit, files[unit], streams)
            if closing is not None:
                closing.result()
                closing = None
            idle = 0.0 if is_busy else min(max(_SHORTEST_WAIT, 2 * idle), _LONGEST_WAIT)
            if idle:
                time.sleep(idle)


def _make(target: PlannedTarget, unit: int, staging: Path, journal: Journal, *, sha256: bool) -> list[OutputStream]:
    streams: list[OutputStream] = []
    try:
        for file in target.units[unit]:
            streams.append(OutputStream(staging, file, sha256=sha256))
        for index, data in target.produce(unit):
            streams[index].write(data)
            journal.done_bytes += len(data)
    except BaseException:
        for stream in streams:
            stream.abandon()
        raise
    return streams


def _close(journal: Journal, unit: int, files: tuple[OutputFile, ...], streams: list[OutputStream]) -> None:
    for stream in streams:  # all before the first is closed, so that the disk works without pauses
        stream.hand_over()
    written = {file.name: stream.close() for file, stream in zip(files, streams, strict=True)}
    journal.finish_unit(unit, written)
