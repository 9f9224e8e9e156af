"""`megagrow verify --deep`: runs parent and child on the same tokens and compares their results.

Only one model is in memory at a time. The parent computes logits and gradients; the child does the same, then takes
some Adam steps with its own moments, to show whether new entries get gradients and copies diverge. Everything goes
into one `DeepRecord`, with a verdict that depends on whether the child's lineage claims an exact growth.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from megagrow.checkpoint.index import DType
from megagrow.checkpoint.tensors import new_entries, recorded_step, tensor_kinds
from megagrow.config import ModelShape
from megagrow.errors import DataError, UserError
from megagrow.evaluate.copies import copy_similarity, resume_adam
from megagrow.evaluate.descent import ComparedCheckpoint, growth_between, open_compared
from megagrow.evaluate.duality import prediction_errors, rule_applies, rule_limits
from megagrow.evaluate.live import ForwardPrecision, ForwardResult, LiveModel, TokenBatch, master_key
from megagrow.plan.parameters import count_parameters
from megagrow.records import CopiesRow, DeepRecord, GradientRow, ResidualRow
from megagrow.runtime import process

Rounding = Literal["fp64", "fp32", "bf16"]
TOLERANCES: dict[Rounding, float] = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 5e-2}
"""Largest relative difference of logits that rounding of weights or arithmetic can explain."""
STEPS = 20
_STORED: dict[DType, Rounding] = {DType.FLOAT64: "fp64", DType.FLOAT32: "fp32"}
_SAMPLES, _LENGTH, _BATCHES, _SHORTEST = 4, 256, 4, 8
RANDOM = "random tokens"
_FORWARD_ONLY = "only forward passes were run: memory does not suffice for gradients and training steps"


@dataclass(frozen=True)
class ChildRun:
    """Results of the child's first pass and training steps.

    Attributes:
        first: first forward pass.
        gradients: gradients of the first pass.
        new: number of new entries that the tokens can reach.
        live: share of those with a gradient in the first pass, and in the first two.
        copies: similarity of copies and sources.
        rounded: whether the checkpoint's weights are its masters, rounded.
    """

    first: ForwardResult
    gradients: dict[str, Tensor]
    new: int
    live: tuple[float | None, float | None]
    copies: tuple[CopiesRow, ...]
    rounded: bool


def verify_deep(
    parent: Path,
    child: Path,
    batches: Sequence[TokenBatch] | None = None,
    precision: ForwardPrecision | None = None,
    tokens_from: str = RANDOM,
) -> DeepRecord:
    """Run both checkpoints in this process and return the comparison.

    Where memory does not suffice for gradients and training steps, only the forward passes are compared.

    Args:
        parent: the checkpoint that was grown (or resharded), of any format.
        child: the result, before any training, of any format.
        batches: tokens of the parent's vocabulary; None draws them from a fixed seed.
        precision: precision of the models; None selects float64 on CPU, float32 on CUDA.
        tokens_from: where the batches come from, in words.

    Raises:
        CheckpointError: the child does not descend from the parent, or has been trained since.
        MemoryShort: even a forward pass needs more memory than is free.
    """
    one = open_compared(parent)
    other = open_compared(child, one.manifest)
    content = growth_between(one, other)
    batches = batches or random_batches(one.shape)
    precision = precision or ("fp32" if torch.cuda.is_available() else "fp64")
    forward_only = check_memory(one.shape, other.shape, batches[0].tokens.numel(), precision)
    process.start(seed=0)
    try:
        return compare_outputs(one, other, content, batches, precision, tokens_from, forward_only=forward_only)
    finally:
        process.stop()


class MemoryShort(UserError):
    """A comparison needs more memory than is free."""


def check_memory(parent: ModelShape, child: ModelShape, tokens: int, precision: ForwardPrecision) -> bool:
    """Return whether memory suffices for the forward passes only.

    Values, each of the precision's width: the child's weights, gradients, two moments and copies of the weights and
    of two gradients, the parent's gradients; logits and their gradient of one batch. Models are built in float32
    first. Activations of a batch are small beside these.

    Raises:
        MemoryShort: it does not suffice for these either.
    """
    width = 8 if precision == "fp64" else 4
    small, large = count_parameters(parent).total, count_parameters(child).total
    logits = 4 * tokens * max(parent.padded_vocab_size, child.padded_vocab_size) * width
    free = psutil.virtual_memory().available
    if width * (7 * large + small) + logits <= free:
        return False
    if (forward := (width + 4) * max(small, large) + logits) <= free:
        return True
    raise MemoryShort(f"not run: needs about {forward / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free")


def compare_outputs(
    parent: ComparedCheckpoint,
    child: ComparedCheckpoint,
    content: dict[str, Any] | None,
    batches: Sequence[TokenBatch],
    precision: ForwardPrecision,
    tokens_from: str = RANDOM,
    *,
    forward_only: bool = False,
) -> DeepRecord:
    """Compare two open checkpoints; `content` is the child's growth record, None where it is only resharded."""
    started = time.time()
    reference, parent_gradients = _run_parent(parent, batches[0], precision, forward_only=forward_only)
    trained = _train_child(child, content, batches, precision, forward_only=forward_only)
    stored = _STORED.get(child.source.tensors[master_key(child.source, tensor_kinds(child.shape)[0].key)].dtype, "bf16")
    routers: Rounding = "fp32" if child.shape.num_moe_experts else "fp64"  # their softmax is always in fp32
    rounding = max(stored, precision, routers, key=TOLERANCES.__getitem__)
    common = min(parent.shape.vocab_size, child.shape.vocab_size)
    parent_logits, child_logits = reference.logits[..., :common], trained.first.logits[..., :common]
    difference = float((child_logits - parent_logits).abs().max())
    relative = difference / float(parent_logits.abs().max())
    promised = content is None or bool(content["exact"])
    verdict, words = logit_verdict(relative, rounding, promised=promised, rounded=trained.rounded)
    step = recorded_step(content, child.shape) if content else None
    compared = step is not None and not forward_only and rule_applies(step)
    rows = prediction_errors(step, parent_gradients, trained.gradients) if step is not None and compared else {}
    limits = rule_limits(step) if step else ()
    return DeepRecord(
        time=time.time(),
        parent=str(parent.path),
        child=str(child.path),
        operators=content["operators"] if content else {},
        promised=promised,
        verdict=verdict,
        words=words,
        precision=precision,
        weights=stored,
        tolerance=TOLERANCES[rounding],
        tokens=batches[0].tokens.numel(),
        logit_difference=difference,
        logit_difference_relative=relative,
        parent_loss=float(reference.loss),
        child_loss=float(trained.first.loss),
        residual=_residual(reference, trained.first, content),
        new_entries=trained.new,
        live_after_one=trained.live[0],
        live_after_two=trained.live[1],
        steps=0 if forward_only else STEPS,
        copies=trained.copies,
        gradients=tuple(GradientRow(tensor=key, entries=n, error=error) for key, (error, n) in rows.items() if n),
        gradient_limits=(_FORWARD_ONLY,) if forward_only else limits,
        tokens_from=tokens_from,
        seconds=time.time() - started,
    )


