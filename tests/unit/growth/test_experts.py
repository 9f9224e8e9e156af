"""Growth of experts against an independent float64 mixture: from dense, from fewer, along with all other axes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagrow.checkpoint.formats.megatron_common.unsharded_state import grown_common
from megagrow.checkpoint.index.box import sizes
from megagrow.checkpoint.index.dtypes import DType
from megagrow.checkpoint.tensors.growth_record import describe_step, recorded_step
from megagrow.checkpoint.tensors.table import optimizer_key, tensor_kinds
from megagrow.config import GrowthConfig, ParallelLayout
from megagrow.config.family import Family, Stage
from megagrow.convert.plan.plan import plan_conversion
from megagrow.convert.targets.torch_dist import TorchDistTarget
from megagrow.errors import GrowthError
from megagrow.growth.maps.step import GrowthStep
from megagrow.growth.operators.plan import plan_growth
from megagrow.plan import count_parameters, flops_per_token, six_n
from tests.unit.growth.test_growth import (
    GPT,
    LARGE,
    LLAMA,
    SMALL,
    _gradients,
    _gradients_beyond_rounding,
    _with_gradients_as_moments,
    batch,
    difference,
    grow,
    random_weights,
    relative,
    shape,
)
from tools.reference.memory import MemoryStore
from tools.reference.plain import logits_BSV

MIXED = {"num_moe_experts": 4, "moe_router_topk": 2}
UNBIASED = GPT | {"add_bias_linear": False}
NO_NOISE = {"router_noise": 0.0}
FC1, FC2 = (f"decoder.layers.mlp.experts.experts.linear_{name}.weight" for name in ("fc1", "fc2"))
ROUTER = "decoder.layers.mlp.router.weight"


@pytest.mark.parametrize("architecture", [LLAMA, UNBIASED], ids=["llama", "gpt"])
@pytest.mark.parametrize(("experts", "topk", "granularity"), [(4, 2, 1), (5, 3, 1), (4, 2, 2), (12, 8, 4)])
@pytest.mark.parametrize("shared", [None, 16])
def test_upcycling_is_exact(architecture: dict, experts: int, topk: int, granularity: int, shared: int | None) -> None:
    mixture = {"num_moe_experts": experts, "moe_router_topk": topk, "moe_ffn_hidden_size": 40 // granularity}
    small = shape(SMALL, architecture)
    large = shape({**SMALL, **mixture, "moe_shared_expert_intermediate_size": shared}, architecture)
    growth = GrowthConfig(granularity=granularity)
    step = plan_growth(small, large, growth, seed=1)
    assert step.exact and step.operators == {"expert": "upcycle"}
    assert difference(small, large, growth) < 1e-13


@pytest.mark.parametrize("operator", ["zero_pad", "balanced"])
@pytest.mark.parametrize("layer", ["identity", "redundant"])
@pytest.mark.parametrize("granularity", [1, 2])
def test_upcycling_combines_with_growth_on_every_other_axis(operator: str, layer: str, granularity: int) -> None:
    small, large = shape(SMALL, LLAMA), shape({**LARGE, **MIXED}, LLAMA)
    growth = GrowthConfig(hidden=operator, ffn=operator, head=operator, layer=layer, granularity=granularity)
    step = plan_growth(small, large, growth, seed=1)
    assert step.exact and set(step.operators) == {"hidden", "ffn", "head", "layer", "expert"}
    assert difference(small, large, growth) < 1e-13


def test_slices_of_one_copy_share_their_router_row_and_copies_do_not() -> None:
    small, large = shape(SMALL, LLAMA), shape({**SMALL, **MIXED, "moe_ffn_hidden_size": 20}, LLAMA)
    weights = random_weights(small)
    grown = grow(weights, plan_growth(small, large, GrowthConfig(granularity=2), seed=1))
    rows = grown[ROUTER][0]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[2], rows[3]) and not torch.equal(rows[0], rows[2])
    assert 0.5 < float(rows.std()) / large.init_method_std < 1.5
    dense = weights["decoder.layers.mlp.linear_fc1.weight"][0]
    assert torch.equal(grown[FC1][0, 1], torch.cat([dense[20:40], dense[60:80]]))
    assert torch.equal(grown[FC2][0, 3], 2 * weights["decoder.layers.mlp.linear_fc2.weight"][0][:, 20:])


@pytest.mark.parametrize("copies", [2, 3])
def test_duplicated_experts_are_exact_without_noise_if_top_k_follows(copies: int) -> None:
    small = shape({**SMALL, **MIXED, "moe_shared_expert_intermediate_size": 12}, LLAMA)
    more = {"num_moe_experts": 4 * copies, "moe_router_topk": 2 * copies, "moe_shared_expert_intermediate_size": 15}
    large = shape({**LARGE, **more}, LLAMA)
    growth = GrowthConfig(**NO_NOISE)
    step = plan_growth(small, large, growth, seed=1)
    assert step.exact and step.operators["expert"] == "duplicate_experts"
    assert difference(small, large, growth) < 1e-13


@pytest.mark.parametrize(
    ("experts", "topk", "options"), [(8, 4, {}), (6, 3, NO_NOISE), (8, 2, NO_NOISE), (4, 3, NO_NOISE)]
)
def test_other_duplication_does_not_claim_to_be_exact_and_is_not(experts: int, topk: int, options: dict) -> None:
    small = shape({**SMALL, **MIXED}, LLAMA)
    large = shape({**SMALL, "num_moe_experts": experts, "moe_router_topk": topk}, LLAMA)
    growth = GrowthConfig(**options)
    assert not plan_growth(small, large, growth, seed=1).exact
    assert difference(small, large, growth) > 1e-4


def test_noise_is_on_new_router_rows_only_and_as_large_as_configured() -> None:
    small = shape({**SMALL, **MIXED}, LLAMA)
    large = shape({**SMALL, "num_moe_experts": 8, "moe_router_topk": 4}, LLAMA)
    weights = random_weights(small)
    grown = grow(weights, plan_growth(small, large, GrowthConfig(router_noise=0.05), seed=1))
    assert torch.equal(grown[ROUTER][:, :4], weights[ROUTER])
    added = (grown[ROUTER][:, 4:] - weights[ROUTER]) / weights[ROUTER].std(dim=(1, 2), keepdim=True)
    assert 0.03 < float(added.std()) < 0.07
    assert torch.equal(grown[FC1][:, 4:], weights[FC1])


@pytest.mark.parametrize("architecture", [LLAMA, UNBIASED], ids=["llama", "gpt"])
def test_a_mixture_grows_in_width_and_depth_with_unchanged_experts(architecture: dict) -> None:
    small = shape({**SMALL, **MIXED, "moe_ffn_hidden_size": 12}, architecture)
    large = shape({**LARGE, **MIXED, "moe_ffn_hidden_size": 17}, architecture)
    for layer in ("identity", "redundant"):
        growth = GrowthConfig(layer=layer)
        assert "expert" not in plan_growth(small, large, growth, seed=1).operators
        assert difference(small, large, growth) < 1e-13


def test_exact_moments_of_duplicated_experts_are_their_gradients() -> None:
    small = shape({**SMALL, **MIXED}, LLAMA)
    large = shape({**SMALL, "hidden_size": 31, "num_moe_experts": 8, "moe_router_topk": 4}, LLAMA)
    step = plan_growth(small, large, GrowthConfig(hidden="balanced", moments="exact", **NO_NOISE), seed=1)
    grown = grow(_with_gradients_as_moments(random_weights(small), small), step)
    actual = _gradients({kind.key: grown[kind.key] for kind in tensor_kinds(large)}, large)
    for kind in tensor_kinds(large):
        assert relative(grown[optimizer_key("exp_avg", kind.key)], actual[kind.key]) < 1e-10, kind.key


@pytest.mark.parametrize("granularity", [1, 2])
def test_exact_moments_of_upcycled_experts_are_their_gradients_on_average_over_copies(granularity: int) -> None:
    small = shape(SMALL, LLAMA)
    large = shape({**SMALL, **MIXED, "num_moe_experts": 6, "moe_ffn_hidden_size": 40 // granularity}, LLAMA)
    step = plan_growth(small, large, GrowthConfig(moments="exact", granularity=granularity), seed=1)
    grown = grow(_with_gradients_as_moments(random_weights(small), small), step)
    actual = _gradients({kind.key: grown[kind.key] for kind in tensor_kinds(large)}, large)
    for kind in tensor_kinds(large):
        predicted, seen = grown[optimizer_key("exp_avg", kind.key)], actual[kind.key]
        if kind.key in (FC1, FC2):
            assert relative(predicted, seen) > 1e-2, "each copy gets its own tokens"
            predicted, seen = (t.unflatten(1, (-1, granularity)).sum(1) for t in (predicted, seen))
        if kind.key != ROUTER:
            assert relative(predicted, seen) < 1e-10, kind.key
    assert not grown[optimizer_key("exp_avg", ROUTER)].any()


@pytest.mark.parametrize("granularity", [1, 2])
def test_every_expert_and_its_router_row_get_a_gradient(granularity: int) -> None:
    """Copies of a whole MLP have the same output, so their router gets a gradient only at the second step."""
    small, large = shape(SMALL, LLAMA), shape({**LARGE, **MIXED}, LLAMA)
    weights = grow(random_weights(small), plan_growth(small, large, GrowthConfig(granularity=granularity), seed=1))
    alive = {key: torch.zeros_like(value, dtype=torch.bool) for key, value in weights.items()}
    for step in range(3):
        gradients = _gradients_beyond_rounding(weights, large, seed=step)
        alive = {key: flags | (gradients[key] != 0) for key, flags in alive.items()}
        weights = {key: value - 0.01 * gradients[key].sign() for key, value in weights.items()}
    for key in (FC1, FC2, ROUTER):
        assert alive[key].all(), key
    assert relative(weights[FC2][0, 0], weights[FC2][0, granularity]) > 1e-3, "copies stay equal"


def test_chunks_are_whole_experts_and_whole_parts_of_tensor_ranks() -> None:
    small, large = shape(SMALL, LLAMA), shape({**SMALL, **MIXED}, LLAMA)
    step = plan_growth(small, large, GrowthConfig(), seed=1)
    weights = random_weights(small)

    layout = ParallelLayout(tensor_model_parallel_size=2, sequence_parallel=True)
    conversion = plan_conversion(MemoryStore(weights).tensors, step, layout, DType.FLOAT64)
    production = TorchDistTarget(conversion, None)
    cut = {key: [chunk for chunk in production.chunks if chunk.key == key] for key in (FC1, FC2)}
    assert len(cut[FC1]) == 2 * 4 * 4 and {sizes(chunk.box) for chunk in cut[FC1]} == {(1, 1, 20, 24)}
    assert len(cut[FC2]) == 2 * 4 * 2 and {sizes(chunk.box) for chunk in cut[FC2]} == {(1, 1, 24, 20)}
    for chunk in cut[FC1]:  # gate and up of a rank are in its own file
        rank = chunk.box[2][0] // 20 % 2
        assert production.file(chunk).name.startswith(f"__{rank}_")


def test_the_growth_record_restores_the_maps() -> None:
    for before, options in (({}, {"granularity": 2}), (MIXED | {"moe_ffn_hidden_size": 20}, NO_NOISE)):
        small = shape({**SMALL, **before}, LLAMA)
        after = {"num_moe_experts": 8, "moe_router_topk": 4, "moe_ffn_hidden_size": 23}
        large = shape({**LARGE, **after}, LLAMA)
        step = plan_growth(small, large, GrowthConfig(**options), seed=1)
        again = recorded_step(describe_step(step), large)
        assert _sizes(again) == _sizes(step) and again.small.mlp_width == small.mlp_width
        for kind in tensor_kinds(large):
            for dim in kind.dims:
                one, other = dim.grow(step), dim.grow(again)
                assert (one.source == other.source).all() and (one.new == other.new).all(), kind.key
                assert (one.scale == other.scale).all() and (one.gradient == other.gradient).all(), kind.key


def _sizes(step: GrowthStep) -> list[tuple]:
    return [(kind.key, kind.global_shape(step.small)) for kind in tensor_kinds(step.small)]


def test_impossible_steps_name_the_reason_and_an_alternative() -> None:
    dense, mixed = shape(SMALL, LLAMA), shape({**SMALL, **MIXED}, LLAMA)
    for small, large, options, message in (
        (dense, mixed, {"expert": "duplicate_experts"}, "needs a source with experts.*use upcycle"),
        (mixed, shape({**SMALL, "num_moe_experts": 8}, LLAMA), {"expert": "upcycle"}, "use duplicate_experts"),
        (dense, mixed, {"granularity": 4}, "granularity 4 does not divide moe_router_topk 2.*use a multiple of 4"),
        (dense, mixed, {"granularity": 3}, "granularity 3 does not divide ffn_hidden_size 40"),
        (dense, dense, {"expert": "upcicle"}, "did you mean upcycle"),
    ):
        with pytest.raises(GrowthError, match=message):
            plan_growth(small, large, GrowthConfig(**options), seed=1)


def test_parameters_and_flops_of_a_mixture() -> None:
    of = shape({**SMALL, **MIXED, "moe_ffn_hidden_size": 12, "moe_shared_expert_intermediate_size": 16}, LLAMA)
    count = count_parameters(of)
    assert count.total == sum(weights.numel() for weights in random_weights(of).values())
    assert count.total - count.active == 2 * (4 - 2) * 3 * 24 * 12
    assert six_n(of) == 6 * count.active
    flops = flops_per_token(of)
    assert flops.mlp == 6 * 2 * 3 * 24 * (2 * 12 + 16) and flops.router == 6 * 2 * 24 * 4


def test_a_dense_mlp_equals_a_mixture_of_its_copies() -> None:
    """Checks the reference itself: with any router, two equal experts compute the one MLP that they copy."""
    small, large = shape(SMALL, LLAMA), shape({**SMALL, "num_moe_experts": 2}, LLAMA)
    weights = random_weights(small)
    by_hand = {key: value for key, value in weights.items() if ".mlp." not in key}
    by_hand["decoder.layers.pre_mlp_layernorm.weight"] = weights["decoder.layers.mlp.linear_fc1.layer_norm_weight"]
    for name, key in (("fc1", FC1), ("fc2", FC2)):
        by_hand[key] = weights[f"decoder.layers.mlp.linear_{name}.weight"][:, None].expand(-1, 2, -1, -1)
    by_hand[ROUTER] = random_weights(large)[ROUTER]
    assert relative(logits_BSV(by_hand, large, batch()), logits_BSV(weights, small, batch())) < 1e-13


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_mixtures_stay_exact(data: st.DataObject) -> None:
    draw = data.draw
    granularity, copies, top = draw(st.integers(1, 3)), draw(st.integers(2, 3)), draw(st.integers(1, 2))
    width, more = granularity * draw(st.integers(2, 6)), draw(st.integers(0, 5))
    sizes = {**SMALL, "num_layers": draw(st.integers(1, 2)), "ffn_hidden_size": width}
    mixture = {
        "num_moe_experts": granularity * copies,
        "moe_router_topk": max(2, granularity * top),
        "moe_ffn_hidden_size": width // granularity + more,
        "hidden_size": SMALL["hidden_size"] + draw(st.integers(0, 9)),
        "num_layers": sizes["num_layers"] + draw(st.integers(0, 2)),
    }
    small, large = shape(sizes, LLAMA), shape({**sizes, **mixture}, LLAMA)
    operator = draw(st.sampled_from(["zero_pad", "balanced"]))
    assert difference(small, large, GrowthConfig(hidden=operator, ffn=operator, granularity=granularity)) < 1e-12


def test_a_reset_sets_the_step_count_of_both_optimizers_to_zero() -> None:
    step = plan_growth(shape(SMALL, LLAMA), shape({**SMALL, **MIXED}, LLAMA), GrowthConfig(moments="reset"), seed=1)
    one = {"optimizer": {"param_groups": [{"lr": 1.0, "step": 7}]}}
    for saved in (one, {0: one, 1: one}):
        grown = grown_common({"iteration": 7, "optimizer": saved}, step)["optimizer"]
        parts = [grown] if "optimizer" in grown else [grown[0], grown[1]]
        assert [part["optimizer"]["param_groups"] for part in parts] == [[{"lr": 1.0, "step": 0}]] * len(parts)


@pytest.mark.parametrize(
    ("model", "parallel", "message"),
    [
        ({"moe_ffn_hidden_size": 8}, {}, "moe_ffn_hidden_size 8 needs num_moe_experts"),
        ({**MIXED, "moe_router_topk": 5}, {}, "moe_router_topk 5 is above num_moe_experts 4"),
        ({**MIXED, "add_bias_linear": True}, {}, "experts have no biases"),
        ({}, {"expert_model_parallel_size": 2, "data_parallel_size": 2}, "this model has no experts"),
        (MIXED, {"expert_model_parallel_size": 2}, "does not divide data_parallel_size x context_parallel_size 1"),
        (MIXED, {"expert_model_parallel_size": 3, "data_parallel_size": 3}, "does not divide num_moe_experts 4"),
        (MIXED, {"tensor_model_parallel_size": 2}, "needs sequence_parallel: true"),
        (
            {**MIXED, "moe_ffn_hidden_size": 7},
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            "does not divide moe_ffn_hidden_size 7",
        ),
    ],
)
def test_shapes_and_layouts_that_do_not_fit_are_rejected(model: dict, parallel: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage(model, parallel)


@pytest.mark.parametrize(
    ("before", "after", "growth", "message"),
    [
        (MIXED, {}, {}, "num_moe_experts 4 cannot become a dense MLP"),
        (MIXED, {**MIXED, "num_moe_experts": 3}, {}, "num_moe_experts shrinks from 4 to 3"),
        ({**MIXED, "moe_router_topk": 3}, MIXED, {}, "moe_router_topk shrinks from 3 to 2"),
        ({}, {**MIXED, "moe_ffn_hidden_size": 20}, {}, "moe_ffn_hidden_size shrinks from 40 to 20.*granularity, 1 now"),
        ({}, MIXED, {"granularity": 3}, "granularity 3 does not divide ffn_hidden_size 40"),
        (
            {**MIXED, "moe_shared_expert_intermediate_size": 8},
            MIXED,
            {},
            "moe_shared_expert_intermediate_size shrinks from 8 to 0",
        ),
    ],
)
def test_stages_that_cannot_grow_into_each_other_are_rejected(
    before: dict, after: dict, growth: dict, message: str
) -> None:
    small = stage(before, {}, name="small").model_dump(exclude_defaults=True)
    large = stage(after, {}, name="large", growth=growth).model_dump(exclude_defaults=True)
    data = {"sources": [{"paths": ["python-stdlib"]}]}
    with pytest.raises(ValueError, match=message):
        Family.model_validate({"name": "mixed", "save": "nowhere", "data": data, "stages": [small, large]})


def stage(model: dict, parallel: dict, **more: object) -> Stage:
    """A stage of the tests' small sizes."""
    sizes = {"vocab_size": 50, "make_vocab_size_divisible_by": 2, "seq_length": 10}
    batch = {"micro_batch_size": 1, "global_batch_size": 6}
    return Stage.model_validate(
        {"name": "one", "model": {**SMALL, **sizes, **model}, "parallel": parallel, "batch": batch, **more}
    )
