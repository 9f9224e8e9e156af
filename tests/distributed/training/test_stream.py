"""The stream of a family: every sample once an epoch, the same on every rank, batch and stage."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megagrow.config import Family, load_text
from megagrow.data import Prepared, prepare, stream
from megagrow.data.stream import Position, Sample, TrainStream, validation_samples
from megagrow.errors import DataError

SEQ = 16
MakeFamily = Callable[..., Family]


def write_pair(prefix: Path, first_id: int, lengths: list[int]) -> None:
    """Write documents in which no id comes twice: first_id, first_id + 1, ..."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in lengths:
        builder.add_document(np.arange(first_id, first_id + length), [length])
        first_id += length
    builder.finalize(f"{prefix}.idx")


@pytest.fixture
def make_family(tmp_path: Path) -> MakeFamily:
    """Two sources, `large` with ids from 0 and `small` with ids from 10000, three samples of large to one of small."""
    write_pair(tmp_path / "large", 0, [37, 5, 64, 1, 23] * 10)
    write_pair(tmp_path / "small", 10000, [30] * 10)

    def make(**changes: object) -> Family:
        sources = [
            {"name": "large", "prefix": str(tmp_path / "large"), "weight": 3},
            {"name": "small", "prefix": str(tmp_path / "small"), "weight": 1},
        ]
        shape = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2}
        tree = {
            "name": "tiny",
            "save": str(tmp_path / "run"),
            "data": {"sources": sources[: changes.pop("sources", 2)], "split": "80,20,0"},  # type: ignore[misc, index]  # a plain dict
            "evaluation": {"eval_samples": 8},
            "stages": [
                {
                    "name": "a",
                    "model": {**shape, "vocab_size": 20000, "seq_length": SEQ},
                    "batch": {"micro_batch_size": 1, "global_batch_size": 1},
                }
            ],
        }
        return load_text(json.dumps(tree), [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])

    return make


def tokens(samples: Iterator[Sample]) -> list[list[int]]:
    return [sample["tokens"].tolist() for sample in samples]


def first(prepared: Prepared, family: Family, count: int, start: Position | None = None) -> list[list[int]]:
    train = TrainStream(prepared, family, start)
    return tokens(train.sample(i) for i in range(count))


def test_an_epoch_gives_every_token_once_and_the_next_one_another_order(make_family: MakeFamily) -> None:
    family = make_family(sources=1)
    train = TrainStream(prepare(family), family)
    in_train = sum(([37, 5, 64, 1, 23] * 10)[:40])
    samples = (in_train - 1) // SEQ
    epochs = [[train.sample(epoch * samples + i) for i in range(samples)] for epoch in range(3)]
    for epoch in epochs:
        ids = torch.cat([sample["tokens"] for sample in epoch])
        assert len(set(ids.tolist())) == samples * SEQ and int(ids.max()) < in_train
    assert tokens(iter(epochs[0])) != tokens(iter(epochs[1])) != tokens(iter(epochs[2]))
    assert len(train._sources[0]._open_epochs) == 2


def test_a_sample_is_shifted_by_one_and_nothing_is_masked(make_family: MakeFamily) -> None:
    family = make_family()
    sample = TrainStream(prepare(family), family).sample(5)
    assert sorted(sample) == ["labels", "loss_mask", "position_ids", "tokens"]
    assert all(value.shape == (SEQ,) for value in sample.values())
    assert torch.equal(sample["labels"][:-1], sample["tokens"][1:])
    assert torch.equal(sample["loss_mask"], torch.ones(SEQ)) and sample["loss_mask"].dtype == torch.float32
    assert torch.equal(sample["position_ids"], torch.arange(SEQ))
    assert {sample[key].dtype for key in ("tokens", "labels", "position_ids")} == {torch.int64}


def test_the_samples_are_those_of_megatrons_own_builder(make_family: MakeFamily, tmp_path: Path) -> None:
    family = make_family(sources=1, seed=0)
    prepared = prepare(family)

    class NoTokenizer:
        vocab_size, eod, unique_identifiers = 20000, None, "none"

    flags = dict.fromkeys(
        ("reset_position_ids", "reset_attention_mask", "eod_mask_loss", "create_attention_mask"), False
    )
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=SEQ,
        blend=([str(prepared.prefixes["large"])], None),
        split=family.data.split,
        path_to_cache=str(tmp_path / "megatron"),
        tokenizer=NoTokenizer(),
        **flags,
    )
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, [None] * 3, lambda: True, config).build()
    finally:
        torch.distributed.destroy_process_group()
    assert train is not None and valid is not None
    assert first(prepared, family, len(train)) == tokens(train[i] for i in range(len(train)))
    assert tokens(iter(validation_samples(prepared, family))) == tokens(valid[i] for i in range(8))


@pytest.mark.parametrize("stop", [1, 7, 40, 100, 101])
def test_the_stream_goes_on_where_it_stopped(make_family: MakeFamily, stop: int) -> None:
    family = make_family()
    prepared = prepare(family)
    uninterrupted = first(prepared, family, 180)
    position = TrainStream(prepared, family).position_after(stop)
    again = Position.from_dict(json.loads(json.dumps(position.to_dict())))
    assert again == position and again.total == stop
    assert first(prepared, family, 180 - stop, again) == uninterrupted[stop:]
    ends = TrainStream(prepared, family, again).position_after(180 - stop)
    assert ends == TrainStream(prepared, family).position_after(180)
    small_epoch = (8 * 30 - 1) // SEQ
    assert ends.consumed["small"] > 2 * small_epoch, "the test must cross ends of epochs"


