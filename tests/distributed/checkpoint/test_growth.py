"""Growth proved on Megatron-Core itself, in float64: functions, gradients, nothing dead; the plain reference agrees.

One rank does everything from one start: each check is a function of this module that asserts, and `work` says of
each whether it passed. Random shapes are hypothesis's; it runs in the rank, where Megatron-Core is.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megagrow.checkpoint.tensors.growth_record import describe_step, new_entries
from megagrow.checkpoint.tensors.table import optimizer_key, tensor_kinds
from megagrow.config import GrowthConfig, ModelShape, Schedule
from megagrow.evaluate.duality import prediction_errors, rule_applies
from megagrow.growth.maps.step import GrowthStep
from megagrow.growth.operators.plan import plan_growth
from megagrow.growth.operators.registry import Operator, operators
from tests.distributed.ranks.launcher import run_ranks
from tests.unit.growth.test_growth import (
    DOUBLE,
    GPT,
    LARGE,
    LLAMA,
    SMALL,
    all_of,
    grow,
    random_weights,
    relative,
    shape,
)
from tools.reference.memory import MemoryStore
from tools.reference.plain import logits_BSV

AXES = {
    "hidden": ("hidden_size",),
    "ffn": ("ffn_hidden_size",),
    "head": ("num_attention_heads", "num_query_groups"),
    "layer": ("num_layers",),
}
ODD = {**LARGE, "num_layers": 4}
EVEN = {**DOUBLE, "num_layers": 4}
EXACT, RIGHT = 1e-12, 1e-10
ROTARY = 1e-5
"""Between two tables of rotary cosines: they are float32, and a cosine may differ by its place in the table."""
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Let a function be one of the checks."""
    CHECKS[function.__name__] = function
    return function


def work(payload: None) -> dict[str, str]:
    """Each check and how it failed; an empty text: not."""
    from megagrow import runtime

    runtime.start(seed=1)
    torch.set_num_threads(1)
    out = {}
    for name, function in CHECKS.items():
        try:
            function()
            out[name] = ""
        except Exception:
            out[name] = traceback.format_exc()
    return out


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """What the checks said, from one start."""
    return run_ranks("tests.distributed.checkpoint.test_growth:work", 1)[0]


@dataclass
class Pair:
    """A growth step, and both models after forward and backward on the same tokens."""

    step: GrowthStep
    difference: float
    parent: dict[str, Tensor]
    child: dict[str, Tensor]

    @property
    def gradient_error(self) -> float:
        """Largest error of the dual rule's predictions."""
        assert rule_applies(self.step)
        errors = prediction_errors(self.step, self.parent, self.child)
        assert sum(count for _, count in errors.values()) > 100
        return max(error for error, _ in errors.values())


