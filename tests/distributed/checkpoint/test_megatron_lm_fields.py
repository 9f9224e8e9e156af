"""Each field of common.pt that stock Megatron-LM reads when it goes on with a checkpoint, held to what it expects.

Line numbers are those of Megatron-LM core_v0.16.1, `megatron/training/checkpointing.py`, unless another file is named.
The scheduler is Megatron-Core's own.
"""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megagrow.config import Family, load
from megagrow.config.paths import FamilyPaths
from megagrow.plan import family_plan
from tests.distributed.ranks import families
from tests.distributed.ranks.families import BATCH, LLAMA, TOKENS_PER_STEP, WIDER
from tests.reference.command import megagrow

pytestmark = pytest.mark.timeout(600)
STEPS, DONE = 6, 4
RATES = {"max_lr", "min_lr"}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A family whose small stage has checkpoints at steps 4 and 6, and whose large one was grown and trained."""
    root = tmp_path_factory.mktemp("family")
    schedule = {"max_lr": 3e-3, "lr_warmup_fraction": 0.5}
    length: dict[str, Any] = {"train_tokens": STEPS * TOKENS_PER_STEP, "schedule": schedule}
    stages = [families.stage("small", LLAMA, **length), families.stage("large", LLAMA | WIDER, **length)]
    file = families.write_family(
        root / "family", families.write_text(root / "text.jsonl"), stages, checkpoint={"save_interval": DONE, "keep": 9}
    )
    done = megagrow("run", file)
    assert done.returncode == 0, done.stderr
    return load(file)


def common_of(family: Family, index: int, iteration: int) -> dict[str, Any]:
    """What torch reads from a common.pt."""
    path = FamilyPaths(family).stage(index).checkpoints / f"iter_{iteration:07d}" / "common.pt"
    found: dict[str, Any] = torch.load(path, weights_only=False)
    return found


def groups_of(common: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = common["optimizer"]["optimizer"]["param_groups"]
    return found


def scheduler_of(family: Family, index: int, **others: Any) -> OptimizerParamScheduler:
    """The scheduler of a run of Megatron-LM with the stage's settings, but for `others`."""
    plan = family_plan(family).stages[index]
    settings = {
        "init_lr": 0.0, "max_lr": plan.peak_lr, "min_lr": 0.1 * plan.peak_lr, "lr_warmup_steps": STEPS // 2 * BATCH,
        "lr_decay_steps": STEPS * BATCH, "lr_decay_style": "cosine", "start_wd": 0.1, "end_wd": 0.1,
        "wd_incr_steps": STEPS * BATCH, "wd_incr_style": "constant", "use_checkpoint_opt_param_scheduler": False,
    }  # fmt: skip
    optimizer = Namespace(param_groups=[{}])
    return OptimizerParamScheduler(optimizer, **settings | others)


@pytest.mark.parametrize(("index", "iteration"), [(0, DONE), (0, STEPS), (1, 0), (1, DONE)])
def test_what_is_read_needs_no_megagrow(family: Family, index: int, iteration: int) -> None:
    path = FamilyPaths(family).stage(index).checkpoints / f"iter_{iteration:07d}" / "common.pt"
    program = (
        "import sys, torch, json; found = torch.load(sys.argv[1], weights_only=False); "
        "print(json.dumps([sorted(found), type(found['args']).__module__, type(found['args'].params_dtype).__module__, "
        "[name for name in sys.modules if name.startswith('megagrow')]]))"
    )
    done = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True, cwd="/")
    names, module, dtype, ours = json.loads(done.stdout)
    assert {"args", "checkpoint_version", "iteration", "num_floating_point_operations_so_far", "optimizer"} <= set(
        names
    )
    assert (module, dtype, ours) == ("argparse", "torch", [])


@pytest.mark.parametrize(("index", "iteration"), [(0, DONE), (0, STEPS), (1, 0), (1, DONE)])
def test_counts_are_those_of_the_stage(family: Family, index: int, iteration: int) -> None:
    common = common_of(family, index, iteration)
    assert common["iteration"] == iteration  # load_checkpoint: where training goes on
    assert common["checkpoint_version"] == 3.0  # fix_query_key_value_ordering changes nothing from 2.0 on
    assert common["args"].consumed_train_samples == iteration * BATCH  # load_checkpoint: the place in the data
    assert common["args"].consumed_valid_samples == 0
    flops = common["num_floating_point_operations_so_far"]
    assert (flops > 0) == (iteration > 0)
    assert common["opt_param_scheduler"]["num_steps"] == iteration * BATCH


def test_the_scheduler_goes_on_where_the_stage_stopped(family: Family) -> None:
    """Without an override every value must equal the run's (`_check_and_set`), and the rate follows from the step."""
    scheduler = scheduler_of(family, 0)
    scheduler.load_state_dict(common_of(family, 0, DONE)["opt_param_scheduler"])
    assert scheduler.num_steps == DONE * BATCH
    whole = scheduler_of(family, 0)
    whole.step(DONE * BATCH)
    for group in groups_of(common_of(family, 0, DONE)):
        assert scheduler.get_lr(group) == whole.get_lr({}) != family_plan(family).stages[0].peak_lr


