"""Optimizers gathered into one object per rank: joined buckets are read, and everything unsupported is refused.

Saves by Megatron-Core itself are read in tests/distributed/checkpoint/test_layouts_read.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megagrow.checkpoint.formats.open import open_checkpoint
from megagrow.checkpoint.formats.torch_dist.flat_optimizer import read_flat_optimizer
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader
from megagrow.checkpoint.tensors.table import OPTIMIZER_STATES, optimizer_key
from megagrow.errors import CheckpointError
from tests.unit.torch_dist.test_flat_optimizer import GROUP, Part, State, check_read, dense_of_engine, parts
from tools.reference.tiny_checkpoint import SMALL, random_state, shape
from tools.reference.torch_dist_writer import Writer

OF = shape(SMALL)
TYPES = (torch.bfloat16, torch.float32)
BUCKET_SIZE = 150
"""Closes buckets at sizes that are not multiples of 64, so the joined layout differs from that of a single bucket."""


def buffer(state: State, order: list[Part], name: str, bucket_size: int | None = None) -> Tensor:
    """Return a state of all parameters, the last one first, in buckets that are stored end to end."""
    done, bucket = torch.empty(0), torch.empty(0)
    for key, part in reversed(order):
        values = part(state[optimizer_key(name, key)]).flatten()
        bucket = torch.cat([bucket, torch.zeros(-len(bucket) % 64), values])
        if bucket_size is not None and len(bucket) >= bucket_size:
            done, bucket = torch.cat([done, bucket]), torch.empty(0)
    return torch.cat([done, bucket])


def content(state: State, bucket_size: int | None = None) -> dict[Any, Any]:
    """Return the object of the only rank."""
    order = parts(dense_of_engine, OF)
    states: dict[str, Any] = {name: buffer(state, order, name, bucket_size) for name in OPTIMIZER_STATES}
    return {"buckets_coalesced": True, 0: {TYPES: states | {"numel_unpadded": len(states["param"])}}}


def write(path: Path, state: State, rank_object: Any, args: dict[str, Any] | None = None) -> Path:
    """Write a checkpoint with that object."""
    path.mkdir()
    writer = Writer(path)
    for key, values in state.items():
        if not key.startswith("optimizer."):
            writer.put(key, tuple(values.shape), (0,) * values.dim(), values)
    objects = {"param_state": rank_object, "optimizer": {"param_groups": [{"lr": 1e-3, "step": 7}]}}
    for name, value in objects.items():
        writer.put_object(f"{GROUP}{name}/shard_0_1", [value])
    common = {"optimizer": {"param_state_sharding_type": "dp_zero_gather_scatter"}}
    writer.finish(common | ({"args": args} if args else {}))
    return path


@pytest.mark.parametrize("bucket_size", [None, BUCKET_SIZE])
def test_joined_buckets_are_read(bucket_size: int | None, tmp_path: Path) -> None:
    state = random_state(OF, dtype=torch.bfloat16)
    args = {"overlap_grad_reduce": True, "ddp_bucket_size": bucket_size} if bucket_size else {}
    path = write(tmp_path / "source", state, content(state, bucket_size), args)
    reader = read_flat_optimizer(TorchDistReader(path), OF, None)
    check_read(reader, state)


def test_buckets_of_an_unrecorded_size_are_refused(tmp_path: Path) -> None:
    state = random_state(OF, dtype=torch.bfloat16)
    path = write(tmp_path / "source", state, content(state, BUCKET_SIZE))
    error = refused(path)
    assert error.startswith(f"{path}: its dp_zero_gather_scatter optimizer: its buckets do not hold this model's")


def uncoalesced(rank_object: dict[Any, Any]) -> Any:
    return rank_object | {"buckets_coalesced": False}


def without_moments(rank_object: dict[Any, Any]) -> Any:
    return {**rank_object, 0: {TYPES: {"param": rank_object[0][TYPES]["param"]}}}


def not_flat(rank_object: dict[Any, Any]) -> Any:
    return {
        **rank_object,
        0: {TYPES: {name: values for name, values in rank_object[0][TYPES].items()} | {"exp_avg": torch.ones(2, 3)}},
    }


def longer(rank_object: dict[Any, Any]) -> Any:
    longer = {name: torch.cat([rank_object[0][TYPES][name], torch.ones(1)]) for name in OPTIMIZER_STATES}
    return {**rank_object, 0: {TYPES: longer}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (uncoalesced, "param_state/shard_0_1: its buckets are stored separately"),
        (without_moments, "param_state/shard_0_1: damaged: not a gathered optimizer: KeyError: 'exp_avg'"),
        (not_flat, "bucket_idx_0.exp_avg is not a flat buffer"),
        (longer, "its buckets do not hold this model's parameters: its parameters fill"),
        (lambda rank_object: 7, "damaged: not a gathered optimizer: TypeError"),
        (lambda rank_object: pytest.raises, "refused: it would import _pytest.raises.raises"),
    ],
    ids=["uncoalesced", "without moments", "not flat", "longer", "a number", "hostile"],
)
def test_an_object_of_another_kind_is_refused(
    change: Callable[[dict[Any, Any]], Any], message: str, tmp_path: Path
) -> None:
    state = random_state(OF, dtype=torch.bfloat16)
    error = refused(write(tmp_path / "source", state, change(content(state))))
    assert message in error and "\n" not in error


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_flat_optimizer(TorchDistReader(path), OF, None)
    return str(error.value)


def test_without_a_shape_a_note_reports_the_optimizer(tmp_path: Path) -> None:
    state = random_state(OF, dtype=torch.bfloat16)
    path = write(tmp_path / "source", state, content(state))
    unknown = open_checkpoint(path)
    assert "read once the model's shape is known" in unknown.notes[0]
    assert [key for key in unknown.source.tensors if key.startswith("optimizer.") and key.endswith("exp_avg")]
    known = open_checkpoint(path, shape=OF)
    assert set(known.source.tensors) == set(state) and not known.notes
    assert not open_checkpoint(path, optimizer=False).notes


def test_the_object_is_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, loaded = random_state(OF, dtype=torch.bfloat16), list[str]()
    path, read = write(tmp_path / "source", state, content(state)), TorchDistReader.read_object

    def noted(reader: TorchDistReader, key: str) -> Any:
        loaded.append(key)
        return read(reader, key)

    monkeypatch.setattr(TorchDistReader, "read_object", noted)
    check_read(read_flat_optimizer(TorchDistReader(path), OF, None), state)
    assert loaded == [f"{GROUP}optimizer/shard_0_1"]