def test_samples_do_not_depend_on_the_order_in_which_they_are_asked_for(
    make_family: MakeFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = make_family()
    prepared = prepare(family)
    expected = first(prepared, family, 120)
    monkeypatch.setattr(stream, "_BLOCK", 8)
    train = TrainStream(prepared, family)
    assert tokens(train.sample(i) for i in reversed(range(120))) == expected[::-1]
    two_ranks = [tokens(TrainStream(prepared, family).sample(i) for i in range(rank, 120, 2)) for rank in (0, 1)]
    assert [two_ranks[i % 2][i // 2] for i in range(120)] == expected
    positions = [train.position_after(n).total for n in (0, 7, 8, 9, 120)]
    assert positions == [0, 7, 8, 9, 120]


def test_what_a_caller_does_to_a_sample_stays_with_it(make_family: MakeFamily) -> None:
    family = make_family()
    train = TrainStream(prepare(family), family)
    for i in range(4):
        sample = train.sample(i)
        assert sample["loss_mask"].sum() == SEQ and sample["position_ids"][1] == 1
        for value in sample.values():
            value.zero_()


def test_the_blend_follows_the_weights_and_the_seed_only_the_order(make_family: MakeFamily) -> None:
    family = make_family()
    prepared = prepare(family)
    from_small = [sample[0] >= 10000 for sample in first(prepared, family, 100)]
    assert sum(from_small) == 25 and all(sum(from_small[i : i + 4]) == 1 for i in range(0, 100, 4))
    other = first(prepared, family.model_copy(update={"seed": 99}), 100)
    assert [sample[0] >= 10000 for sample in other] == from_small and other != first(prepared, family, 100)


def test_validation_is_fixed_and_apart_from_training(
    make_family: MakeFamily, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = make_family()
    prepared = prepare(family)
    fixed = tokens(iter(validation_samples(prepared, family)))
    assert len(fixed) == 8 and sum(sample[0] >= 10000 for sample in fixed) == 2
    assert tokens(iter(validation_samples(prepared, family.model_copy(update={"seed": 7})))) == fixed
    assert tokens(iter(validation_samples(prepared, family)[2:4])) == fixed[2:4]
    trained = {token for sample in first(prepared, family, 300) for token in sample}
    assert not trained & {token for sample in fixed for token in sample}
    more = family.model_copy(update={"evaluation": family.evaluation.model_copy(update={"eval_samples": 1000})})
    monkeypatch.setattr(logging.getLogger("megagrow"), "propagate", True)
    with caplog.at_level("WARNING", logger="megagrow.data"):
        everything = validation_samples(prepared, more)
    valid_tokens = (sum([37, 5, 64, 1, 23] * 2), 2 * 30)
    assert len(everything) == sum((count - 1) // SEQ for count in valid_tokens)
    assert tokens(iter(everything))[:3] == fixed[:3]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"evaluation.eval_samples is 1000, the validation split has only {len(everything)}: using all of them"
    ]


def test_splits_that_are_too_small_are_refused_with_numbers(make_family: MakeFamily, tmp_path: Path) -> None:
    no_validation = make_family(data__split="'999,1,0'")
    with pytest.raises(
        DataError, match=r"source 'large' has 0 of 50 documents, 0 tokens in the valid part of split 999"
    ):
        validation_samples(prepare(no_validation), no_validation)
    write_pair(tmp_path / "small", 10000, [10, 6])
    too_few = make_family(save=str(tmp_path / "other"))
    with pytest.raises(
        DataError, match=r"seq_length 16 \+ 1: source 'small' has 2 of 2 documents, 16 tokens in the train"
    ):
        TrainStream(prepare(too_few), too_few)


def test_positions_of_other_families_are_refused(make_family: MakeFamily) -> None:
    family = make_family()
    with pytest.raises(DataError, match="contains the source 'web'; the family has large, small"):
        TrainStream(prepare(family), family, Position({"web": 3}))
    with pytest.raises(DataError, match="position of source 'large' is -1"):
        Position.from_dict({"large": -1})


def test_a_rank_needs_no_other_rank(make_family: MakeFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    family = make_family()
    prepared = prepare(family)
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        monkeypatch.setattr(torch.distributed, "barrier", lambda *_, **__: pytest.fail("a collective"))
        on_rank_1 = first(prepared, family, 60)
    finally:
        torch.distributed.destroy_process_group()
    assert on_rank_1 == first(prepared, family, 60)


def test_a_cache_that_a_kill_left_incomplete_is_made_whole(make_family: MakeFamily) -> None:
    family = make_family()
    prepared = prepare(family)
    expected = first(prepared, family, 60)
    cached = sorted((prepared.directory / "cache").glob("*.npy"))
    assert len(cached) % 3 == 0 and len(cached) >= 6
    for path in cached[::2]:
        path.unlink()
    assert first(prepared, family, 60) == expected
    assert sorted((prepared.directory / "cache").iterdir()) == cached
