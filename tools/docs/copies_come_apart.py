"""Do copies come apart? The curves of docs/operators.md: distance of copies from their sources over Adam steps.

A tiny Llama (the plain float64 reference, so that nothing but the algebra is at work) is trained, doubled in every
width by `balanced`, and trained on with the moments that a policy leaves it. Copies with equal shares and equal
moments get equal updates forever: their distance stays zero, to rounding. Rounding may part them a little, since two
columns of one matrix product need not have the same bits: by 0 to 1e-16 in 50 steps, depending on the processor. Each
of three cures breaks the symmetry. Noise sets copies apart at once, without any training, so what is shown is the
distance that training put between them.

    PYTHONPATH=. .venv/bin/python tools/docs/copies_come_apart.py docs/figures/copies_come_apart.svg
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megagrow.checkpoint.index import DType
from megagrow.checkpoint.tensors import optimizer_key, tensor_kinds
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.convert.plan import plan_conversion
from megagrow.growth.maps import DimMap, GrowthStep
from megagrow.growth.operators import plan_growth
from tools.reference.execute import execute
from tools.reference.memory import MemoryStore
from tools.reference.plain import Weights, loss

BALANCED = {"hidden": "balanced", "ffn": "balanced", "head": "balanced"}
CASES: dict[str, GrowthConfig] = {
    "even shares, exact moments": GrowthConfig(**BALANCED, moments="exact"),
    "even shares, copied moments": GrowthConfig(**BALANCED, moments="copy"),
    "asymmetric moments": GrowthConfig(**BALANCED, moments="asymmetric"),
    "uneven shares (share_of_new 0.2), exact moments": GrowthConfig(**BALANCED, moments="exact", share_of_new=0.2),
    "noise 0.01, exact moments": GrowthConfig(**BALANCED, moments="exact", noise=0.01),
}
STEPS, PARENT_STEPS = 50, 100
ROUNDING = 1e-12
"""Distances below this are rounding: measured are at most 1e-16 after 50 steps, and 2e-5 after one step of the weakest
cure."""
_RATE, _BETAS, _EPSILON = 1e-3, (0.9, 0.95), 1e-8
_SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2}
_REST = {"kv_channels": 8, "vocab_size": 64, "make_vocab_size_divisible_by": 64, "seq_length": 32}
_WIDTHS = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")


def curves(steps: int = STEPS, parent_steps: int = PARENT_STEPS) -> dict[str, list[float]]:
    """By case: the distance that 0, 1, ... `steps` steps put between copies, mean over all, relative to their norm."""
    small = ModelShape(**_SIZES, **_REST)
    large = ModelShape(**{name: size * (1 + (name in _WIDTHS)) for name, size in _SIZES.items()}, **_REST)
    parent = _fresh(small)
    for step in range(parent_steps):
        _adam(parent, small, step)
    found = {}
    for name, growth in CASES.items():
        plan = plan_growth(small, large, growth, seed=1)
        child = MemoryStore()
        source = MemoryStore(parent)
        execute(plan_conversion(source.tensors, plan, ParallelLayout(), DType.FLOAT64), source, child)
        state, start, found[name] = dict(child.values), dict(child.values), [0.0]
        for step in range(parent_steps, parent_steps + steps):
            _adam(state, large, step)
            found[name].append(distance(start, state, plan))
    return found


def distance(start: Weights, state: Weights, step: GrowthStep) -> float:
    """Mean relative distance that copies have gone from their sources: each tensor's slices, freed of their scales."""
    found = []
    for kind in tensor_kinds(step.large):
        dims = [dim.grow(step) for dim in kind.dims]
        before, after = (values[kind.key] if kind.per_layer else values[kind.key][None] for values in (start, state))
        for axis, dim in enumerate(dims, start=1):
            scale = torch.from_numpy(dim.scale).view([-1 if a == axis else 1 for a in range(after.dim())])
            copies, sources = _pairs(dim)
            apart = [
                (v / scale).index_select(axis, copies) - (v / scale).index_select(axis, sources)
                for v in (before, after)
            ]
            size = (after / scale).index_select(axis, sources)
            rest = tuple(a for a in range(1, after.dim()) if a != axis)
            gone, norm = ((v**2).sum(rest).sqrt() if rest else v.abs() for v in (apart[1] - apart[0], size))
            found.append((gone / norm).flatten())
    return float(torch.cat(found).mean())


