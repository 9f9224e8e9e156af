"""A mixture of experts on real ranks: one curve however experts are cut, resumed to the last bit, grown from dense.

One start of one rank makes the data, a dense parent and its upcycled child; one start of two ranks does the rest.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from megagrow.config import load
from tests.distributed import families
from tests.distributed.families import LLAMA, STEPS, TOKENS_PER_STEP, Said, verb
from tests.distributed.launcher import run_ranks

MIXTURE = LLAMA | {
    "num_layers": 2, "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 40,
    "moe_shared_expert_intermediate_size": 32, "moe_aux_loss_coeff": 0.05,
}  # fmt: skip
LAYOUTS = {
    "EP1": {"data_parallel_size": 2},
    "EP2": {"data_parallel_size": 2, "expert_model_parallel_size": 2},
    "TP2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}
DENSE = LLAMA | {"num_layers": 2}
UPCYCLED = DENSE | {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 40}
DOUBLED = UPCYCLED | {"num_moe_experts": 8, "moe_router_topk": 4, "num_layers": 3, "hidden_size": 40}
FEW = {"train_tokens": 4 * TOKENS_PER_STEP}
HALF = 10


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all families lie."""
    directory = tmp_path_factory.mktemp("moe")
    text = families.write_text(directory / "text.jsonl")
    for name, parallel in LAYOUTS.items():
        stage = families.stage("small", MIXTURE) | {"parallel": parallel}
        families.write_family(directory / name, text, [stage])
    experts = {"parallel": LAYOUTS["EP2"]}
    stages = [
        families.stage("small", DENSE, **FEW),
        families.stage("upcycled", UPCYCLED, growth={"granularity": 2}, **FEW) | experts,
        families.stage("doubled", DOUBLED, growth={"router_noise": 0.0}, **FEW) | experts,
    ]
    families.write_family(directory / "grown", text, stages)
    return directory


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, Any]:
    """What one rank says."""
    return run_ranks("tests.distributed.test_moe:work_alone", 1, root)[0]


@pytest.fixture(scope="module")
def together(root: Path, alone: dict[str, Any]) -> dict[str, Any]:
    """What two ranks say."""
    return run_ranks("tests.distributed.test_moe:work_together", 2, root)[0]


def work_alone(root: Path) -> dict[str, Said]:
    """The part of one rank: the data, the dense parent, and its child from the converter."""
    family = root / "grown.yaml"
    said = {"data": verb("data", family)}
    said["small"] = verb("train", family, "--stage", "small")
    said["convert"] = verb("convert", family, "--stage", "upcycled")
    return said


def work_together(root: Path) -> dict[str, Said]:
    """The part of each of two ranks."""
    main = os.environ["RANK"] == "0"
    said = {}
    for name in LAYOUTS:
        if main:
            families.lend(root / "grown" / "data", root / name)
        said[name] = train(root, name, name)
    if main:
        families.lend(root / "grown" / "data", root / "unbalanced")
    said["unbalanced"] = train(root, "EP1", "unbalanced", "stages.0.model.moe_aux_loss_coeff=0")
    for of, into in (("EP2", "EP2"), ("EP1", "EP2"), ("EP2", "EP1"), ("EP2", "TP2")):
        copy = f"{of} to {into}"
        if main:
            families.rewind(root / of, root / copy, "small", HALF)
        said[copy] = train(root, into, copy)
    grown = root / "grown.yaml"
    said["upcycled"] = verb("train", grown, "--stage", "upcycled")
    said["convert doubled"] = verb("convert", grown, "--stage", "doubled") if main else Said(0, "")
    said["doubled"] = verb("train", grown, "--stage", "doubled")
    return said


def train(root: Path, layout: str, case: str, *overrides: str) -> Said:
    """Train the mixture in a layout, in the directory of a case."""
    return verb("train", root / f"{layout}.yaml", "--stage", "small", f"save={root / case}", *overrides)


def curve(root: Path, case: str, layout: str) -> list[float]:
    """Losses of a case's steps."""
    return families.curve(load(root / f"{layout}.yaml", [f"save={root / case}"]))


@pytest.mark.parametrize("layout", ["EP2", "TP2"])
def test_how_experts_are_cut_changes_nothing(layout: str, root: Path, together: dict[str, Said]) -> None:
    assert together["EP1"].code == 0 and together[layout].code == 0, together[layout].text
    wanted = curve(root, "EP1", "EP1")
    assert len(wanted) == STEPS and wanted[-1] < wanted[0] - 0.5, "it learned nothing"
    assert curve(root, layout, layout) == pytest.approx(wanted, rel=1e-5)


def test_a_resumed_run_ends_with_the_same_bits(root: Path, together: dict[str, Said]) -> None:
    from tools.kill_test import digest

    assert together["EP2 to EP2"].code == 0, together["EP2 to EP2"].text
    assert curve(root, "EP2 to EP2", "EP2") == curve(root, "EP2", "EP2")
    last = Path("small") / "checkpoints" / f"iter_{STEPS:07d}"
    assert digest(root / "EP2 to EP2" / last) == digest(root / "EP2" / last)


@pytest.mark.parametrize("case", ["EP1 to EP2", "EP2 to EP1", "EP2 to TP2"])
def test_a_run_goes_on_with_experts_cut_otherwise(case: str, root: Path, together: dict[str, Said]) -> None:
    assert together[case].code == 0 and f"iter_{HALF:07d}" in together[case].text, together[case].text
    assert curve(root, case, case[-3:]) == pytest.approx(curve(root, "EP1", "EP1"), rel=1e-5)


def test_growth_keeps_the_loss_from_dense_to_experts_to_more_experts(
    root: Path, alone: dict[str, Said], together: dict[str, Said]
) -> None:
    for said in (alone["convert"], together["upcycled"], together["convert doubled"], together["doubled"]):
        assert said.code == 0, said.text
    losses = [families.validation(root / "grown.yaml", index) for index in range(3)]
    for parent, child in zip(losses, losses[1:], strict=False):
        assert child[0] == pytest.approx(parent[4], abs=1e-5)
        assert child[4] < child[0]


def test_the_load_balancing_loss_is_descended_on_but_not_reported(root: Path, together: dict[str, Said]) -> None:
    assert together["unbalanced"].code == 0, together["unbalanced"].text
    balanced, unbalanced = curve(root, "EP1", "EP1"), curve(root, "unbalanced", "EP1")
    assert unbalanced[0] == balanced[0] and unbalanced[5] != balanced[5]