def logit_verdict(
    relative: float, rounding: Rounding, *, promised: bool, rounded: bool
) -> tuple[Literal["exact", "within", "not preserving", "broken"], str]:
    """Return the verdict on the logits of parent and child, and its text.

    Args:
        relative: largest difference of the logits, relative to the parent's largest.
        rounding: the coarsest rounding of weights and arithmetic.
        promised: whether the child's lineage claims that it computes the parent's function.
        rounded: whether the child's weights are its masters, rounded.
    """
    if not rounded:
        return "broken", "broken: the child's weights are not its fp32 masters, rounded"
    if relative <= TOLERANCES["fp64"]:
        return "exact", "exact"
    if relative <= TOLERANCES[rounding]:
        if rounding == "bf16":
            return "within", f"within {relative:.1e}, as bf16 rounds"
        return "exact", f"exact: within {relative:.1e}, as {rounding} rounds"
    if promised:
        return "broken", f"broken: within {relative:.1e} only, and its lineage promises the parent's function"
    return "not preserving", f"not preserving, as this operator is: within {relative:.1e}"


def random_batches(shape: ModelShape, seed: int = 0) -> tuple[TokenBatch, ...]:
    """Return batches of uniformly drawn tokens."""
    generator = torch.Generator().manual_seed(seed)
    length = min(shape.seq_length, _LENGTH)
    drawn = torch.randint(0, shape.vocab_size, (_BATCHES, _SAMPLES, length + 1), generator=generator)
    return tuple(TokenBatch(tokens[:, :-1], tokens[:, 1:]) for tokens in drawn)


