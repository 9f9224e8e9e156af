"""Checkpoints with code in their pickles: rejected by the name that they would import, and never run."""

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megagrow.checkpoint.directory import integrity
from megagrow.checkpoint.formats.torch_dist.index import read_index
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader
from megagrow.checkpoint.proof.verify import verify
from megagrow.errors import CheckpointError
from tools.reference.tiny_checkpoint import SMALL, random_state, shape, write_checkpoint
from tools.reference.torch_dist_writer import Writer


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, file: Path, by: Callable[..., Any] = os.system) -> None:
        self.file, self.by = file, by

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self.by is os.system:
            return os.system, (f"touch {self.file}",)
        return self.by, (f"open({str(self.file)!r}, 'w')",)


@pytest.fixture
def path(path: Path) -> Path:
    """A checkpoint without checksums, which would find what is forged before it is read."""
    (path / "integrity.json").unlink()
    return path


@pytest.fixture(params=["system", "eval", "exec"])
def trap(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Touch, str]]:
    """A hostile object, and the name that it would import; at the end nothing may have run."""
    functions: dict[str, Callable[..., Any]] = {"system": os.system, "eval": eval, "exec": exec}
    by = functions[request.param]
    yield Touch(tmp_path / "ran", by), f"{by.__module__}.{request.param}"
    assert not (tmp_path / "ran").exists(), "code from a checkpoint ran"


def test_the_trap_works(tmp_path: Path) -> None:
    functions: tuple[Callable[..., Any], ...] = (os.system, eval, exec)
    for by in functions:
        pickle.loads(pickle.dumps(Touch(tmp_path / "ran", by)))
        assert (tmp_path / "ran").exists()
        (tmp_path / "ran").unlink()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_hostile_index_is_refused_by_name(path: Path, trap: tuple[Touch, str], protocol: int) -> None:
    hostile, name = trap
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = hostile
    old = protocol < 2  # rebuilds even a dataclass by copyreg, which is refused before the trap is reached
    (path / ".metadata").write_bytes(pickle.dumps(hostile if old else metadata, protocol=protocol))
    name = name.replace("builtins", "(builtins|__builtin__)")
    with pytest.raises(CheckpointError, match=rf"\.metadata: refused: it would import {name}, which no checkpoint"):
        TorchDistReader(path)


def test_a_hostile_common_is_refused_by_name(path: Path, trap: tuple[Touch, str]) -> None:
    torch.save({"iteration": 10, "args": trap[0]}, path / "common.pt")
    with pytest.raises(CheckpointError, match=rf"common\.pt: refused: it would import {trap[1]}"):
        TorchDistReader(path).common()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_common_of_the_old_kind_is_refused(path: Path, trap: tuple[Touch, str], legacy: bool) -> None:
    if legacy:
        torch.save(trap[0], path / "common.pt", _use_new_zipfile_serialization=False)
    else:
        (path / "common.pt").write_bytes(pickle.dumps(trap[0]))
    with pytest.raises(CheckpointError, match=r"common\.pt: (refused|damaged)"):
        TorchDistReader(path).common()


def test_hostile_objects_and_tensors_are_refused_by_name(tmp_path: Path, trap: tuple[Touch, str]) -> None:
    (tmp_path / "forged").mkdir()
    writer = Writer(tmp_path / "forged")
    writer.put("w", (2,), (0,), torch.ones(2))
    writer.put_object("rng_state/shard_0.0_1.1", [trap[0]])
    store = writer._store
    writer._store = lambda value: store(trap[0])  # type: ignore[method-assign]  # a stand-in
    writer.put("v", (1,), (0,), torch.ones(1))
    writer.finish({})
    reader = TorchDistReader(tmp_path / "forged")
    assert torch.equal(reader.read_whole("w"), torch.ones(2))
    with pytest.raises(CheckpointError, match=rf"distcp: rng_state/shard_0\.0_1\.1: refused.*import {trap[1]}"):
        reader.read_object("rng_state/shard_0.0_1.1")
    with pytest.raises(CheckpointError, match=rf"distcp: v: refused: it would import {trap[1]}"):
        reader.read_whole("v")


def test_verify_names_a_hostile_object_and_runs_nothing(tmp_path: Path, trap: tuple[Touch, str]) -> None:
    path = write_checkpoint(tmp_path, shape(SMALL), random_state(shape(SMALL), optimizer=False), seal=False)
    torch.save({"args": trap[0]}, path / "common.pt")
    integrity.seal(path)
    (fault,) = verify(path).faults
    assert "common.pt: refused" in fault and trap[1] in fault


@pytest.mark.parametrize(
    "wanted", ["torch.load", "torch.serialization.load", "subprocess.Popen", "collections.UserDict"]
)
def test_a_name_that_is_not_on_the_list_is_refused(tmp_path: Path, wanted: str) -> None:
    module, _, name = wanted.rpartition(".")
    for pickled in (f"c{module}\n{name}\n.", f"\x80\x04\x8c{chr(len(module))}{module}\x8c{chr(len(name))}{name}\x93."):
        (tmp_path / ".metadata").write_bytes(pickled.encode("latin-1"))
        with pytest.raises(CheckpointError, match=f"would import {wanted}"):
            read_index(tmp_path / ".metadata")


def test_a_dotted_way_round_the_list_is_refused(tmp_path: Path) -> None:
    """Protocol 4 takes attributes of attributes: os through a module that is on the list."""
    module, name = "torch.distributed.checkpoint.metadata", "os.system"
    pickled = f"\x80\x04\x8c{chr(len(module))}{module}\x8c{chr(len(name))}{name}\x93."
    (tmp_path / ".metadata").write_bytes(pickled.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"would import torch\.distributed\.checkpoint\.metadata\.os\.system"):
        read_index(tmp_path / ".metadata")


def test_an_index_of_an_older_python_is_read_and_its_getattr_gives_nothing_else(path: Path) -> None:
    """Python 3.11.0 to 3.11.3 pickle a member of an enum as getattr(enum, name)."""
    member = pickle.GLOBAL + b"builtins\ngetattr\n"
    member += pickle.GLOBAL + b"torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
    member += b"X\x17\x00\x00\x00TORCH_CONTIGUOUS_FORMAT" + pickle.TUPLE2 + pickle.REDUCE
    whole = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(whole[:-1] + pickle.POP + member + pickle.POP + whole[2:])
    assert TorchDistReader(path).tensors
    stolen = pickle.GLOBAL + b"builtins\ngetattr\n" + pickle.GLOBAL + b"builtins\nset\n"
    stolen += b"X\x05\x00\x00\x00clear" + pickle.TUPLE2 + pickle.REDUCE
    (path / ".metadata").write_bytes(b"\x80\x02" + stolen + b".")
    with pytest.raises(CheckpointError, match=r"refused: it would import builtins\.getattr"):
        TorchDistReader(path)
