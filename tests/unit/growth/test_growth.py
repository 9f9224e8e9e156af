"""Growth against an independent float64 model: functions preserved, gradients by duality, no dead entries."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megagrow.checkpoint.index.dtypes import DType
from megagrow.checkpoint.tensors.table import optimizer_key, tensor_kinds
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.convert.plan.plan import plan_conversion
from megagrow.errors import GrowthError
from megagrow.growth.maps.axis import NO_SOURCE
from megagrow.growth.maps.exactness import Exactness
from megagrow.growth.maps.step import GrowthStep
from megagrow.growth.operators.plan import plan_growth
from megagrow.growth.operators.registry import Operator, operators
from tools.reference.execute import execute
from tools.reference.memory import MemoryStore
from tools.reference.plain import logits_BSV, loss

LLAMA = {"normalization": "RMSNorm", "position_embedding_type": "rope", "swiglu": True, "add_bias_linear": False}
GPT = {
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "swiglu": False,
    "add_bias_linear": True,
}
SMALL = {
    "num_layers": 2,
    "hidden_size": 24,
    "ffn_hidden_size": 40,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 6,
}
LARGE = {
    "num_layers": 3,
    "hidden_size": 31,
    "ffn_hidden_size": 57,
    "num_attention_heads": 6,
    "num_query_groups": 3,
    "kv_channels": 6,
}


def shape(sizes: dict, architecture: dict, *, tied: bool = False, qk: bool = False) -> ModelShape:
    """A tiny shape."""
    return ModelShape(
        **sizes,
        **architecture,
        vocab_size=50,
        make_vocab_size_divisible_by=2,
        seq_length=10,
        untie_embeddings_and_output_weights=not tied,
        qk_layernorm=qk,
    )


def random_weights(of: ModelShape, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a shape, without zeros, ones or other special values."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for kind in tensor_kinds(of):
        values = torch.randn(kind.global_shape(of), generator=generator, dtype=torch.float64)
        weights[kind.key] = (1.0 + 0.2 * values) if kind.constant else 0.3 * values
    return weights


def grow(weights: dict[str, Tensor], step: GrowthStep) -> dict[str, Tensor]:
    """The grown weights."""
    target = MemoryStore()
    source = MemoryStore(weights)
    execute(plan_conversion(source.tensors, step, ParallelLayout(), DType.FLOAT64), source, target)
    assert all(torch.isfinite(value).all() for value in target.values.values())
    return target.values


def batch(seed: int = 5) -> Tensor:
    """Tokens [3, 10]."""
    return torch.randint(0, 50, (3, 10), generator=torch.Generator().manual_seed(seed))


def relative(one: Tensor, other: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("operator", ["zero_pad", "balanced"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk", [False, True])
@pytest.mark.parametrize("inside", ["fresh", "copy"])
def test_llama_growth_is_exact_at_any_ratio(operator: str, tied: bool, qk: bool, inside: str) -> None:
    small, large = shape(SMALL, LLAMA, tied=tied, qk=qk), shape(LARGE, LLAMA, tied=tied, qk=qk)
    growth = GrowthConfig(hidden=operator, ffn=operator, head=operator, new_layers=inside)
    weights = random_weights(small)
    step = plan_growth(small, large, growth, seed=1)
    assert step.exact and set(step.operators) == {"hidden", "ffn", "head", "layer"}
    before, after = logits_BSV(weights, small, batch()), logits_BSV(grow(weights, step), large, batch())
    assert relative(after, before) < 1e-13


def test_gpt_growth_is_exact_by_centered_zero_padding() -> None:
    small, large = shape(SMALL, GPT), shape(LARGE, GPT)
    weights = random_weights(small)
    grown = grow(weights, plan_growth(small, large, GrowthConfig(), seed=1))
    assert relative(logits_BSV(grown, large, batch()), logits_BSV(weights, small, batch())) < 1e-13


@pytest.mark.parametrize("tied", [False, True])
def test_gpt_growth_by_balanced_copies_is_exact_at_integer_ratios(tied: bool) -> None:
    small, large = shape(SMALL, GPT, tied=tied), shape({**LARGE, "hidden_size": 48}, GPT, tied=tied)
    weights = random_weights(small)
    growth = GrowthConfig(hidden="balanced", ffn="balanced", head="balanced")
    grown = grow(weights, plan_growth(small, large, growth, seed=1))
    assert relative(logits_BSV(grown, large, batch()), logits_BSV(weights, small, batch())) < 1e-13


@pytest.mark.parametrize("layer", ["stack", "interpose"])
def test_copied_layers_do_not_claim_to_be_exact_and_are_not(layer: str) -> None:
    small = shape(SMALL, LLAMA)
    large = shape({**SMALL, "num_layers": 4}, LLAMA)
    step = plan_growth(small, large, GrowthConfig(layer=layer), seed=1)
    weights = random_weights(small)
    assert not step.exact
    assert relative(logits_BSV(grow(weights, step), large, batch()), logits_BSV(weights, small, batch())) > 1e-2
    expected = {"stack": (0, 1, 0, 1), "interpose": (0, 0, 1, 1)}[layer]
    assert step.layers.source == expected


def all_of(name: str, **options: object) -> GrowthConfig:
    """One operator on every width axis."""
    return GrowthConfig(hidden=name, ffn=name, head=name, **options)


def difference(small: ModelShape, large: ModelShape, growth: GrowthConfig) -> float:
    """Relative difference between the logits before and after growth."""
    weights = random_weights(small)
    grown = grow(weights, plan_growth(small, large, growth, seed=1))
    return relative(logits_BSV(grown, large, batch()), logits_BSV(weights, small, batch()))


DOUBLE = {**SMALL, "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 8, "num_query_groups": 4}


@pytest.mark.parametrize(
    "operator", [o for o in operators() if o.axis in ("hidden", "ffn", "head")], ids=lambda o: f"{o.axis}-{o.name}"
)
@pytest.mark.parametrize("target", [{**LARGE, "num_layers": 2}, DOUBLE], ids=["odd", "double"])
def test_every_width_operator_keeps_its_promise_on_its_axis(operator: Operator, target: dict) -> None:
    sizes = {
        "hidden": ("hidden_size",),
        "ffn": ("ffn_hidden_size",),
        "head": ("num_attention_heads", "num_query_groups"),
    }
    grown = {**SMALL, **{name: target[name] for name in sizes[operator.axis]}}
    small, large = shape(SMALL, LLAMA), shape(grown, LLAMA)
    growth = GrowthConfig(**{operator.axis: operator.name})
    step = plan_growth(small, large, growth, seed=1)
    promised = operator.exactness.holds(SMALL[sizes[operator.axis][0]], grown[sizes[operator.axis][0]])
    assert step.exact is promised
    if promised:
        assert difference(small, large, growth) < 1e-13
    else:
        assert difference(small, large, growth) > 1e-6


@pytest.mark.parametrize("operator", [o for o in operators() if o.axis == "layer"], ids=lambda o: o.name)
@pytest.mark.parametrize("architecture", [LLAMA, GPT], ids=["llama", "gpt"])
def test_every_depth_operator_keeps_its_promise(operator: Operator, architecture: dict) -> None:
    small, large = shape(SMALL, architecture), shape({**SMALL, "num_layers": 4}, architecture)
    growth = GrowthConfig(layer=operator.name)
    if operator.exactness is Exactness.ALWAYS:
        assert difference(small, large, growth) < 1e-13
    else:
        assert difference(small, large, growth) > 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_copies_at_twice_the_width_are_exact_tied_or_not(tied: bool) -> None:
    for name in ("fpi", "rms_copy", "balanced"):
        assert difference(shape(SMALL, LLAMA, tied=tied), shape(DOUBLE, LLAMA, tied=tied), all_of(name)) < 1e-13


@pytest.mark.parametrize("architecture", [LLAMA, GPT], ids=["llama", "gpt"])
def test_uneven_shares_are_exact_too(architecture: dict) -> None:
    small, large = shape(SMALL, architecture), shape({**DOUBLE, "num_layers": 3}, architecture)
    assert difference(small, large, all_of("balanced", share_of_new=0.2)) < 1e-13


@pytest.mark.parametrize("name", ["zero_pad", "balanced"])
@pytest.mark.parametrize(("heads", "groups"), [(8, 4), (4, 4), (12, 4), (5, 5), (6, 6)])
def test_a_group_may_get_fewer_heads(name: str, heads: int, groups: int) -> None:
    small = shape(SMALL, LLAMA)
    large = shape({**SMALL, "num_attention_heads": heads, "num_query_groups": groups}, LLAMA)
    assert difference(small, large, GrowthConfig(head=name)) < 1e-13


def test_overlap_takes_the_first_and_the_last_layers() -> None:
    small, large = shape({**SMALL, "num_layers": 8}, LLAMA), shape({**SMALL, "num_layers": 12}, LLAMA)
    layers = plan_growth(small, large, GrowthConfig(layer="overlap"), seed=1).layers
    assert layers.source == (0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7)
    assert layers.new == (False,) * 6 + (True,) * 4 + (False,) * 2


def test_aki_takes_new_rows_from_the_next_layer_and_the_top_layer_from_itself() -> None:
    small, large = shape(SMALL, LLAMA), shape({**SMALL, "ffn_hidden_size": 57}, LLAMA)
    weights = random_weights(small)
    key = "decoder.layers.mlp.linear_fc1.weight"
    gate = grow(weights, plan_growth(small, large, GrowthConfig(ffn="aki"), seed=1))[key][:, :57]
    assert torch.equal(gate[:, :40], weights[key][:, :40])
    assert torch.equal(gate[0, 40:], weights[key][1, :17])
    assert torch.equal(gate[1, 40:], weights[key][1, :17])


@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_leave_the_logits_of_old_ones_alone(tied: bool) -> None:
    small = shape(SMALL, LLAMA, tied=tied)
    large = shape(LARGE, LLAMA, tied=tied).model_copy(update={"vocab_size": 57, "make_vocab_size_divisible_by": 4})
    weights = random_weights(small)
    step = plan_growth(small, large, GrowthConfig(), seed=1)
    grown = grow(weights, step)
    after = logits_BSV(grown, large, batch())
    assert after.shape[-1] == 60 and not step.exact
    assert relative(after[..., :50], logits_BSV(weights, small, batch())) < 1e-13
    rows = grown["embedding.word_embeddings.weight"][50:, :24]
    assert 0.5 < float(rows.std()) / large.init_method_std < 1.5


def test_szp_is_the_old_weights_shrunk_plus_a_fresh_initialization() -> None:
    small, large = shape(SMALL, LLAMA), shape({**SMALL, "ffn_hidden_size": 57}, LLAMA)
    weights = random_weights(small)
    key = "decoder.layers.self_attention.linear_qkv.weight"
    one = grow(weights, plan_growth(small, large, GrowthConfig(ffn="szp", shrink=0.4), seed=1))[key]
    other = grow(weights, plan_growth(small, large, GrowthConfig(ffn="szp", shrink=0.8), seed=1))[key]
    assert relative(other - one, 0.4 * weights[key]) < 1e-13
    assert abs(float((one - 0.4 * weights[key]).std()) / large.init_method_std - 1) < 0.05


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_shapes_and_ratios_stay_exact(data: st.DataObject) -> None:
    draw = data.draw
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    more_groups, more_per_group = groups + draw(st.integers(0, 3)), per_group + draw(st.integers(0, 2))
    sizes = {
        "num_layers": draw(st.integers(1, 3)),
        "hidden_size": draw(st.integers(4, 20)),
        "ffn_hidden_size": draw(st.integers(3, 20)),
        "num_attention_heads": groups * per_group,
        "num_query_groups": groups,
        "kv_channels": 4,
    }
    larger = {
        **{key: sizes[key] + draw(st.integers(0, 15)) for key in ("num_layers", "hidden_size", "ffn_hidden_size")},
        "num_attention_heads": more_groups * more_per_group,
        "num_query_groups": more_groups,
        "kv_channels": 4,
    }
    tied, operator = draw(st.booleans()), draw(st.sampled_from(["zero_pad", "balanced"]))
    small, large = shape(sizes, LLAMA, tied=tied), shape(larger, LLAMA, tied=tied)
    step = plan_growth(small, large, GrowthConfig(hidden=operator, ffn=operator, head=operator), seed=3)
    weights = random_weights(small)
    assert step.exact
    assert relative(logits_BSV(grow(weights, step), large, batch()), logits_BSV(weights, small, batch())) < 1e-12


@pytest.mark.parametrize("operator", ["zero_pad", "balanced", "uneven"])
@pytest.mark.parametrize("tied", [False, True])
def test_exact_moments_are_the_gradients_of_the_grown_model(operator: str, tied: bool) -> None:
    """With gradients in place of moments, the policy `exact` predicts the grown model's gradient of every old entry."""
    small = shape(SMALL, LLAMA, tied=tied, qk=True)
    large = shape({**LARGE, "num_layers": SMALL["num_layers"]}, LLAMA, tied=tied, qk=True)
    uneven = all_of("balanced", moments="exact", share_of_new=0.2)
    growth = uneven if operator == "uneven" else all_of(operator, moments="exact")
    step = plan_growth(small, large, growth, seed=1)
    weights = random_weights(small)
    state = _with_gradients_as_moments(weights, small)
    grown = grow(state, step)
    actual = _gradients({kind.key: grown[kind.key] for kind in tensor_kinds(large)}, large)
    for kind in tensor_kinds(large):
        predicted = grown[optimizer_key("exp_avg", kind.key)]
        squared = grown[optimizer_key("exp_avg_sq", kind.key)]
        sourced = _sourced(kind.key, step, predicted)
        assert relative(predicted[sourced], actual[kind.key][sourced]) < 1e-11, kind.key
        assert relative(squared[sourced], actual[kind.key][sourced] ** 2) < 1e-11, kind.key
        assert not predicted[~sourced].any(), kind.key