def _pairs(dim: DimMap) -> tuple[Tensor, Tensor]:
    """Copies, and the old entries that they share a source with."""
    old = {int(dim.source[j]): j for j in np.flatnonzero(~dim.new)}
    copies = np.flatnonzero(dim.new)
    return torch.from_numpy(copies), torch.tensor([old[int(dim.source[j])] for j in copies], dtype=torch.int64)


def _fresh(shape: ModelShape) -> Weights:
    """Weights and zero moments, in the form of a checkpoint."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for kind in tensor_kinds(shape):
        drawn = torch.randn(kind.global_shape(shape), generator=generator, dtype=torch.float64)
        state[kind.key] = torch.ones_like(drawn) if kind.constant else 0.1 * drawn
    for key in list(state):
        state[optimizer_key("param", key)] = state[key]
        for moment in ("exp_avg", "exp_avg_sq"):
            state[optimizer_key(moment, key)] = torch.zeros_like(state[key])
    return state


def _adam(state: Weights, shape: ModelShape, step: int) -> None:
    """One step of Adam (without decay) on a batch that follows from its number."""
    keys = [kind.key for kind in tensor_kinds(shape)]
    leaves = {key: state[key].clone().requires_grad_() for key in keys}
    loss(leaves, shape, _batch(shape, step)).backward()
    for key in keys:
        gradient, (beta1, beta2) = leaves[key].grad, _BETAS
        assert gradient is not None
        mean, square = (optimizer_key(moment, key) for moment in ("exp_avg", "exp_avg_sq"))
        state[mean] = beta1 * state[mean] + (1 - beta1) * gradient
        state[square] = beta2 * state[square] + (1 - beta2) * gradient**2
        direction = state[mean] / (1 - beta1 ** (step + 1))
        direction = direction / ((state[square] / (1 - beta2 ** (step + 1))).sqrt() + _EPSILON)
        state[key] = state[optimizer_key("param", key)] = state[key] - _RATE * direction


def _batch(shape: ModelShape, step: int) -> Tensor:
    """Tokens [4, s] with something to learn: each is often the last one times 5 plus 3."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, shape.vocab_size, (4, shape.seq_length), generator=generator)
    follows = torch.rand(tokens.shape, generator=generator) < 0.7
    for place in range(1, shape.seq_length):
        wanted = (tokens[:, place - 1] * 5 + 3) % shape.vocab_size
        tokens[:, place] = torch.where(follows[:, place], wanted, tokens[:, place])
    return tokens


def draw(found: dict[str, list[float]], path: Path) -> None:
    """Draw the curves; those that stay at zero, to rounding, are one line at the bottom."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "copies_come_apart"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.0, 3.6), layout="constrained")
    for name, values in found.items():
        zero = max(values) < ROUNDING
        label = f"{name}: zero to rounding" if zero else name
        axes.plot(values, label=label, linestyle="--" if zero else "-", linewidth=1.6)
    axes.set_xlabel("steps of Adam after the growth")
    axes.set_ylabel("distance that copies have gone apart")
    axes.set_xlim(0, len(next(iter(found.values()))) - 1)
    axes.set_yscale("symlog", linthresh=1e-5)  # with room for zero at the bottom
    axes.set_ylim(-1e-6, 0.2)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.3))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/docs/copies_come_apart.py PATH.svg")
    measured = curves()
    for case, values in measured.items():
        print(f"{case:50} " + "  ".join(f"{values[step]:.3g}" for step in (0, 1, 5, 10, 20, STEPS)))
    draw(measured, Path(sys.argv[1]))
