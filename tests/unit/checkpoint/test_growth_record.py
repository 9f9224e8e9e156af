"""Which entries are new: growing gives the truth, and growth.json alone gives the flags of any shard."""

import json

import numpy as np
import pytest
import torch

from megagrow.checkpoint.index.box import Box
from megagrow.checkpoint.tensors.growth_record import copy_pairs, describe_step, new_entries, recorded_step
from megagrow.checkpoint.tensors.table import TensorKind, tensor_kinds
from megagrow.config import GrowthConfig, ModelShape
from megagrow.errors import CheckpointError
from megagrow.growth.maps.axis import NO_SOURCE
from megagrow.growth.maps.step import GrowthStep
from megagrow.growth.operators.plan import plan_growth
from tests.unit.growth.test_growth import GPT, LARGE, LLAMA, SMALL, all_of, grow, random_weights, shape

WIDE = {**LARGE, "hidden_size": 48, "ffn_hidden_size": 56, "num_attention_heads": 8, "num_query_groups": 4}
LAYOUTS = [(tensor, pipeline) for tensor in (1, 2, 4) for pipeline in (1, 2)]
GROWTHS = {
    "zero_pad": GrowthConfig(),
    "balanced": all_of("balanced", moments="exact"),
    "uneven": all_of("balanced", share_of_new=0.3, layer="stack"),
}


def step_and_content(name: str, architecture: dict, sizes: dict = WIDE) -> tuple[GrowthStep, dict]:
    """A growth step, and its record as read back from disk."""
    rows = {"vocab_size": 48}  # divisible by 4 ranks
    large = shape({**sizes, "num_layers": 4}, architecture).model_copy(update=rows)
    step = plan_growth(shape(SMALL, architecture).model_copy(update=rows), large, GROWTHS[name], seed=1)
    return step, json.loads(json.dumps(describe_step(step)))


def local_boxes(kind: TensorKind, of: ModelShape, rank: int, ranks: int) -> list[Box]:
    """The boxes of a tensor rank, by Megatron's rules: rows of each block cut alike."""
    size = kind.layer_shape(of)
    if kind.tensor_parallel is None:
        return [tuple((0, n) for n in size)]
    dim, blocks = kind.tensor_parallel
    block = size[dim] // blocks
    width = block // ranks
    spans = [(b * block + rank * width, b * block + (rank + 1) * width) for b in range(blocks)]
    return [tuple(span if axis == dim else (0, n) for axis, n in enumerate(size)) for span in spans]