def test_asymmetric_moments_are_zero_for_copies_and_reset_for_all() -> None:
    small, large = shape(SMALL, LLAMA), shape(LARGE, LLAMA)
    state = _with_gradients_as_moments(random_weights(small), small)
    key = optimizer_key("exp_avg", "decoder.layers.mlp.linear_fc2.weight")
    grown = {}
    for policy in ("exact", "copy", "asymmetric", "reset"):
        growth = GrowthConfig(hidden="balanced", ffn="balanced", head="balanced", moments=policy)
        grown[policy] = grow(state, plan_growth(small, large, growth, seed=1))[key][0]
    assert torch.equal(grown["asymmetric"][:24, :40], grown["exact"][:24, :40])
    assert not grown["asymmetric"][24:].any() and not grown["asymmetric"][:, 40:].any()
    assert grown["exact"][24:, 40:].all()
    assert torch.equal(grown["copy"][:24, :40], state[key][0])
    assert not grown["reset"].any()


@pytest.mark.parametrize("operator", ["zero_pad", "balanced"])
@pytest.mark.parametrize("architecture", [LLAMA, GPT], ids=["llama", "gpt"])
@pytest.mark.parametrize("layer", ["identity", "redundant"])
def test_nothing_that_is_new_is_dead(operator: str, architecture: dict, layer: str) -> None:
    """Within two steps of Adam (the gradient's sign), every entry has a gradient; within four if a gain comes first."""
    target = LARGE if operator == "zero_pad" else {**LARGE, "hidden_size": 48}
    small, large = shape(SMALL, architecture), shape(target, architecture)
    growth = all_of(operator, layer=layer)
    weights = grow(random_weights(small), plan_growth(small, large, growth, seed=1))
    alive = {key: torch.zeros_like(value, dtype=torch.bool) for key, value in weights.items()}
    for step in range(4 if layer == "redundant" else 2):
        gradients = _gradients_beyond_rounding(weights, large, seed=step)
        alive = {key: flags | (gradients[key] != 0) for key, flags in alive.items()}
        weights = {key: value - 0.01 * gradients[key].sign() for key, value in weights.items()}
    for key, flags in alive.items():
        if key.startswith("embedding"):  # only rows of tokens and positions in the batches
            flags = flags[batch(0)[:, :-1].unique()] if "word" in key else flags[:9]
        if key.endswith("linear_qkv.bias"):  # a bias of the keys does not change the softmax
            flags = flags.view(large.num_layers, large.groups, -1, large.head_dim)[:, :, [0, -1]]
        assert flags.all(), key


