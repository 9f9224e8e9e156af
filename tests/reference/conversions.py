"""Conversions for tests: tiny checkpoints cut into many units, converted in forked processes, compared byte by byte."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megagrow.checkpoint.directory import integrity, iterations
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.convert.plan import tiling
from megagrow.convert.run import TargetSpec, convert_checkpoint
from megagrow.convert.work import RunOptions
from megagrow.tracker import TRACKER
from tools.reference.tiny_checkpoint import LARGE, SMALL, random_state, shape, write_checkpoint

WORKER_RANK = "megagrow.convert.run.convert.worker_rank"
"""The function that returns a conversion's rank; tests patch it."""
TIMES = {"conversion.json", "integrity.json"}
"""Files that depend on the time: the first contains the duration, the second contains the hash of the first."""


def small_source(save: Path) -> Path:
    torch.set_num_threads(1)  # because processes are forked here
    return write_checkpoint(save, shape(SMALL), random_state(shape(SMALL)))


def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut tiny checkpoints into many units, as large ones are, also in processes that are forked from now on.

    Nothing waits for the disk, since kills are tested and not power failures.
    """
    monkeypatch.setattr(tiling, "MIN_UNIT_BYTES", 8192)
    monkeypatch.setattr(os, "fdatasync", lambda handle: None)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def target(of: ModelShape | None = None, **others: Any) -> TargetSpec:
    layout = ParallelLayout(tensor_model_parallel_size=2)
    growth = GrowthConfig(hidden="balanced", noise=0.1)
    defaults: dict[str, Any] = {"stage": "large", "growth": growth, "layout": layout, "precision": "fp32", "seed": 7}
    return TargetSpec(shape=of or shape(LARGE), **defaults | others)


def convert(source: Path, save: Path, wanted: TargetSpec | None = None, **options: Any) -> Path:
    # the test process is large: the default memory would be too little for it
    convert_checkpoint(source, save, wanted or target(), RunOptions(**{"memory": 4 << 30, **options}))
    return save / "iter_0000000"


def files_of(path: Path) -> dict[str, bytes]:
    """All files; integrity.json without its time-dependent part."""
    found = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file() and file.name not in TIMES}
    sealed = json.loads((path / "integrity.json").read_text())
    for files in (sealed["files"], sealed["blocks"]["files"]):
        files.pop("conversion.json")
    return found | {"integrity.json": json.dumps(sealed).encode()}


def without_blocks(path: Path) -> Path:
    """Turn a checkpoint into one of an older megagrow, whose integrity.json has no checksums of blocks."""
    file = path / "integrity.json"
    sealed = json.loads(file.read_text())
    for name, entry in sealed.pop("blocks")["files"].items():
        if isinstance(sealed["files"][name], str):
            sealed["files"][name] = {"size": entry["size"], sealed["algorithm"]: sealed["files"][name]}
    file.write_text(json.dumps(sealed))
    return path


def assert_like(path: Path, wanted: dict[str, bytes]) -> None:
    found = files_of(path)
    assert set(found) == set(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []
    integrity.check(path)


def assert_published(path: Path, wanted: dict[str, bytes]) -> None:
    assert_like(path, wanted)
    assert all(entry.is_file() for entry in path.iterdir()), "the journal is gone"
    assert iterations.read_tracker(path.parent) == 0
    # a directory that was discarded by a rename may be left, hidden; the next training removes it
    assert sorted(entry.name for entry in path.parent.iterdir() if "staging" not in entry.name) == [path.name, TRACKER]


def forked(work: Callable[[], Any]) -> int:
    """Run a function in a child process; return its pid. The child exits with 0, or with 1 after an exception."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def ended(pid: int) -> int:
    """Wait for a child; return its exit code, negative for a signal."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("a conversion hangs")