@pytest.mark.parametrize("architecture", [LLAMA, GPT], ids=["llama", "gpt"])
@pytest.mark.parametrize("name", GROWTHS)
@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_shards_of_any_layout_know_what_is_new_in_them(
    name: str, architecture: dict, tensor: int, pipeline: int
) -> None:
    step, content = step_and_content(name, architecture)
    large = step.large
    for kind in tensor_kinds(large):
        for stage in range(pipeline):
            local = range(large.num_layers // pipeline)
            layers = [stage * len(local) + place for place in local] if kind.per_layer else [None]
            for layer in layers:
                whole = new_entries(content, kind, large, layer)
                seen = np.zeros(kind.layer_shape(large), dtype=int)
                for rank in range(tensor):
                    for box in local_boxes(kind, large, rank, tensor):
                        place = tuple(slice(start, stop) for start, stop in box)
                        assert np.array_equal(new_entries(content, kind, large, layer, box), whole[place])
                        seen[place] += 1
                assert (seen == (1 if kind.tensor_parallel else tensor)).all()


def test_new_are_the_entries_that_noise_on_new_copies_moves() -> None:
    """If all new entries are copies, noise changes exactly the new entries: an independent way to find them."""
    small, large = shape(SMALL, LLAMA), shape(LARGE, LLAMA)
    weights = random_weights(small)
    quiet = plan_growth(small, large, all_of("balanced"), seed=1)
    noisy = plan_growth(small, large, all_of("balanced", noise=0.1), seed=1)
    content = describe_step(quiet)
    before, after = grow(weights, quiet), grow(weights, noisy)
    for kind in tensor_kinds(large):
        for layer in range(large.num_layers) if kind.per_layer else (None,):
            if layer is not None and quiet.layers.new[layer]:
                assert new_entries(content, kind, large, layer).all()
                continue
            place = ... if layer is None else layer
            moved = (before[kind.key][place] != after[kind.key][place]).numpy()
            assert np.array_equal(moved, new_entries(content, kind, large, layer)), kind.key


@pytest.mark.parametrize("name", GROWTHS)
def test_the_maps_come_back_whole(name: str) -> None:
    step, content = step_and_content(name, LLAMA, LARGE)
    again = recorded_step(content, step.large)
    assert again.small == step.small and again.layers == step.layers and again.exact is step.exact
    assert again.operators == step.operators and again.moments is step.moments
    for kind in tensor_kinds(step.large):
        for dim in kind.dims:
            one, other = dim.grow(step), dim.grow(again)
            for field in ("source", "new", "scale", "gradient"):
                assert np.array_equal(getattr(one, field), getattr(other, field)), (kind.key, dim.name, field)
            assert one.center == other.center and one.size == other.size


def test_pairs_are_new_copies_and_the_old_entry_of_the_same_source() -> None:
    step, content = step_and_content("balanced", LLAMA, LARGE)
    counted = 0
    for kind in tensor_kinds(step.large):
        for (copies, sources), dim in zip(copy_pairs(content, kind, step.large), kind.dims, strict=True):
            grown = dim.grow(step)
            assert (grown.source[copies] == grown.source[sources]).all()
            assert grown.new[copies].all() and not grown.new[sources].any()
            assert len(copies) == (grown.new & (grown.source != NO_SOURCE)).sum()
            counted += len(copies)
    assert counted > 100
    padded = step_and_content("zero_pad", LLAMA, LARGE)[1]
    assert not any(
        len(copies) for kind in tensor_kinds(step.large) for copies, _ in copy_pairs(padded, kind, step.large)
    )


def test_a_file_of_another_shape_or_age_is_named() -> None:
    step, content = step_and_content("zero_pad", LLAMA)
    with pytest.raises(CheckpointError, match="belongs to another shape"):
        recorded_step(content, shape(SMALL, LLAMA))
    del content["source_shape"]
    with pytest.raises(CheckpointError, match="'source_shape'.*convert again"):
        recorded_step(content, step.large)


def test_copies_come_apart_by_each_cure_and_by_nothing_else() -> None:
    """50 steps of Adam. Even shares with exact or copied moments: copies stay together but for rounding, since two
    columns of one matrix product need not have the same bits. With each of the three cures the distance grows.
    """
    torch.set_num_threads(1)
    from tools.docs.copies_come_apart import ROUNDING, curves

    found = curves(steps=50, parent_steps=20)
    for name, curve in found.items():
        assert len(curve) == 51 and curve[0] == 0.0, "nothing has moved before the first step"
        if name.startswith("even shares"):
            assert max(curve) < ROUNDING, name
        else:
            assert 1e6 * ROUNDING < curve[1] < curve[10] < curve[25] < curve[50], name
    assert len(found) == 5


@pytest.mark.parametrize("operator", ["masked", "progressive", "direct"])
def test_spans_that_training_raises_are_named_for_operators_with_a_mask(operator: str) -> None:
    growth = GrowthConfig(hidden=operator, ffn=operator, head=operator, layer="masked")
    raised = describe_step(plan_growth(shape(SMALL, LLAMA), shape(LARGE, LLAMA), growth, seed=1))["raise"]
    expected = {"layer": [[2, 3]]}
    if operator != "direct":
        expected |= {"hidden": [[24, 31]], "ffn": [[40, 57]], "head": [[4, 6]], "group": [[2, 3]]}
    assert raised == expected
