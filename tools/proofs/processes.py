"""Processes for the tools that kill them: one that is forked or a command line, and those below a `megagrow run`."""

import os
import signal
import subprocess
import time
from collections.abc import Callable

import psutil

from tools.proofs import kill_test


class Process:
    """A forked process, or a command line, with the same few methods."""

    def __init__(self, work: Callable[[], object] | list[str]) -> None:
        self._code: int | None = None
        if isinstance(work, list):
            output = subprocess.DEVNULL
            self.pid = subprocess.Popen(work, stdin=output, stdout=output).pid
            return
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                work()
                code = 0
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(code)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self._code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if done else None
        return self._code

    def wait(self, seconds: float) -> int:
        """Wait for its end; AssertionError if it hangs."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"process {self.pid} hangs"
            time.sleep(0.001)
        return code

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _below(run: subprocess.Popen[bytes], wanted: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    found = []
    for process in kill_test._below(run.pid):
        try:
            if wanted(process):
                found.append(process)
        except psutil.Error:
            continue
    return found


def jobs(run: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The jobs that a run has started."""
    return _below(run, lambda process: process.ppid() == run.pid)


def ranks(run: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The ranks that train."""
    return _below(run, lambda process: "RANK" in process.environ() and "train" in process.cmdline())


def torchruns(run: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The launchers of ranks."""
    return _below(run, lambda process: process.ppid() == run.pid and "megagrow.runtime.torchrun" in process.cmdline())


def job(run: subprocess.Popen[bytes]) -> str:
    """The verb of the job that runs now."""
    words = [process.cmdline() for process in jobs(run)]
    verbs = ("data", "train", "convert", "verify", "report")
    return next((verb for line in words for verb in verbs if verb in line), "between jobs")
