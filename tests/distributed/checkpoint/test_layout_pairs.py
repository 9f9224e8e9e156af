"""A converted checkpoint is Megatron-Core's own, between each two of a few layouts: tensors and losses, bit for bit.

The functions of `tools.proofs.layout_pairs` on layouts of at most four ranks; the whole table is in
docs/figures/layout_pairs.md. One process imports Megatron-Core and forks all ranks.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megagrow.checkpoint.index.dtypes import tensor_of
from megagrow.config import ModelShape
from megagrow.convert.make.grower import Grower
from megagrow.convert.make.rows import Piece
from tests.distributed.ranks.launcher import run_ranks
from tools.proofs.layout_pairs import DENSE, MIXTURE, Proof, Sizes, prove, refusal, sizes
from tools.reference.forked_ranks import RankFailed, on_ranks

LAYOUTS: dict[str, list[Sizes]] = {
    "dense": [sizes(), sizes(tensor=2), sizes(pipeline=2), sizes(pipeline=2, virtual=2), sizes(tensor=2, pipeline=2)],
    "experts": [sizes(data=2, experts=True), sizes(data=2, expert=2, experts=True)],
}
SHAPES = {"dense": DENSE | {"num_layers": 4}, "experts": MIXTURE | {"num_layers": 2}}
MOMENT = "optimizer.state.exp_avg.decoder.layers.self_attention.linear_proj.weight"
RANKS = {"TP1": 1, "TP2": 2, "TP1 PP2": 2, "TP1 PP2 VPP2": 2, "TP2 PP2": 4}


def work(root: Path) -> dict[str, Proof | str]:
    """The process that forks."""
    said: dict[str, Proof | str] = {
        name: prove(name, ModelShape(**SHAPES[name]), cuts, root / name) for name, cuts in LAYOUTS.items()
    }
    with mock.patch.object(Grower, "pieces", with_a_wrong_moment(Grower.pieces)):
        said["wrong"] = prove("wrong", ModelShape(**SHAPES["experts"]), LAYOUTS["experts"][:1], root / "wrong")
    said["refused"] = on_ranks(1, refusal, sizes(virtual=2))[0]
    with pytest.raises(RankFailed) as failed:
        on_ranks(2, fail_on_one)
    said["failed"] = str(failed.value)
    return said


def with_a_wrong_moment(pieces: Callable[..., Iterator[Piece]]) -> Callable[..., Iterator[Piece]]:
    """What the converter makes, but for one value of a moment: by enough that no rounding hides it in the losses."""

    def changed(*arguments: Any) -> Iterator[Piece]:
        for piece in pieces(*arguments):
            if piece.key == MOMENT:
                tensor_of(piece.values, piece.dtype).view(-1)[0] += 1e-2
            yield piece

    return changed


def fail_on_one() -> None:
    """What a rank does that fails while the other waits for it."""
    if os.environ["RANK"] == "1":
        raise ValueError("the second rank gives up")
    time.sleep(1000)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Proof | str]:
    return run_ranks("tests.distributed.checkpoint.test_layout_pairs:work", 1, tmp_path_factory.mktemp("pairs"))[0]


@pytest.fixture(scope="module")
def proofs(said: dict[str, Proof]) -> dict[str, Proof]:
    return {name: said[name] for name in LAYOUTS}


@pytest.mark.parametrize("model", LAYOUTS)
def test_every_conversion_has_the_tensors_that_megatron_saved_in_that_layout(
    model: str, proofs: dict[str, Proof]
) -> None:
    pairs, count = proofs[model].pairs, len(LAYOUTS[model])
    assert len({(pair.source, pair.target) for pair in pairs}) == count * count
    assert [pair for pair in pairs if pair.differing] == []
    assert all(pair.tensors > 30 for pair in pairs)
    assert len({(pair.target, pair.files) for pair in pairs}) == count, "files depend on the layout of the source"


@pytest.mark.parametrize("model", LAYOUTS)
def test_training_goes_on_as_from_the_source_itself(model: str, proofs: dict[str, Proof]) -> None:
    for row in proofs[model].rows:
        assert len(row.direct) == len(LAYOUTS[model]) and len(set(row.converted)) == 3
        assert row.unequal == [], row
    first = proofs[model].rows[0].converted
    for row in proofs[model].rows:
        assert [loss for loss, _ in row.converted] == pytest.approx([loss for loss, _ in first], rel=1e-5)


@pytest.mark.parametrize("model", LAYOUTS)
def test_a_rank_reads_what_it_needs_and_its_own_files_from_end_to_end(model: str, proofs: dict[str, Proof]) -> None:
    for row in proofs[model].rows:
        assert len(row.reads) == row.ranks and row.torn == ()
        assert [each.read / each.needed for each in row.reads] == [1.0] * row.ranks
        assert row.reads[0].files == row.reads[0].ranges == 2  # weights; optimizer state
    if model == "dense":
        assert {row.name: row.ranks for row in proofs[model].rows} == RANKS
        directly = {row.name: max(each.read / each.needed for each in row.reads_directly) for row in proofs[model].rows}
        assert directly["TP1"] == 1.0 and directly["TP2"] > 1.9, (
            "loading what one rank saved, two read nearly all of it"
        )


def test_one_wrong_value_of_a_moment_is_a_fault_by_tensor_and_by_loss(said: dict[str, Proof]) -> None:
    assert said["wrong"].faults == [f"TP1 -> TP1: ('{MOMENT}',) differ", "TP1: other losses than from ['TP1']"]


def test_what_depends_on_the_source_or_lies_elsewhere_is_a_fault(proofs: dict[str, Proof]) -> None:
    proof = proofs["dense"]
    assert proof.faults == []
    assert replace(proof, pairs=(*proof.pairs, replace(proof.pairs[0], files="other bytes"))).faults
    assert replace(proof, rows=(replace(proof.rows[0], torn=("__0_0.distcp",)),)).faults


def test_megatron_refuses_virtual_stages_without_a_pipeline(said: dict[str, str]) -> None:
    assert said["refused"] == "pipeline-model-parallel size should be greater than 1 with interleaved schedule"


def test_a_rank_that_fails_ends_all_and_says_why(said: dict[str, str]) -> None:
    assert "process 1:" in said["failed"] and "ValueError: the second rank gives up" in said["failed"]
