"""Make the units of a planned target: whoever runs this takes what is free until nothing is left.

A file is allocated in its full size, written from its first byte to its last and hashed on the way. When all files of
a unit are on the disk, their sizes and hashes are marked in the journal, in the background of the next unit. What an
interrupted worker had begun is made again from its first byte, to the same bytes.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from megagrow.convert.targets import OutputFile, PlannedTarget
from megagrow.convert.work.disk import OutputStream
from megagrow.convert.work.journal import Journal, wait

_SHORTEST_WAIT, _LONGEST_WAIT = 0.01, 0.2
"""Seconds between looks at the units of other workers: short, so that the end is noticed promptly."""


def make_units(production: PlannedTarget, staging: Path, journal: Journal, *, sha256: bool, first: int = 0) -> None:
    """Make units until all are finished, by this worker or by others.

    Args:
        production: the plan.
        staging: where its files go.
        journal: of the conversion.
        sha256: hash by it, as Megatron does; else by xxh3_128, which takes a tenth of the time.
        first: unit to begin with, so that workers do not all ask for the same one.
    """
    files = production.units
    order = [*range(first, len(files)), *range(first)]
    with journal.alive(), ThreadPoolExecutor(1) as background:
        closing: Future[None] | None = None
        idle = 0.0
        while True:
            done = journal.finished_units()
            left = [unit for unit in order if unit not in done]
            if not left:
                return
            busy = False
            for unit in left:
                if (journal.path / f"unit-{unit:06d}.done").exists() or not journal.claim(f"unit-{unit:06d}"):
                    continue
                busy = True
                if (journal.path / f"unit-{unit:06d}.done").exists():  # finished between the look and the claim
                    journal.release(f"unit-{unit:06d}")
                    continue
                streams = _make(production, unit, staging, journal, sha256=sha256)
                if closing is not None:
                    closing.result()
                closing = background.submit(_close, journal, unit, files[unit], streams)
            if closing is not None:
                closing.result()
                closing = None
            idle = 0.0 if busy else min(max(_SHORTEST_WAIT, 2 * idle), _LONGEST_WAIT)
            if idle:
                wait(idle)


def _make(production: PlannedTarget, unit: int, staging: Path, journal: Journal, *, sha256: bool) -> list[OutputStream]:
    streams: list[OutputStream] = []
    try:
        for file in production.units[unit]:
            streams.append(OutputStream(staging, file, sha256=sha256))
        for index, data in production.produce(unit):
            streams[index].write(data)
            journal.done_bytes += len(data)
    except BaseException:
        for stream in streams:
            stream.abandon()
        raise
    return streams


def _close(journal: Journal, unit: int, files: tuple[OutputFile, ...], streams: list[OutputStream]) -> None:
    for stream in streams:  # all at once, so that the disk need not wait between them
        stream.hand_over()
    told = {file.name: stream.close() for file, stream in zip(files, streams, strict=True)}
    journal.finish(unit, told)