def test_impossible_steps_name_the_reason_and_an_alternative() -> None:
    thin = shape({**LARGE, "num_attention_heads": 3, "num_query_groups": 3}, LLAMA)
    with pytest.raises(
        GrowthError, match="lose their KV head.*keep 2 query heads per group, or set num_query_groups 4"
    ):
        plan_growth(shape(SMALL, LLAMA), thin, GrowthConfig(), seed=1)
    deep = shape({**LARGE, "num_layers": 5}, LLAMA)
    with pytest.raises(GrowthError, match="overlap at most doubles the layers, and 5 is more than twice 2; use stack"):
        plan_growth(shape(SMALL, LLAMA), deep, GrowthConfig(layer="overlap"), seed=1)
    with pytest.raises(GrowthError, match="tied embeddings.*balanced"):
        plan_growth(shape(SMALL, GPT, tied=True), shape(LARGE, GPT, tied=True), GrowthConfig(), seed=1)
    with pytest.raises(GrowthError, match="non-integer ratio.*zero_pad"):
        plan_growth(shape(SMALL, GPT), shape(LARGE, GPT), GrowthConfig(hidden="balanced"), seed=1)
    with pytest.raises(GrowthError, match="did you mean balanced"):
        plan_growth(shape(SMALL, LLAMA), shape(SMALL, LLAMA), GrowthConfig(hidden="ballanced"), seed=1)