def batches_of_ids(ids: Tensor) -> tuple[TokenBatch, ...]:
    """Return batches of consecutive ids [n], cut to the length needed here; DataError if there are too few."""
    length = min(_LENGTH, (len(ids) - 1) // _SAMPLES)
    if length < _SHORTEST:
        raise DataError(f"{len(ids)} tokens are too few to compare models on: {_SAMPLES * _SHORTEST + 1} are needed")
    count = min(_BATCHES, (len(ids) - 1) // (_SAMPLES * length))
    cut = ids[: count * _SAMPLES * length + 1].long()
    tokens, labels = (part.reshape(count, _SAMPLES, length) for part in (cut[:-1], cut[1:]))
    return tuple(TokenBatch(*pair) for pair in zip(tokens, labels, strict=True))


def batches_of(samples: Sequence[dict[str, Tensor]]) -> tuple[TokenBatch, ...]:
    """Return batches of a family's samples, cut to the length needed here; fewer if there are fewer samples."""
    used = [samples[index] for index in range(min(len(samples), _BATCHES * _SAMPLES))]
    groups = [used[start : start + _SAMPLES] for start in range(0, len(used), _SAMPLES)]
    tokens, labels = (
        [torch.stack([s[key][:_LENGTH] for s in group]) for group in groups] for key in ("tokens", "labels")
    )
    return tuple(TokenBatch(*pair) for pair in zip(tokens, labels, strict=True))


def _run_parent(
    parent: ComparedCheckpoint, batch: TokenBatch, precision: ForwardPrecision, *, forward_only: bool
) -> tuple[ForwardResult, dict[str, Tensor]]:
    """Return the parent's forward pass and gradients; its model is freed on return."""
    model = LiveModel(parent.shape, parent.source, precision)
    if forward_only:
        return _forward(model, batch), {}
    result = model.gradients(batch)
    return _detached(result), model.stacked(_gradient)


def _train_child(
    child: ComparedCheckpoint,
    content: dict[str, Any] | None,
    batches: Sequence[TokenBatch],
    precision: ForwardPrecision,
    *,
    forward_only: bool,
) -> ChildRun:
    """Run the child's first pass and its training steps."""
    model = LiveModel(child.shape, child.source, precision)
    rounded = model.rounded_masters()
    if forward_only:
        return ChildRun(_forward(model, batches[0]), {}, 0, (None, None), (), rounded)
    first = _detached(model.gradients(batches[0]))
    gradients = model.stacked(_gradient)
    if content is None:
        return ChildRun(first, gradients, 0, (None, None), (), rounded)
    before = model.stacked(Tensor.detach)
    optimizer = resume_adam(model, child.schedule, child.learning_rate, child.steps)
    optimizer.step()
    second = batches[1 % len(batches)]
    model.gradients(second)
    second_gradients = model.stacked(_gradient)
    new, live = _live_shares(child.shape, content, (gradients, second_gradients), (batches[0], second))
    optimizer.step()
    for index in range(2, STEPS):
        model.gradients(batches[index % len(batches)])
        optimizer.step()
    copies = copy_similarity(content, child.shape, before, model.stacked(Tensor.detach))
    return ChildRun(first, gradients, new, live, copies, rounded)


def _forward(model: LiveModel, batch: TokenBatch) -> ForwardResult:
    with torch.no_grad():
        return _detached(model.forward(batch))


def _live_shares(
    shape: ModelShape, content: dict[str, Any], passes: Sequence[dict[str, Tensor]], batches: Sequence[TokenBatch]
) -> tuple[int, tuple[float | None, float | None]]:
    """Count new entries that the tokens can reach; return it with their share that had a gradient by each pass."""
    rows, count, alive = _reachable(shape, batches), 0, [0, 0]
    for kind in tensor_kinds(shape):
        for layer in range(shape.num_layers) if kind.per_layer else (None,):
            new = torch.from_numpy(new_entries(content, kind, shape, layer))
            flags = [gradient[kind.key] if layer is None else gradient[kind.key][layer] for gradient in passes]
            if kind.key in rows:
                new, flags = new[rows[kind.key]], [flag[rows[kind.key]] for flag in flags]
            count += int(new.sum())
            alive[0] += int((flags[0][new] != 0).sum())
            alive[1] += int(((flags[0] != 0) | (flags[1] != 0))[new].sum())
    return count, (alive[0] / count if count else None, alive[1] / count if count else None)


def _reachable(shape: ModelShape, batches: Sequence[TokenBatch]) -> dict[str, Tensor]:
    """Return the rows that can get a gradient from the tokens, for tensors where not all rows can."""
    rows = {"embedding.position_embeddings.weight": torch.arange(batches[0].tokens.shape[1])}
    if not shape.tied:  # otherwise the output layer reads every row
        rows["embedding.word_embeddings.weight"] = _distinct_tokens(batches)
    if shape.position_embedding_type == "learned_absolute":  # softmax is invariant to what all keys have in common
        slots = shape.heads_per_group + 2
        slot = torch.arange(shape.groups * slots * shape.head_dim) // shape.head_dim % slots
        attention = "decoder.layers.self_attention."
        if shape.qk_layernorm:
            rows[attention + "k_layernorm.bias"] = torch.arange(0)
        else:
            rows[attention + "linear_qkv.bias"] = torch.nonzero(slot != shape.heads_per_group).flatten()
    return rows


def _distinct_tokens(batches: Sequence[TokenBatch]) -> Tensor:
    tokens = torch.cat([batch.tokens.flatten() for batch in batches])
    distinct: Tensor = tokens.unique()  # type: ignore[no-untyped-call]  # untyped in torch
    return distinct


def _residual(parent: ForwardResult, child: ForwardResult, content: dict[str, Any] | None) -> tuple[ResidualRow, ...]:
    """Pair the residual streams of parent and child by layer."""
    layers = range(len(child.residual) - 1)
    sources: list[int | None] = list(layers)
    if content:
        described = content["layers"]
        sources = [None if new else source for source, new in zip(described["source"], described["new"], strict=True)]
    positions = [0, *(None if source is None else source + 1 for source in sources)]
    return tuple(
        ResidualRow(
            layer=layer,
            parent_layer=position,
            child=child.residual[layer],
            parent=None if position is None else parent.residual[position],
        )
        for layer, position in enumerate(positions)
    )


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _detached(result: ForwardResult) -> ForwardResult:
    return ForwardResult(result.logits.detach().cpu(), result.loss.detach().cpu(), result.residual)
