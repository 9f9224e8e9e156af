"""Processes that share a conversion with the one that starts them: started early, told late what to do.

A small conversion is mostly imports. A crew begins with its own at once, beside its starter's, which is why nothing
here imports anything large, and the command line makes a crew before anything else. Torch, which takes longest, is
imported once it is known that the conversion needs it. A crew ends with its starter.
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
_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", slurm_step.TASKS)
"""What would make a worker take itself for a rank."""
TORCH = "torch\n"
"""The word for a worker to import torch; the line behind it says what to do."""


class WorkerPool:
    """All workers of a conversion on this machine, but for the process that makes this object."""

    def __init__(self, count: int) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", _MODULE],
                stdin=subprocess.PIPE,
                env={**environment, "OMP_NUM_THREADS": "1"},
                preexec_fn=partial(_bind, os.getpid()),
            )
            for _ in range(count)
        ]
        self._warm = False

    def warm(self) -> None:
        """Let all import torch: this conversion will need it."""
        if not self._warm:
            self._warm = True
            for process in self._processes:
                assert process.stdin is not None
                with suppress(BrokenPipeError):
                    process.stdin.write(TORCH.encode())
                    process.stdin.flush()

    def begin(self, staging: Path, memory: int) -> None:
        """Let all take part in the conversion whose journal lies in a staging directory.

        Args:
            staging: the directory.
            memory: bytes that all workers of this machine, this process among them, may take together.
        """
        workers = len(self._processes) + 1
        for number, process in enumerate(self._processes, start=1):
            word = json.dumps({"staging": str(staging), "number": number, "workers": workers, "memory": memory})
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as stream:  # one that is gone is missed by nobody
                stream.write(word.encode())

    def end(self) -> None:
        """Nothing is left to do, or it failed: those that have not noticed yet need not."""
        for process in self._processes:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _bind(starter: int) -> None:
    """In the new process: end with the starter, and leave Ctrl-C, which a terminal sends to all, to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(starter)
