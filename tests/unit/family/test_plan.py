"""The plan against numbers computed by hand, and the identities that hold for any family."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagrow.config import Batch, Family, ModelShape, Schedule, Stage, load
from megagrow.config.family import Budget, Data, DataSource, LearningRateRule
from megagrow.errors import ConfigError
from megagrow.plan import (
    budget_parameters,
    count_parameters,
    family_plan,
    flops_per_token,
    learning_rate,
    peak_lr,
    price,
    six_n,
)

REPOSITORY = Path(__file__).parents[3]
EXAMPLE = REPOSITORY / "examples" / "llama_1b_to_8b" / "family.yaml"


def shape(**changes: object) -> ModelShape:
    sizes = {"num_layers": 3, "hidden_size": 24, "ffn_hidden_size": 40, "num_attention_heads": 6, "num_query_groups": 2}
    return ModelShape(**{**sizes, "vocab_size": 200, "seq_length": 16, **changes})


def family(*stages: Stage, **changes: object) -> Family:
    return Family(name="f", save="runs/f", data=Data(sources=(DataSource(prefix="x"),)), stages=stages, **changes)


def stage(nominal: float, name: str | None = None, **changes: object) -> Stage:
    model = shape(nominal_parameters=nominal)
    batch = Batch(micro_batch_size=1, global_batch_size=2)
    return Stage(name=name or f"n{nominal:.0f}", model=model, batch=batch, **changes)


# Parameters -----------------------------------------------------------------------------------------------------------


def test_llama_3_8b_has_its_published_count() -> None:
    llama = ModelShape(
        num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
        vocab_size=128256, seq_length=8192, rotary_base=500000,
    )  # fmt: skip
    assert count_parameters(llama).total == 8_030_261_248


def test_gpt2_has_its_published_count() -> None:
    gpt2 = ModelShape(
        num_layers=12, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12, vocab_size=50257,
        make_vocab_size_divisible_by=1, seq_length=1024, normalization="LayerNorm", swiglu=False, add_bias_linear=True,
        position_embedding_type="learned_absolute", untie_embeddings_and_output_weights=False,
    )  # fmt: skip
    assert count_parameters(gpt2).total == 124_439_808


@pytest.mark.parametrize(
    ("changes", "by_hand"),
    [
        # head_dim 4, padded vocabulary 256: 2 tables, 3 x (qkv 24x40, proj 24x24, gate+up+down 3x24x40, 2 norms), norm
        ({}, 2 * 256 * 24 + 3 * (24 * 40 + 24 * 24 + 3 * 24 * 40 + 2 * 24) + 24),
        ({"untie_embeddings_and_output_weights": False}, 256 * 24 + 3 * (960 + 576 + 2880 + 48) + 24),
        ({"make_vocab_size_divisible_by": 1}, 2 * 200 * 24 + 3 * (960 + 576 + 2880 + 48) + 24),
        ({"swiglu": False}, 2 * 256 * 24 + 3 * (960 + 576 + 2 * 24 * 40 + 48) + 24),
        # biases: qkv 40, proj 24, fc1 both halves 80, fc2 24
        ({"add_bias_linear": True}, 2 * 256 * 24 + 3 * (960 + 576 + 2880 + 48 + 40 + 24 + 80 + 24) + 24),
        (
            {"add_bias_linear": True, "swiglu": False},
            2 * 256 * 24 + 3 * (960 + 576 + 1920 + 48 + 40 + 24 + 40 + 24) + 24,
        ),
        ({"normalization": "LayerNorm"}, 2 * 256 * 24 + 3 * (960 + 576 + 2880 + 96) + 48),
        ({"qk_layernorm": True}, 2 * 256 * 24 + 3 * (960 + 576 + 2880 + 48 + 8) + 24),
        ({"qk_layernorm": True, "normalization": "LayerNorm"}, 2 * 256 * 24 + 3 * (960 + 576 + 2880 + 96 + 16) + 48),
        # kv_channels 10: query width 60 is not hidden_size; qkv 24 x (60 + 2 x 2 x 10), proj 60 x 24
        ({"kv_channels": 10}, 2 * 256 * 24 + 3 * (24 * 100 + 60 * 24 + 2880 + 48) + 24),
        ({"num_query_groups": None}, 2 * 256 * 24 + 3 * (24 * 72 + 576 + 2880 + 48) + 24),
        ({"position_embedding_type": "learned_absolute"}, 2 * 256 * 24 + 16 * 24 + 3 * (960 + 576 + 2880 + 48) + 24),
        (
            {"position_embedding_type": "learned_absolute", "max_position_embeddings": 32},
            2 * 256 * 24 + 32 * 24 + 3 * (960 + 576 + 2880 + 48) + 24,
        ),
    ],
)
def test_parameters_of_every_variant(changes: dict[str, object], by_hand: int) -> None:
    assert count_parameters(shape(**changes)).total == by_hand


def test_nominal_parameters_set_the_budget_but_not_the_count() -> None:
    nominal = shape(nominal_parameters=1e9)
    assert budget_parameters(nominal) == 1e9
    assert count_parameters(nominal) == count_parameters(shape())
    assert budget_parameters(shape()) == count_parameters(shape()).total


# FLOPs ----------------------------------------------------------------------------------------------------------------


def test_flops_by_hand() -> None:
    got = flops_per_token(shape(kv_channels=10))
    assert got.linear_qkv == 3 * 6 * 24 * 100
    assert got.linear_proj == 3 * 6 * 60 * 24
    assert got.mlp == 3 * 6 * 3 * 24 * 40
    assert got.output_layer == 6 * 24 * 256
    assert got.total == got.linear_qkv + got.attention + got.linear_proj + got.mlp + got.output_layer


def test_attention_counts_the_causal_half() -> None:
    """Summed position by position: position t attends to t + 1 keys, in the scores and in the values."""
    length, heads, channels, layers = 512, 6, 4, 3
    forward = sum(2 * 2 * heads * channels * (t + 1) for t in range(length)) * layers
    counted = flops_per_token(shape(seq_length=length)).attention * length
    assert counted == pytest.approx(3 * forward, rel=1 / length)


def test_tied_and_gated_layers_cost_their_products() -> None:
    assert flops_per_token(shape(untie_embeddings_and_output_weights=False)) == flops_per_token(shape())
    assert flops_per_token(shape(swiglu=False)).mlp * 3 == flops_per_token(shape()).mlp * 2


def test_six_n_is_near_the_exact_count_for_a_large_model() -> None:
    large = load(EXAMPLE).stages[-1].model
    assert six_n(large) == 48e9
    assert flops_per_token(large).total == pytest.approx(6 * 8.03e9, rel=0.1)


# Budget ---------------------------------------------------------------------------------------------------------------


def test_one_two_four_eight_billion() -> None:
    plan = family_plan(family(*[stage(n * 1e9) for n in (1, 2, 4, 8)]))
    assert [one.tokens for one in plan.stages] == [20e9, 30e9, 60e9, 120e9]
    assert [one.tokens_independent for one in plan.stages] == [20e9, 40e9, 80e9, 160e9]
    assert plan.flops.six_nt == pytest.approx(6 * 8e9 * 160e9)
    assert plan.saving() == pytest.approx(1 - 64 / 85)
    assert f"{100 * plan.saving():.1f}" == "24.7"


def test_explicit_tokens_are_kept_and_read_backwards() -> None:
    """Costs of 6 and 6 units: the second alone would have 12, so both alone 18 and the family 12."""
    plan = family_plan(family(stage(1e3, train_tokens=2000), stage(2e3, train_tokens=1000)))
    assert [one.tokens for one in plan.stages] == [2000, 1000]
    assert [one.tokens_independent for one in plan.stages] == [2000, 2000]
    assert plan.saving("6NT") == pytest.approx(1 / 3)


def test_an_automatic_stage_gets_what_explicit_ancestors_leave() -> None:
    plan = family_plan(family(stage(1e3, train_tokens=10_000), stage(2e3)))
    assert plan.stages[1].tokens == 40_000 - 5_000


@pytest.mark.parametrize("second", [1e3, 0.9e3])
def test_nothing_left_to_train_is_an_error_that_names_the_stage(second: float) -> None:
    with pytest.raises(ConfigError, match=r"stages\.1 \('b'\).*1\.2e\+08.*set stages\.1\.train_tokens"):
        family_plan(family(stage(1e3, "a"), stage(second, "b")))


def test_iterations_round_down_to_at_least_one() -> None:
    plan = family_plan(family(stage(1e3, train_tokens=32 * 7 + 31), stage(2e3)))
    assert plan.stages[0].tokens_per_step == 32
    assert plan.stages[0].iterations == 7
    assert price(family(stage(1e3)), [5]).stages[0].iterations == 1


def test_price_takes_a_prefix() -> None:
    whole = family(*[stage(n * 1e9) for n in (1, 2, 4)])
    assert price(whole, [20_000_000_000]).stages == family_plan(whole).stages[:1]
    assert price(whole, []).saving() == 0.0


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.floats(1.2, 8), min_size=1, max_size=5),
    tokens_per_parameter=st.floats(1, 200),
    rule=st.sampled_from(["6NT", "exact"]),
)
def test_the_family_costs_its_last_member(
    sizes: list[float], tokens_per_parameter: float, rule: Literal["6NT", "exact"]
) -> None:
    """For any automatic family and either rule, own budgets come back, C_n pays for all, and the family saves."""
    nominal, stages = 1e8, []
    for index, ratio in enumerate(sizes):
        nominal *= ratio
        stages.append(stage(nominal, name=f"s{index}"))
    plan = family_plan(family(*stages, budget=Budget(tokens_per_parameter=tokens_per_parameter, rule=rule)))
    for one in plan.stages:
        assert one.nominal_parameters is not None
        assert one.tokens_independent == pytest.approx(tokens_per_parameter * one.nominal_parameters, rel=1e-6)
        assert 0 < one.tokens <= one.tokens_independent * (1 + 1e-6)
    assert plan.flops.by(rule) == pytest.approx(plan.stages[-1].flops_independent.by(rule), rel=1e-9)
    assert (plan.saving() > 0) == (len(stages) > 1) or plan.saving() == pytest.approx(0)


@settings(max_examples=40, deadline=None)
@given(tokens=st.lists(st.integers(1, 10**12), min_size=1, max_size=5))
def test_alone_costs_the_running_sum(tokens: list[int]) -> None:
    stages = [stage(1e6 * (index + 1), name=f"s{index}") for index in range(len(tokens))]
    plan = price(family(*stages), tokens)
    costs = [6e6 * (index + 1) * taken for index, taken in enumerate(tokens)]
    running = [sum(costs[: index + 1]) for index in range(len(costs))]
    assert [one.flops_independent.six_nt for one in plan.stages] == pytest.approx(running)
    assert plan.saving() == pytest.approx(1 - running[-1] / sum(running), abs=1e-12)


# Learning rate --------------------------------------------------------------------------------------------------------


def test_peak_lr_rules() -> None:
    power = LearningRateRule(rule="power", reference=1e-3, exponent=0.5)
    stages = (stage(1e9), stage(4e9), stage(8e9, schedule=Schedule(max_lr=7e-5)))
    assert peak_lr(family(*stages, learning_rate=power), 0) == pytest.approx(1e-3)
    assert peak_lr(family(*stages, learning_rate=power), 1) == pytest.approx(5e-4)
    assert peak_lr(family(*stages, learning_rate=power), 2) == 7e-5
    of_two = power.model_copy(update={"reference_parameters": 2e9})
    assert peak_lr(family(*stages, learning_rate=of_two), 0) == pytest.approx(1e-3 * math.sqrt(2))
    assert peak_lr(family(*stages), 1) == 1e-3


def rates(iterations: int, **changes: object) -> list[float]:
    return [learning_rate(Schedule(**changes), 1.0, step, iterations) for step in range(iterations)]


@pytest.mark.parametrize("style", ["cosine", "linear", "WSD"])
@pytest.mark.parametrize("iterations", [2, 10, 100, 1001])
def test_schedule_has_the_specified_start_peak_and_end(style: str, iterations: int) -> None:
    got = rates(iterations, lr_decay_style=style, lr_warmup_fraction=0.1, min_lr_ratio=0.05)
    warmup = round(0.1 * iterations)
    assert got[0] == pytest.approx(1 / max(warmup, 1))
    assert max(got) == got[max(warmup - 1, 0)] == 1.0
    assert got[-1] == pytest.approx(0.05, abs=1e-15)
    assert learning_rate(Schedule(lr_decay_style=style, min_lr_ratio=0.05), 1.0, iterations + 9, iterations) == (
        pytest.approx(0.05, abs=1e-15)
    )


@pytest.mark.parametrize("style", ["cosine", "linear", "WSD"])
def test_schedule_has_no_jumps(style: str) -> None:
    got = rates(1000, lr_decay_style=style, lr_warmup_fraction=0.05, lr_wsd_decay_fraction=0.3, min_lr_ratio=0.1)
    assert all(late <= early for early, late in zip(got[49:], got[50:], strict=False))
    falls = [abs(late - early) for early, late in zip(got, got[1:], strict=False)]
    steepest = {"cosine": 0.9 * math.pi / 2 / 950, "linear": 0.9 / 950, "WSD": 0.9 / 300}[style]
    assert max(falls[:49]) == pytest.approx(1 / 50)
    assert max(falls[49:]) <= steepest * 1.001


def test_middle_of_each_schedule() -> None:
    plain = {"lr_warmup_fraction": 0.0, "min_lr_ratio": 0.0}
    assert rates(101, lr_decay_style="linear", **plain)[25] == pytest.approx(0.75)
    assert rates(101, lr_decay_style="cosine", **plain)[25] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    stable = rates(100, lr_decay_style="WSD", lr_wsd_decay_fraction=0.2, **plain)
    assert stable[:80] == [1.0] * 80
    assert stable[79:] == pytest.approx([1 - k / 20 for k in range(21)])
    assert rates(100, lr_decay_style="constant", lr_warmup_fraction=0.1)[9:] == [1.0] * 91


def test_a_stage_of_one_step_trains_at_the_peak() -> None:
    assert rates(1, lr_warmup_fraction=0.5) == [1.0]


# The example, and speed -----------------------------------------------------------------------------------------------


def test_the_example_matches_its_comments() -> None:
    plan = family_plan(load(EXAMPLE))
    for one, billions in zip(plan.stages, (1, 2, 4, 8), strict=True):
        assert one.parameters == pytest.approx(billions * 1e9, rel=0.01)
    assert [one.tokens for one in plan.stages] == [20e9, 30e9, 60e9, 120e9]
    assert [f"{one.peak_lr:.1e}" for one in plan.stages] == ["8.0e-04", "5.7e-04", "4.0e-04", "2.8e-04"]
    assert all(one.world_size % 8 == 0 for one in plan.stages)
    assert f"{plan.saving('6NT'):.3f}" == f"{plan.saving('exact'):.3f}" == "0.247"


def test_a_plan_takes_under_a_second_and_no_torch() -> None:
    """In CPU time of a fresh interpreter, which does not depend on the load of the machine."""
    script = (
        "import sys, time\n"
        "sys.modules['torch'] = sys.modules['megatron'] = None\n"
        "from pathlib import Path\n"
        "from megagrow.config import load\n"
        "from megagrow.plan import family_plan\n"
        f"plan = family_plan(load(Path({str(EXAMPLE)!r})))\n"
        "print(plan.saving(), time.process_time())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    saving, seconds = map(float, done.stdout.split())
    assert saving == pytest.approx(1 - 64 / 85)
    assert seconds < 1.0
