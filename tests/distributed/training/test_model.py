"""The model room on real ranks: one model in every layout, against an independent one, and with every option."""

import math
from typing import Any

import pytest

from tests.distributed.ranks.launcher import run_ranks
from tests.distributed.ranks.steps import Case, run_cases, sample

SMALL = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 250, "seq_length": 32}
GPT = {
    "normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "swiglu": False,
    "add_bias_linear": True, "untie_embeddings_and_output_weights": False,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"ffn_hidden_size": 128, "num_query_groups": 2},
    "gpt": SMALL | {"ffn_hidden_size": 256} | GPT,
    "qk-tied": SMALL
    | {"ffn_hidden_size": 96, "kv_channels": 24, "qk_layernorm": True, "untie_embeddings_and_output_weights": False},
}
TENSOR, PIPELINE = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": TENSOR,
    "TP2 SP": TENSOR | {"sequence_parallel": True},
    "PP2": PIPELINE,
    "PP2 VPP2": PIPELINE | {"virtual_pipeline_model_parallel_size": 2},
    "PP2 first 3": PIPELINE | {"decoder_first_pipeline_num_layers": 3},
    "PP2 loss apart": PIPELINE
    | {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|t*2|t|L"},
    "DP2": {"data_parallel_size": 2},
}
RICH = ("TP2 SP", "PP2 VPP2")  # the layouts with the most to go wrong
DROPOUT: dict[str, Any] = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
RECOMPUTE = (None, "full", "selective")
NATS = math.log(256)


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """All results of one rank, from one start."""
    cases = [Case(name, shape) for name, shape in SHAPES.items()]
    cases += [Case(f"{kind} dropout", SHAPES["llama"] | DROPOUT, build={"recompute": kind}) for kind in RECOMPUTE]
    cases += [Case("bf16", SHAPES["llama"], build={"precision": "bf16"})]
    cases += [Case("bf16 gpt", SHAPES["gpt"], build={"precision": "bf16"})]
    cases += [Case("unfused wgrad", SHAPES["gpt"], build={"accumulate_in_place": False})]
    return run_ranks("tests.distributed.training.test_model:work", 1, (cases, [(name, {}) for name in SHAPES]))[0]


@pytest.fixture(scope="module")
def double() -> list[dict[str, Any]]:
    """All results of two ranks, from one start."""
    cases = [
        Case(f"{name} {layout}", shape, sizes) for name, shape in SHAPES.items() for layout, sizes in LAYOUTS.items()
    ]
    cases += [
        Case(f"{kind} dropout {layout}", SHAPES["llama"] | DROPOUT, LAYOUTS[layout], {"recompute": kind})
        for kind in RECOMPUTE
        for layout in RICH
    ]
    cases += [Case(f"bf16 {layout}", SHAPES["llama"], LAYOUTS[layout], {"precision": "bf16"}) for layout in RICH]
    models = [(name, layout) for name in SHAPES for layout in LAYOUTS.values()]
    return run_ranks("tests.distributed.training.test_model:work", 2, (cases, models))


def work(payload: tuple[list[Case], list[tuple[str, dict]]]) -> dict[str, Any]:
    """One rank's part: steps of every case, parameters of every model and, if alone, the single-rank checks."""
    from megagrow import runtime

    cases, models = payload
    out: dict[str, Any] = {"steps": run_cases(cases), "models": look_at(models)}
    if runtime.start().world_size == 1:
        out |= {"plain": against_plain(SHAPES), "refusals": refusals(), "gradients": gradients()}
    return out


