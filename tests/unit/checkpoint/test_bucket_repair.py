"""Gathered buckets are moved only where Megatron-Core takes them for padded ones, which its behavior tells.

A buffer has two buckets, [1, 2, padding, padding] and [3, 4, 5, 6]; the second holds a parameter with values [3, 4].
What a rank gathers, and how it cuts parameters out of that, are stand-ins for the versions that there are.
"""

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

warnings.simplefilter("ignore")
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402

from megagrow.checkpoint.live import bucket_repair  # noqa: E402
from megagrow.errors import CheckpointError  # noqa: E402

PACKED = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
PADDED = [1.0, 2.0, 0.0, 0.0, 3.0, 4.0, 5.0, 6.0]
STATES = ("param", "exp_avg", "exp_avg_sq")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """The answer is remembered for a process; a test has stand-ins of its own."""
    bucket_repair.cuts_at_padded_offsets.cache_clear()
    yield
    bucket_repair.cuts_at_padded_offsets.cache_clear()


def saved(gathered: list[float]) -> list[float]:
    """Values that are saved of the parameter [3, 4] by a rank that gathers these."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    bucket = [
        SimpleNamespace(offset=0, numel_unpadded=2, grad_data=torch.zeros(4)),
        SimpleNamespace(offset=4, numel_unpadded=4, grad_data=torch.zeros(4)),
    ]
    optimizer = DistributedOptimizer.__new__(DistributedOptimizer)
    optimizer.gbuf_ranges = [{"types": [{}, {}]}]
    optimizer.buffers = [SimpleNamespace(buckets=bucket, param_index_map={parameter: (4, 6, 1)}, numel=8)]
    optimizer.buffers[0].numel_unpadded = 6
    state = {0: {"types": {key: torch.tensor(gathered) for key in STATES}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistributedOptimizer, "get_parameter_state_dp_zero", lambda self, **_: state)
        with bucket_repair.buckets_in_place():
            model = {"weight": ShardedTensor.from_rank_offsets("weight", parameter)}
            cut = optimizer.sharded_param_state_fully_reshardable(model, is_loading=False, metadata={})
    values = {key: cut[0][key].data.tolist() for key in STATES}
    assert values["param"] == values["exp_avg"] == values["exp_avg_sq"]
    found: list[float] = values["param"]
    return found


def cut(offset: Callable[[Any, int], int]) -> Callable[..., Any]:
    """A stand-in for how a version cuts parameters: at what offset in the values that were gathered."""

    def state(self: Any, model: dict[str, Any], is_loading: bool = False, metadata: Any = None) -> dict[int, Any]:
        gathered = self.get_parameter_state_dp_zero(use_gloo_comm=False, empty_data=False, return_on_all_ranks=True)
        (buffer,) = self.buffers
        made: dict[int, Any] = {}
        for number, (start, stop, bucket) in enumerate(buffer.param_index_map.values()):
            at = start - offset(buffer, bucket)
            values = {key: gathered[0]["types"][key][at : at + stop - start] for key in STATES}
            made[number] = {key: SimpleNamespace(data=each) for key, each in values.items()}
        return made

    return state


def padding_before(buffer: Any, bucket: int) -> int:
    return sum(each.grad_data.numel() - each.numel_unpadded for each in buffer.buckets[:bucket])


# issue 12: B9
def test_this_megatron_core_is_repaired() -> None:
    assert saved(PACKED) == [3.0, 4.0]
    assert bucket_repair.cuts_at_padded_offsets()


# issue 12: B9
def test_a_megatron_core_that_cuts_without_padding_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistributedOptimizer, "sharded_param_state_fully_reshardable", cut(padding_before))
    assert saved(PACKED) == [3.0, 4.0]
    assert not bucket_repair.cuts_at_padded_offsets()


# issue 12: B9
def test_a_megatron_core_that_gathers_padded_buckets_is_left_alone() -> None:
    assert saved(PADDED) == [3.0, 4.0]


# issue 12: B9
def test_a_megatron_core_that_does_neither_is_refused_with_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistributedOptimizer, "sharded_param_state_fully_reshardable", cut(lambda buffer, bucket: 3))
    with pytest.raises(CheckpointError, match=r"how Megatron-Core .* cuts padded buckets .*\[2\.0, 3\.0\]"):
        saved(PACKED)


def test_one_bucket_is_saved_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_repair, "cuts_at_padded_offsets", lambda: pytest.fail("asked"))
    bucket = SimpleNamespace(offset=0, numel_unpadded=3)
    assert not bucket_repair._is_packed(torch.zeros(3), SimpleNamespace(buckets=[bucket]))