def test_random_parts_depend_on_the_seed_alone() -> None:
    small, large = shape(SMALL, LLAMA), shape(LARGE, LLAMA)
    weights = random_weights(small)
    one, same, other = (grow(weights, plan_growth(small, large, GrowthConfig(), seed=seed)) for seed in (1, 1, 2))
    key = "decoder.layers.mlp.linear_fc1.weight"
    assert torch.equal(one[key], same[key])
    assert not torch.equal(one[key], other[key])
    fresh = one["decoder.layers.self_attention.linear_qkv.weight"][1]
    assert abs(float(fresh.std()) / large.init_method_std - 1) < 0.05


def test_noise_changes_copies_only_and_loses_exactness() -> None:
    small, large = shape(SMALL, LLAMA), shape({**SMALL, "ffn_hidden_size": 57}, LLAMA)
    quiet = plan_growth(small, large, GrowthConfig(ffn="balanced"), seed=1)
    noisy = plan_growth(small, large, GrowthConfig(ffn="balanced", noise=0.1), seed=1)
    assert quiet.exact and not noisy.exact
    key = "decoder.layers.mlp.linear_fc2.weight"
    weights = random_weights(small)
    one, other = grow(weights, quiet)[key], grow(weights, noisy)[key]
    assert torch.equal(one[..., :40], other[..., :40])
    assert 0.05 < float((other[..., 40:] / one[..., 40:] - 1).std()) < 0.15