@pytest.fixture(scope="module")
def alone(single: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    return single["steps"]


@pytest.fixture(scope="module")
def together(double: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    assert double[0]["steps"] == double[1]["steps"], "ranks disagree about losses or gradient norms"
    return double[0]["steps"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_layout_changes_nothing(name: str, layout: str, alone: dict, together: dict) -> None:
    for (loss, norm), (wanted_loss, wanted_norm) in zip(together[f"{name} {layout}"], alone[name], strict=True):
        assert loss == pytest.approx(wanted_loss, abs=2e-6)
        assert norm == pytest.approx(wanted_norm, rel=5e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_training_starts_near_uniform_and_moves(name: str, alone: dict) -> None:
    losses = [loss for loss, _ in alone[name]]
    assert losses[0] == pytest.approx(NATS, abs=0.2) and len(set(losses)) == len(losses)


def test_recomputation_changes_nothing_even_under_dropout(alone: dict, together: dict) -> None:
    for seen, where in ((alone, ""), *((together, f" {layout}") for layout in RICH)):
        plain, full, selective = (seen[f"{kind} dropout{where}"] for kind in RECOMPUTE)
        assert plain == full == selective, where
    assert alone["None dropout"][0] != alone["llama"][0], "dropout did nothing"


def test_weight_gradients_added_in_place_are_the_same(alone: dict) -> None:
    for pair in zip(alone["unfused wgrad"], alone["gpt"], strict=True):
        assert pair[0] == pytest.approx(pair[1], rel=1e-6)


@pytest.mark.parametrize("case", ["bf16", "bf16 gpt", *(f"bf16 {layout}" for layout in RICH)])
def test_bf16_stays_near_fp32(case: str, alone: dict, together: dict) -> None:
    wanted = alone["gpt" if case == "bf16 gpt" else "llama"]
    for (loss, norm), (wanted_loss, wanted_norm) in zip((alone | together)[case], wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, abs=5e-3) and norm == pytest.approx(wanted_norm, rel=2e-2)


def test_the_model_is_the_one_that_plain_pytorch_makes(single: dict) -> None:
    assert set(single["plain"]) == set(SHAPES)
    for name, values in single["plain"].items():
        assert values["logits"] < 1e-5 and values["loss"] < 1e-5 and values["gradients"] < 1e-5, (name, values)
        assert values["tensors"] > 8


def against_plain(shapes: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Largest difference of logits, of loss, and (relative, over tensors) of gradients on one batch."""
    import torch

    from megagrow.config import ModelShape, ParallelLayout
    from megagrow.model import build_model
    from tools.benchmark.plain_gpt import PlainGPT
    from tools.benchmark.weights import load_megatron, load_plain, local_pieces, random_state

    out = {}
    for name, values in shapes.items():
        shape = ModelShape(**values)
        state = random_state(shape)
        (ours,) = build_model(shape, ParallelLayout(), precision="fp32", accumulate_in_place=False)
        load_megatron([ours], state)
        plain = PlainGPT(shape)
        load_plain(plain, state)
        batch = sample(shape, 0)
        tokens, labels = batch[:, :-1], batch[:, 1:].contiguous()
        positions = torch.arange(shape.seq_length)[None].expand_as(tokens)
        logits = (ours(tokens, positions, None) - plain(tokens)).abs().max().item()
        loss, wanted = ours(tokens, positions, None, labels=labels).mean(), plain.loss(tokens, labels)
        loss.backward()
        wanted.backward()
        # Through the same door as the weights: what the plain model's gradients would be under Megatron's keys.
        slopes = {piece.key: torch.zeros(piece.global_shape) for piece in local_pieces(ours)}
        _pull(plain, slopes, shape)
        mine = dict(ours.named_parameters())
        for parameter in mine.values():
            parameter.data = parameter.grad
        worst = 0.0
        pieces = list(local_pieces(ours))
        for piece in pieces:
            whole = slopes[piece.key]
            for position in piece.global_offset[: piece.prepend_axis_num]:
                whole = whole[position]
            for dim, start in enumerate(piece.global_offset[piece.prepend_axis_num :]):
                whole = whole.narrow(dim, start, piece.data.shape[dim])
            worst = max(worst, ((piece.data - whole).abs().max() / slopes[piece.key].abs().max()).item())
        out[name] = {"logits": logits, "loss": abs(loss.item() - wanted.item()), "gradients": worst,
                     "tensors": len(slopes)}  # fmt: skip
    return out


def _pull(plain: Any, slopes: dict, shape: Any) -> None:
    """Fill `slopes` with the plain model's gradients: load_plain is linear, so its transpose is a gradient."""
    import torch

    from tools.benchmark.plain_gpt import PlainGPT
    from tools.benchmark.weights import load_plain

    # Number every entry, send the numbers through load_plain, and read where each came out.
    numbered, count = {}, 0
    for key, values in slopes.items():
        numbered[key] = torch.arange(count, count + values.numel(), dtype=torch.float64).view(values.shape)
        count += values.numel()
    carrier = PlainGPT(shape).double()
    load_plain(carrier, numbered)
    flat = torch.zeros(count)
    for place, parameter in zip(carrier.parameters(), plain.parameters(), strict=True):
        flat[place.detach().round().long().flatten()] = parameter.grad.flatten()
    for key, values in slopes.items():
        first = int(numbered[key].flatten()[0])
        values.copy_(flat[first : first + values.numel()].view(values.shape))


def test_keys_shapes_and_filling(single: dict, double: list[dict]) -> None:
    one: list[tuple[str, dict]] = [(name, {}) for name in SHAPES]
    two = [(name, layout) for name in SHAPES for layout in LAYOUTS.values()]
    for some, ranks in ((one, [single]), (two, double)):
        assert len(some) == len(ranks[0]["models"])
        for index, (name, layout) in enumerate(some):
            looks = [rank["models"][index] for rank in ranks]
            keys = {key: size for look in looks for key, size in look["keys"].items()}
            assert keys == looks[0]["wanted"], (name, layout)
            for look in looks:
                assert look["all_nan_before"] and look["none_nan_after"], (name, layout)
                assert look["chunks"] == layout.get("virtual_pipeline_model_parallel_size", 1)


def look_at(models: list[tuple[str, dict]]) -> list[dict[str, object]]:
    """What a chunk's parameters are called and hold, before and after they are filled."""
    from megagrow import runtime
    from megagrow.config import ModelShape, ParallelLayout
    from megagrow.model import build_model
    from tools.benchmark.weights import global_shapes, load_megatron, local_pieces, random_state

    out = []
    for name, sizes in models:
        shape, layout = ModelShape(**SHAPES[name]), ParallelLayout(**sizes)
        runtime.start(**layout.groups)
        chunks = build_model(shape, layout)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        before = all(bool(parameter.isnan().all()) for parameter in parameters)
        load_megatron(chunks, random_state(shape))
        out.append({
            "keys": {piece.key: tuple(piece.global_shape) for chunk in chunks for piece in local_pieces(chunk)},
            "wanted": global_shapes(shape),
            "all_nan_before": before,
            "none_nan_after": not any(bool(parameter.isnan().any()) for parameter in parameters),
            "chunks": len(chunks),
        })  # fmt: skip
        runtime.reset()
    return out


def test_what_cannot_be_built_says_why(single: dict) -> None:
    messages = single["refusals"]
    assert "context_parallel_size 2 needs transformer-engine" in messages["context"]
    assert all(messages[name].startswith(f"{name} must be None") for name in ("attention_mask", "packed_seq_params"))


def refusals() -> dict[str, str]:
    import torch

    from megagrow.config import ModelShape, ParallelLayout
    from megagrow.errors import ConfigError
    from megagrow.model import build_model

    shape = ModelShape(**SHAPES["llama"])
    out = {}
    with pytest.raises(ConfigError) as error:
        build_model(shape, ParallelLayout(context_parallel_size=2))
    out["context"] = str(error.value)
    attention = build_model(shape, ParallelLayout())[0].decoder.layers[0].self_attention.core_attention
    q = k = v = torch.zeros(4, 1, 2, 16)
    for name, arguments in (("attention_mask", (q,)), ("packed_seq_params", (None, None, None, q))):
        with pytest.raises(ValueError) as refused:
            attention(q, k, v, *arguments)
        out[name] = str(refused.value)
    return out


def test_hand_written_gradients(single: dict) -> None:
    assert single["gradients"] == {"rotary": True, "swiglu": True, "rms_norm": True, "rms_norm_value": True}


def gradients() -> dict[str, bool]:
    import torch
    from torch.autograd import gradcheck

    from megagrow.model.activation import _SwiGlu
    from megagrow.model.attention import Rotary
    from megagrow.model.norm import _RmsNorm

    torch.manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.float64, requires_grad=True)

    x, weight = draw(3, 2, 8), draw(8)
    value = _RmsNorm.apply(x, weight, 1e-5)
    wanted = torch.nn.functional.rms_norm(x, (8,), weight, 1e-5)
    return {
        "rotary": gradcheck(Rotary(6, 10000), (draw(5, 2, 3, 6),)),
        "swiglu": gradcheck(_SwiGlu.apply, (draw(3, 2, 8),)),
        "rms_norm": gradcheck(lambda x, w: _RmsNorm.apply(x, w, 1e-5), (x, weight)),
        "rms_norm_value": bool(torch.allclose(value, wanted, rtol=1e-12, atol=1e-14)),
    }
