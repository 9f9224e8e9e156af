"""Worker processes that start early and receive their work later.

A small conversion is mostly imports. So workers start at once and import next to the process that started them; for
the same reason this module imports nothing large. Torch, which takes longest, is imported when it is known that the
conversion needs it. Workers die with the process that started them.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from megagrow import slurm_step
from megagrow.parent_death import die_with_parent

_MODULE = "megagrow.convert.work"
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", slurm_step.TASK_COUNT)
"""Removed from the environment of workers, which would take themselves for ranks otherwise."""
IMPORT_TORCH = "torch\n"
"""The line on a worker's standard input that makes it import torch; the next line describes its work."""


class WorkerPool:
    """All workers of a conversion on this machine except the process that makes this object."""

    def __init__(self, count: int) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", _MODULE],
                stdin=subprocess.PIPE,
                env={**environment, "OMP_NUM_THREADS": "1"},
                preexec_fn=partial(_bind, os.getpid()),
            )
            for _ in range(count)
        ]
        self._imports_torch = False

    def import_torch(self) -> None:
        """Let all workers import torch; a second call does nothing."""
        if self._imports_torch:
            return
        self._imports_torch = True
        for process in self._processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(IMPORT_TORCH.encode())
                process.stdin.flush()

    def start_work(self, staging: Path, memory: int, **options: bool) -> None:
        """Let all workers take part in the conversion whose journal is in a staging directory.

        Args:
            staging: the directory.
            memory: bytes that all processes on this machine, including this one, may use together.
            options: of the run, for `megagrow.convert.work.worker`.
        """
        workers = len(self._processes) + 1
        for number, process in enumerate(self._processes, start=1):
            here = {"staging": str(staging), "number": number, "workers": workers, "memory": memory}
            work = json.dumps({**here, "options": options})
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as stream:  # the others do the work of a dead worker
                stream.write(work.encode())

    def end(self) -> None:
        """Kill all workers: nothing is left to do, or the conversion failed."""
        for process in self._processes:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _bind(parent: int) -> None:
    """In the new process: die with the parent. Ignore Ctrl-C, which a terminal sends to all: the parent handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)