def _gradients(weights: dict[str, Tensor], of: ModelShape, seed: int = 5) -> dict[str, Tensor]:
    leaves = {key: value.clone().requires_grad_() for key, value in weights.items()}
    loss(leaves, of, batch(seed)).backward()
    return {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}


def _gradients_beyond_rounding(weights: dict[str, Tensor], of: ModelShape, seed: int) -> dict[str, Tensor]:
    """Gradients, with zero for what rounding leaves of a sum that cancels: here below 1e-17, real ones above 1e-14."""
    found = _gradients(weights, of, seed)
    return {key: gradient.where(gradient.abs() > 1e-15, 0.0) for key, gradient in found.items()}


def _with_gradients_as_moments(weights: dict[str, Tensor], of: ModelShape) -> dict[str, Tensor]:
    """A checkpoint whose exp_avg is one gradient and whose exp_avg_sq is its square."""
    state = dict(weights)
    for key, gradient in _gradients(weights, of).items():
        state[optimizer_key("param", key)] = weights[key]
        state[optimizer_key("exp_avg", key)] = gradient
        state[optimizer_key("exp_avg_sq", key)] = gradient**2
    return state


def _sourced(key: str, step: GrowthStep, like: Tensor) -> Tensor:
    """Whether each entry has a source."""
    kind = next(kind for kind in tensor_kinds(step.large) if kind.key == key)
    flags = torch.ones(kind.layer_shape(step.large), dtype=torch.bool)
    for axis, dim in enumerate(kind.dims):
        missing = torch.from_numpy(dim.grow(step).source == NO_SOURCE)
        flags.index_fill_(axis, missing.nonzero().flatten(), False)
    return flags.expand(like.shape)