def run(of: ModelShape, weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Logits and gradients of a real GPTModel in float64, and the model."""
    from megagrow.evaluate.deep import random_batches
    from megagrow.evaluate.live import LiveModel

    model = LiveModel(of, MemoryStore(weights), "fp64")
    seen = model.gradients(random_batches(of)[0])
    assert seen.logits.dtype == torch.float64
    return seen.logits.detach(), model.stacked(_gradient), model


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def grown_pair(small: ModelShape, large: ModelShape, growth: GrowthConfig) -> Pair:
    weights = random_weights(small)
    step = plan_growth(small, large, growth, seed=1)
    before, parent, _ = run(small, weights)
    after, child, _ = run(large, grow(weights, step))
    return Pair(step, relative(after, before), parent, child)


@check
def the_plain_reference_has_megatrons_logits() -> None:
    from megagrow.evaluate.deep import random_batches

    biased = {**LLAMA, "add_bias_linear": True}
    mixed = {**GPT, "position_embedding_type": "rope", "add_bias_linear": False}
    for architecture in (LLAMA, GPT, biased, mixed):
        for tied in (False, True):
            for qk in (False, True):
                of = shape(SMALL, architecture, tied=tied, qk=qk)
                weights = random_weights(of)
                logits, _, _ = run(of, weights)
                plain = logits_BSV(weights, of, random_batches(of)[0].tokens)
                tolerance = ROTARY if of.position_embedding_type == "rope" else EXACT
                assert relative(logits, plain) < tolerance, (architecture, tied, qk)


@check
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def random_shapes_at_random_ratios_are_exact_and_so_are_their_gradients(data: st.DataObject) -> None:
    draw = data.draw
    architecture = draw(st.sampled_from([LLAMA, GPT]))
    layer_norm = architecture is GPT
    operator = draw(st.sampled_from(["zero_pad", "balanced", "fpi"]))
    integer = operator == "fpi" or (layer_norm and operator == "balanced")
    tied = draw(st.booleans()) and not (layer_norm and operator == "zero_pad")
    groups, per_group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    hidden, ffn, layers = draw(st.integers(4, 16)), draw(st.integers(3, 16)), draw(st.integers(1, 2))
    small = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": groups * per_group,
        "num_query_groups": groups,
        "kv_channels": 4,
    }
    more = (groups + draw(st.integers(0, 2)), per_group + draw(st.integers(0, 2)))
    large = {
        "num_layers": layers + draw(st.integers(0, 2)),
        "hidden_size": hidden * draw(st.integers(1, 3)) if integer else hidden + draw(st.integers(0, 12)),
        "ffn_hidden_size": ffn + draw(st.integers(0, 12)),
        "num_attention_heads": more[0] * more[1],
        "num_query_groups": more[0],
        "kv_channels": 4,
    }
    qk = draw(st.booleans())
    growth = all_of(
        operator,
        layer=draw(st.sampled_from(["identity", "redundant"])),
        new_layers=draw(st.sampled_from(["fresh", "copy"])),
        share_of_new=draw(st.sampled_from([None, 0.3])) if operator == "balanced" and not layer_norm else None,
    )
    pair = grown_pair(
        shape(small, architecture, tied=tied, qk=qk), shape(large, architecture, tied=tied, qk=qk), growth
    )
    assert pair.step.exact
    assert pair.difference < EXACT
    assert pair.gradient_error < RIGHT


@check
def every_operator_keeps_its_word() -> None:
    """Each on its own axis, at an odd ratio and at 2, for both architectures where it does not refuse."""
    from megagrow.errors import GrowthError

    tried = 0
    for operator in (operator for operator in operators() if operator.axis in AXES):
        for architecture in (LLAMA, GPT):
            for target in (ODD, EVEN):
                try:
                    tried += _keeps_its_word(operator, architecture, target)
                except GrowthError as refusal:
                    assert architecture is GPT and "non-integer ratio" in str(refusal)
    assert tried > 60


def _keeps_its_word(operator: Operator, architecture: dict, target: dict) -> bool:
    sizes = {**SMALL, **{name: target[name] for name in AXES[operator.axis]}}
    growth = GrowthConfig(**{operator.axis: operator.name})
    pair = grown_pair(shape(SMALL, architecture), shape(sizes, architecture), growth)
    name = AXES[operator.axis][0]
    assert pair.step.exact is operator.exactness.holds(SMALL[name], sizes[name])
    where = (operator.axis, operator.name, architecture["normalization"], sizes[name])
    if pair.step.exact:
        assert pair.difference < EXACT, where
        if rule_applies(pair.step):
            assert pair.gradient_error < RIGHT, where
    else:
        assert pair.difference > 1e-6, where
    return True


@check
def uneven_shares_keep_the_function_and_where_the_rule_says_so_the_gradients() -> None:
    for architecture, follows in ((LLAMA, True), (GPT, False)):
        small, large = shape(SMALL, architecture), shape(EVEN, architecture)
        pair = grown_pair(small, large, all_of("balanced", share_of_new=0.2))
        assert pair.difference < EXACT
        assert rule_applies(pair.step) is follows
        errors = prediction_errors(pair.step, pair.parent, pair.child)
        worst = max(error for error, _ in errors.values())
        assert worst < RIGHT if follows else worst > 1e-3  # the limit is real, not caution


@check
def the_limits_of_the_dual_rule_are_real() -> None:
    """Without what `prediction_errors` leaves out the prediction would be wrong."""
    from megagrow.growth.maps.axis import NO_SOURCE
    from megagrow.growth.maps.step import Moments
    from megagrow.growth.values.grow import grow_moment

    centered = grown_pair(shape(SMALL, GPT), shape({**SMALL, "hidden_size": 31}, GPT), GrowthConfig())
    thin = {**SMALL, "num_attention_heads": 4, "num_query_groups": 4}
    thinner = grown_pair(shape(SMALL, LLAMA), shape(thin, LLAMA), GrowthConfig(head="balanced"))
    cases = (
        (centered, "decoder.layers.mlp.linear_fc2.weight"),
        (thinner, "decoder.layers.self_attention.linear_qkv.weight"),
    )
    for pair, key in cases:
        assert pair.gradient_error < RIGHT
        kind = next(kind for kind in tensor_kinds(pair.step.large) if kind.key == key)
        dims = [dim.grow(pair.step) for dim in kind.dims]
        predicted = grow_moment(pair.parent[key][0], dims, power=1, policy=Moments.EXACT)
        old = dims[0].source != NO_SOURCE
        assert relative(predicted[old], pair.child[key][0][old]) > 1e-3


@check
def all_that_is_new_moves_within_two_steps() -> None:
    """Every tensor of every new layer, and in every tensor each new row and column: neurons, heads, coordinates.

    New heads and neurons inside a new redundant layer need four steps: its gains wake first, then their readers.
    """
    for architecture in (LLAMA, GPT):
        for name in ("zero_pad", "balanced", "fpi"):
            for layer in ("identity", "redundant"):
                for new_layers in ("fresh", "copy")[layer == "redundant" :]:
                    target = ODD if name == "zero_pad" else EVEN
                    growth = all_of(name, layer=layer, new_layers=new_layers, moments="reset")
                    _moves(shape(SMALL, architecture), shape(target, architecture), growth)


def _moves(small: ModelShape, large: ModelShape, growth: GrowthConfig) -> None:
    from megagrow.evaluate.copies import resume_adam
    from megagrow.evaluate.deep import random_batches

    step = plan_growth(small, large, growth, seed=1)
    weights = grow(random_weights(small), step)
    _, _, model = run(large, weights)
    # no decay, which would move what has no gradient
    optimizer = resume_adam(model, Schedule(weight_decay=0.0), 1e-3, 0)
    for number in range(1, 5):
        optimizer.step()
        after = model.stacked(lambda parameter: parameter.detach())
        # by what rounding leaves of a sum that cancels Adam moves less than 1e-12; by real gradients 1e-11 and more
        moved = {key: (values - weights[key]).abs() > 3e-12 for key, values in after.items()}
        if number == 2:
            for kind in (kind for kind in tensor_kinds(large) if kind.per_layer):
                assert all(moved[kind.key][new].any() for new in _new_layers(step)), (kind.key, growth)
            _no_slice_is_dead(step, moved, growth, new_layers=growth.layer == "identity")
        model.gradients(random_batches(large)[number % 4])
    _no_slice_is_dead(step, moved, growth, new_layers=True)


def _no_slice_is_dead(step: GrowthStep, moved: dict[str, Tensor], growth: GrowthConfig, *, new_layers: bool) -> None:
    content, large = describe_step(step), step.large
    for kind in (kind for kind in tensor_kinds(large) if not kind.key.startswith("embedding")):
        for layer in range(large.num_layers) if kind.per_layer else (None,):
            if layer in _new_layers(step) and not new_layers:
                continue
            flags = moved[kind.key] if layer is None else moved[kind.key][layer]
            new = torch.from_numpy(new_entries(content, kind, large, layer))
            for axis in range(flags.dim()):
                others = tuple(other for other in range(flags.dim()) if other != axis)
                dead = (new.all(others) if others else new) & ~(flags.any(others) if others else flags)
                assert not dead[_keys_aside(kind.key, large, axis)].any(), (kind.address(layer), axis, growth)


def _new_layers(step: GrowthStep) -> list[int]:
    return [layer for layer, new in enumerate(step.layers.new) if new]


def _keys_aside(key: str, of: ModelShape, axis: int) -> Tensor:
    """All indices but, of a bias, those of keys: softmax does not see what all keys have in common."""
    size = next(kind for kind in tensor_kinds(of) if kind.key == key).layer_shape(of)[axis]
    index = torch.arange(size)
    if not key.endswith("linear_qkv.bias"):
        return index
    return index[index // of.head_dim % (of.heads_per_group + 2) != of.heads_per_group]


@check
def mixtures_grow_exactly_to_their_routers_rounding() -> None:
    """Upcycled, duplicated and widened; only fixed experts have a dual rule."""
    mixed = {"num_moe_experts": 4, "moe_router_topk": 2}
    dense, mixture = shape(SMALL, LLAMA), shape({**SMALL, **mixed}, LLAMA)
    twice = shape({**SMALL, "num_moe_experts": 8, "moe_router_topk": 4}, LLAMA)
    for small, large, follows in (
        (dense, shape({**LARGE, **mixed}, LLAMA), False),
        (mixture, twice, False),
        (mixture, shape({**LARGE, **mixed}, LLAMA), True),
    ):
        pair = grown_pair(small, large, GrowthConfig(router_noise=0.0))
        assert pair.step.exact and pair.difference < 1e-6
        assert rule_applies(pair.step) is follows
        if follows:
            assert pair.gradient_error < RIGHT


@check
def verdicts_follow_from_difference_rounding_and_promise() -> None:
    from megagrow.evaluate.deep import logit_verdict

    def verdict(relative: float, rounding: Any, promised: bool = True, rounded: bool = True) -> str:
        return logit_verdict(relative, rounding, promised=promised, rounded=rounded)[0]

    assert verdict(1e-13, "fp64") == verdict(1e-6, "fp32") == verdict(1e-6, "fp32", promised=False) == "exact"
    assert verdict(1e-3, "bf16") == "within"
    assert verdict(1e-11, "fp64") == verdict(1e-4, "fp32") == verdict(0.1, "bf16") == "broken"
    assert verdict(0.1, "fp32", promised=False) == "not preserving"
    assert verdict(0.0, "fp64", rounded=False) == "broken"


@check
def masters_are_loaded_and_bf16_weights_are_what_they_round_to() -> None:
    from megagrow.evaluate.live import LiveModel

    of = shape(SMALL, LLAMA)
    state = {key: value.float() for key, value in random_weights(of).items()}
    rounded = {key: value.bfloat16() for key, value in state.items()}
    both = rounded | {optimizer_key("param", key): value for key, value in state.items()}
    model = LiveModel(of, MemoryStore(both), "fp64")
    assert model.rounded_masters()
    for key, value in model.stacked(lambda parameter: parameter.detach()).items():
        assert torch.equal(value, state[key].double()), key
    both["output_layer.weight"] = both["output_layer.weight"] * 1.01
    assert not LiveModel(of, MemoryStore(both), "fp64").rounded_masters()


@pytest.mark.parametrize("name", CHECKS)
def test_growth_on_megatron(name: str, results: dict[str, str]) -> None:
    assert not results[name], results[name]
