"""Run a function of the tests on real ranks: processes, gloo and Megatron-Core, many cases in one start.

`run_ranks("tests.distributed.training.test_model:losses", world=2, payload=...)` starts one process a rank, each of
which makes Megatron-Core run here, calls the function with the payload and pickles what it returns. Importing
Megatron-Core takes ten seconds, so a test asks for many cases at once. When a rank fails, or time is up, all are
killed and their output is shown; when pytest dies, the ranks die with it.
"""

import importlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def run_ranks(
    function: str, world: int, payload: Any = None, *, timeout: float = 600.0, prepare: bool = True
) -> list[Any]:
    """Return what `function` ("package.module:name", called with `payload`) returns on each of `world` ranks.

    The function calls `megagrow.runtime.start` itself, with the layout it wants. `prepare=False` leaves
    Megatron-Core unpatched until then. AssertionError with the ranks' output when one fails or `timeout` seconds
    have passed.
    """
    with tempfile.TemporaryDirectory(prefix="megagrow-ranks-") as directory:
        place = Path(directory)
        (place / "payload").write_bytes(pickle.dumps((function, payload, prepare)))
        ranks = [_start(place, rank, world, port) for port in [_free_port()] for rank in range(world)]
        try:
            problem = _wait(ranks, time.monotonic() + timeout, timeout)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        assert not problem, f"{function}: {problem}\n{_output(place, world)}"
        return [pickle.loads((place / f"result-{rank}").read_bytes()) for rank in range(world)]


def _start(place: Path, rank: int, world: int, port: int) -> subprocess.Popen:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part),
        "PYTHONWARNINGS": "ignore",
    }
    with open(place / f"output-{rank}", "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.ranks.launcher", str(place), str(os.getpid())],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


def _wait(ranks: list[subprocess.Popen], deadline: float, timeout: float) -> str:
    """Wait until all have ended well (""), or say what went wrong first."""
    while time.monotonic() < deadline:
        codes = [process.poll() for process in ranks]
        failed = [f"rank {rank} left with {code}" for rank, code in enumerate(codes) if code]
        if failed:
            return ", ".join(failed)
        if all(code == 0 for code in codes):
            return ""
        time.sleep(0.05)
    return f"not done after {timeout:g} seconds"


def _output(place: Path, world: int) -> str:
    tails = []
    for rank in range(world):
        text = (place / f"output-{rank}").read_text(errors="replace")
        tails.append(f"--- rank {rank} ---\n{text[-6000:]}")
    return "\n".join(tails)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(place: Path, parent: int) -> None:
    """The life of one rank."""
    from megagrow.parent_death import die_with_parent
    from megagrow.runtime import cpu, stop

    die_with_parent(parent)
    path, payload, prepare = pickle.loads((place / "payload").read_bytes())
    if prepare:
        cpu.install()
    module, _, name = path.partition(":")
    result = getattr(importlib.import_module(module), name)(payload)
    (place / f"result-{os.environ['RANK']}").write_bytes(pickle.dumps(result))
    stop()


if __name__ == "__main__":
    _work(Path(sys.argv[1]), int(sys.argv[2]))
