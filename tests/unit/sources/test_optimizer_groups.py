"""The unsharded optimizer of a conversion is Megatron-Core's in the target's layout, whatever the source's was.

What Megatron-Core reads: one optimizer, or with expert parallelism two by number, each with the groups of its own
parameters, all at one step. `tests/distributed/checkpoint/test_bare_megatron.py` loads it with Megatron-Core itself.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megagrow.checkpoint.directory import integrity
from megagrow.config import ModelShape, ParallelLayout
from tests.distributed.ranks.families import verb
from tests.unit.legacy.test_legacy import LLAMA, add_optimizer, edit, export
from tests.unit.torch_dist.test_dcp import adam, module_state, save
from tools.reference.tiny_checkpoint import SMALL, random_state, shape, write_checkpoint

MIXTURE = shape(SMALL, num_moe_experts=4, moe_ffn_hidden_size=12)
EP2 = ["parallel.expert_model_parallel_size=2", "parallel.data_parallel_size=2"]
FULL = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
DENSE = {"is_expert_parallel": False, "is_decoupled_lr": False, "lr_mult": 1.0, "step": 10, "lr": 1e-3}
GROUPS = [{**DENSE, "wd_mult": 1.0}, {**DENSE, "wd_mult": 0.0}]
EXPERTS = [{**DENSE, "wd_mult": 1.0, "is_expert_parallel": True}]


def alone(groups: list[dict[str, Any]]) -> dict[str, Any]:
    return {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"}


def chained(dense: list[dict[str, Any]], experts: list[dict[str, Any]]) -> dict[int, Any]:
    return {0: alone(dense), 1: alone(experts)}


def source_with(path: Path, of: ModelShape, optimizer: Any) -> Path:
    """A checkpoint of which Megatron-Core would have saved this unsharded optimizer."""
    source = write_checkpoint(path, of, random_state(of, dtype=torch.float32), seal=False)
    common = torch.load(source / "common.pt", weights_only=False)
    torch.save({**common, "optimizer": optimizer}, source / "common.pt")
    integrity.seal(source)
    return source


def converted(source: Path, target: Path, *settings: str) -> dict[str, Any]:
    said = verb("convert", source, target, *settings)
    assert said.code == 0, said.text
    (made,) = target.glob("iter_*")
    common: dict[str, Any] = torch.load(made / "common.pt", weights_only=False)
    assert common["content_metadata"] == FULL
    return common


# issue 12: B7
def test_experts_get_an_optimizer_of_their_own_and_lose_it_again(tmp_path: Path) -> None:
    source = source_with(tmp_path / "source", MIXTURE, alone(GROUPS))
    apart = converted(source, tmp_path / "apart", *EP2)
    assert apart["optimizer"] == chained(GROUPS, EXPERTS)
    together = converted(tmp_path / "apart", tmp_path / "together")
    assert together["optimizer"] == alone(GROUPS)


# issue 12: B7
def test_a_dense_model_upcycled_to_two_expert_ranks_gets_their_optimizer(tmp_path: Path) -> None:
    source = source_with(tmp_path / "source", shape(SMALL), alone(GROUPS))
    grown = ["model.num_moe_experts=4", "model.moe_ffn_hidden_size=12", "growth.moments=reset"]
    made = converted(source, tmp_path / "grown", *grown, *EP2)
    assert made["optimizer"] == chained(
        [{**group, "step": 0} for group in GROUPS], [{**group, "step": 0} for group in EXPERTS]
    )


# issue 12: B7
def test_groups_of_experts_that_differ_from_all_dense_ones_are_kept(tmp_path: Path) -> None:
    slower = [{**EXPERTS[0], "lr_mult": 0.5}]
    source = source_with(tmp_path / "source", MIXTURE, chained(GROUPS, slower))
    together = converted(source, tmp_path / "together")
    assert together["optimizer"] == alone([*GROUPS, {**slower[0], "is_expert_parallel": False}])
    assert converted(source, tmp_path / "apart", *EP2)["optimizer"] == chained(GROUPS, slower)


# issue 12: B7
def test_a_group_that_had_no_parameters_where_it_was_saved_gets_the_step_of_all(tmp_path: Path) -> None:
    behind = [GROUPS[0], {name: value for name, value in GROUPS[1].items() if name != "step"}]
    source = source_with(tmp_path / "source", MIXTURE, chained(behind, [{**EXPERTS[0], "step": 7}]))
    assert converted(source, tmp_path / "apart", *EP2)["optimizer"] == chained(GROUPS, EXPERTS)


# issue 12: B7
def test_groups_of_an_older_megatron_and_of_nemo_are_completed(tmp_path: Path) -> None:
    old = [{"lr": 1e-3, "step": 10, "pre_wd_mult": each, "pre_lr_mult": 1.0} for each in (1.0, 0.0)]
    source = source_with(tmp_path / "source", MIXTURE, alone(old))
    added = {"is_expert_parallel": False, "is_decoupled_lr": False}
    wanted = [{**group, **added} for group in old]
    expert = {**wanted[0], "is_expert_parallel": True}
    assert converted(source, tmp_path / "apart", *EP2)["optimizer"] == chained(wanted, [expert])


# issue 12: B7
def test_an_optimizer_of_the_legacy_format_is_described_as_megatron_core_reads_it(tmp_path: Path) -> None:
    export(tmp_path / "source", LLAMA, ParallelLayout(), implementation="local")
    edit(tmp_path / "source", add_optimizer)
    made = converted(tmp_path / "source", tmp_path / "made")
    found = made["optimizer"].pop("optimizer")["param_groups"]
    assert made["optimizer"] == {"param_state_sharding_type": "fully_reshardable"}
    assert [(group["wd_mult"], group["is_expert_parallel"], group["step"]) for group in found] == [
        (0.0, False, 5), (1.0, False, 5)
    ]  # fmt: skip
    assert all(group["betas"] == (0.9, 0.95) and "params" not in group for group in found)


# issue 12: B7
def test_an_optimizer_of_torch_gets_the_groups_of_megatron_core(tmp_path: Path) -> None:
    of = shape(SMALL)
    model = module_state(of, local=True)
    save(tmp_path / "source", {"model": model, "optim": adam(model)})
    given = [f"source.{name}={value}" for name, value in of.model_dump(exclude_none=True).items()]
    given.append("source.rope_scaling_factor=null")
    made = converted(tmp_path / "source", tmp_path / "made", *given)
    group = {**DENSE, "step": 4, "betas": (0.9, 0.95)}
    assert made["optimizer"] == alone([{**group, "wd_mult": 1.0}, {**group, "wd_mult": 0.0}])


# issue 12: B7
@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (None, "its unsharded state has no parameter groups of the optimizer"),
        (alone([GROUPS[1]]), "none of its 1 parameter groups has wd_mult 1 and lr_mult 1"),
    ],
)
def test_an_optimizer_that_cannot_be_described_is_refused_before_anything_is_written(
    optimizer: Any, message: str, tmp_path: Path
) -> None:
    source = source_with(tmp_path / "source", MIXTURE, optimizer)
    said = verb("convert", source, tmp_path / "made", *EP2)
    assert said.code == 2 and message in said.text and "--no-optimizer" in said.text
    assert not (tmp_path / "made").exists()
    assert verb("convert", source, tmp_path / "made", *EP2, "--no-optimizer").code == 0