@pytest.mark.parametrize(("index", "iteration"), [(0, DONE), (1, 0), (1, DONE)])
def test_another_rate_of_the_run_is_obeyed(family: Family, index: int, iteration: int) -> None:
    """Groups without rates of their own take the run's: `param_group.get("max_lr", self.max_lr)`."""
    common = common_of(family, index, iteration)
    assert not any(RATES & set(group) for group in groups_of(common))
    scheduler = scheduler_of(
        family, index, max_lr=7e-4, min_lr=7e-5, lr_warmup_steps=0, override_opt_param_scheduler=True
    )
    scheduler.load_state_dict(common["opt_param_scheduler"])
    rates = {scheduler.get_lr(group) for group in groups_of(common)}
    assert len(rates) == 1 and 7e-5 <= rates.pop() <= 7e-4
    assert iteration or scheduler.get_lr(groups_of(common)[0]) == 7e-4


def test_a_grown_checkpoint_keeps_its_moments_and_begins_its_schedule(family: Family) -> None:
    common = common_of(family, 1, 0)
    assert {group["step"] for group in groups_of(common)} == {STEPS}
    assert (common["args"].num_layers, common["args"].hidden_size) == (WIDER["num_layers"], WIDER["hidden_size"])
    assert common["opt_param_scheduler"]["max_lr"] == pytest.approx(family_plan(family).stages[0].peak_lr)


@pytest.mark.parametrize("index", [0, 1])
def test_arguments_are_those_that_build_the_model(family: Family, index: int) -> None:
    """`load_args_from_checkpoint` sets these, and `check_checkpoint_args` compares the last one with the run's."""
    args, shape = vars(common_of(family, index, DONE)["args"]), family.stages[index].model
    for name in (
        "num_layers", "hidden_size", "ffn_hidden_size", "seq_length", "num_attention_heads", "position_embedding_type",
        "rotary_base", "rotary_percent", "add_bias_linear", "add_qkv_bias", "swiglu", "normalization",
        "untie_embeddings_and_output_weights", "attention_dropout", "hidden_dropout", "padded_vocab_size",
    ):  # fmt: skip
        assert args[name] == getattr(shape, name), name
    assert (args["num_query_groups"], args["kv_channels"]) == (shape.groups, shape.head_dim)
    assert args["max_position_embeddings"] == shape.positions
    assert args["group_query_attention"] and args["use_rotary_position_embeddings"]
    assert args["add_position_embedding"] is True


@pytest.mark.parametrize(("index", "iteration"), [(0, DONE), (1, DONE)])
def test_the_tokenizer_is_named_by_a_path_that_exists(family: Family, index: int, iteration: int) -> None:
    """`load_args_from_checkpoint` sets both, and `build_tokenizer` asserts that there is a model; its GPT reader of
    SentencePiece ends documents by the model's own token and adds none (tokenizer.py, _GPTSentencePieceTokenizer)."""
    args = common_of(family, index, iteration)["args"]
    assert args.tokenizer_type == "GPTSentencePieceTokenizer"
    assert Path(args.tokenizer_model).is_absolute() and Path(args.tokenizer_model).is_file()


@pytest.mark.parametrize("schedule", ["fresh", "continue"])
def test_a_grown_checkpoint_begins_a_schedule_or_keeps_its_place(family: Family, tmp_path: Path, schedule: str) -> None:
    """`load_checkpoint` takes the iteration and the place in the data, `OptimizerParamScheduler` the step."""
    source = FamilyPaths(family).stage(0).checkpoints / f"iter_{DONE:07d}"
    words = ["model.num_layers=8", "--schedule", schedule] if schedule == "continue" else ["model.num_layers=8"]
    done = megagrow("convert", source, tmp_path / "made", *words)
    assert done.returncode == 0, done.stderr
    kept = DONE if schedule == "continue" else 0
    common = torch.load(tmp_path / "made" / f"iter_{kept:07d}" / "common.pt", weights_only=False)
    assert (common["iteration"], common["args"].iteration) == (kept, kept)
    assert common["args"].consumed_train_samples == kept * BATCH
    assert common["opt_param_scheduler"]["num_steps"] == kept * BATCH
    assert {group["step"] for group in groups_of(common)} == {DONE}
    flops = common_of(family, 0, DONE)["num_floating_point_operations_so_far"]
    assert common["num_floating_point_operations_so_far"] == (flops if kept else 0)
    assert megagrow("verify", tmp_path / "made").returncode == 0


def test_a_schedule_that_cannot_be_kept_is_refused(family: Family, tmp_path: Path) -> None:
    source = FamilyPaths(family).stage(0).checkpoints
    for words, message in (
        (("--schedule", "later"), "--schedule later: use fresh or continue"),
        (("--schedule", "continue", "--to", "huggingface"), "an export has none"),
    ):
        done = megagrow("convert", source, tmp_path / "made", "model.num_layers=8", *words)
        assert done.returncode == 2 and message in done.stderr and not (tmp_path / "made").exists()
