"""Translate every way in which Megatron-Core has spelled the key of a tensor into one canonical index.

A canonical tensor is stacked: `decoder.layers.X` has shape [layers, ...], experts have [layers, experts, ...], a gated
linear_fc1 is one tensor, and the optimizer's states are `optimizer.state.{param,exp_avg,exp_avg_sq}.<key>` in the
shape of the weight. Depending on version and settings, Megatron-Core writes one key per layer, per expert or per half
of linear_fc1, uses other names, or flattens states over data-parallel ranks. All of these are the same values in other
boxes, so each becomes chunks of the canonical tensor, and no other module has to know the spelling. A key that is not
understood stays in the index as it is, and is named when the index is checked against a shape.

Sources: Megatron-Core 0.14.0 to 0.19.2, `transformer/{mlp,transformer_block,moe/experts}.py`,
`optimizer/{optimizer,distrib_optimizer}.py`, `dist_checkpointing/strategies/resharding.py`.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megagrow.checkpoint.index import Chunk, DType, TensorInfo, common_dtype

_CHAINED = re.compile(r"^chained_\d+\.(?=optimizer\.state\.)")
_MASTERS = re.compile(r"^optimizer\.state\.fp32_param\.")
_LAYER = re.compile(r"^(.*\bdecoder\.layers\.)(\d+)\.(.+)$")
_EXPERT = re.compile(r"^(.*\bdecoder\.layers\.mlp\.experts\.experts\.)(\d+)\.(.+)$")
_LOCAL_EXPERT = re.compile(r"^(.*\bdecoder\.layers\.mlp\.experts\.)(linear_fc[12]\.(?:weight|bias))(\d+)$")
_HALF = re.compile(r"^(.*\bdecoder\.layers\..*linear_fc1\.(?:weight|bias))_([wv])$")
_NORM = re.compile(r"^(.*\bdecoder\.layers\.)mlp\.linear_fc1\.layer_norm_(weight|bias)$")
_STATE = re.compile(r"^optimizer\.state\.([^.]+)\.(.+)$")
_EXPERTS = "decoder.layers.mlp.experts.experts."


@dataclass(frozen=True)
class ParsedKey:
    """A stored key, split into the canonical key and the part of that tensor which it names.

    Attributes:
        key: of the canonical tensor.
        layer, expert, half: the part (half 0: gate, 1: up); None: all of them.
    """

    key: str
    layer: int | None = None
    expert: int | None = None
    half: int | None = None


def parse_key(key: str) -> ParsedKey:
    """Split a stored key; a canonical or unknown key is its own canonical key."""
    key = _MASTERS.sub("optimizer.state.param.", _CHAINED.sub("", key))
    layer = expert = half = None
    if match := _LAYER.match(key):
        key, layer = match[1] + match[3], int(match[2])
    if match := _EXPERT.match(key):
        key, expert = match[1] + match[3], int(match[2])
    elif match := _LOCAL_EXPERT.match(key):
        key, expert = f"{match[1]}experts.{match[2]}", int(match[3])
    if match := _HALF.match(key):
        key, half = match[1], "wv".index(match[2])
    return ParsedKey(key, layer, expert, half)


def canonical_index(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the index of canonical tensors for an index with any spelling of its keys.

    Parts that differ in shape, or whose numbers have gaps, do not make up a tensor and keep their keys. Parts of
    several floating-point types make up a tensor of the widest.
    """
    keys_of: dict[str, dict[ParsedKey, str]] = defaultdict(dict)
    result: dict[str, TensorInfo] = {}
    for key in tensors:
        part = parse_key(key)
        keys_of[part.key][part] = key
    for canonical, keys in keys_of.items():
        parts = {part: tensors[key] for part, key in keys.items()}
        assembled = _assembled(parts)
        if assembled is not None:
            result[canonical] = assembled
        else:
            result |= {key: parts[part] for part, key in keys.items()}
    return _with_expert_norms(_with_fp32_masters(_untransposed(result)))


def _assembled(parts: Mapping[ParsedKey, TensorInfo]) -> TensorInfo | None:
    """Return the tensor that parts make up; None unless every part occurs exactly once, in the same shape."""
    numbers = [(part.layer, part.expert, part.half) for part in parts]
    info = next(iter(parts.values()))
    dtype = common_dtype({other.dtype for other in parts.values()})
    if dtype is None or any(other.shape != info.shape for other in parts.values()):
        return None
    counts = [0 if None in column else len(set(column)) for column in zip(*numbers, strict=True)]
    wanted = itertools.product(*([None] if not count else range(count) for count in counts))
    if set(numbers) != set(wanted) or counts[2] == 1:
        return None
    layers, experts, halves = counts
    before = 0 if layers else 1  # dimensions of a part that precede the one for experts and halves
    if (experts or halves) and len(info.shape) <= before:
        return None
    chunks = [
        _chunk_of_whole(
            chunk if other.dtype is dtype else replace(chunk, dtype=chunk.dtype or other.dtype),
            part,
            info.shape,
            before,
        )
        for part, other in parts.items()
        for chunk in other.chunks
    ]
    inner = list(info.shape)
    if halves:
        inner[before] *= 2
    shape = (*((layers,) if layers else ()), *inner[:before], *((experts,) if experts else ()), *inner[before:])
    return TensorInfo(shape, dtype, tuple(chunks))


def _chunk_of_whole(chunk: Chunk, part: ParsedKey, shape: tuple[int, ...], before: int) -> Chunk:
    """Return a part's chunk as a chunk of the whole tensor."""
    box = list(chunk.box)
    if part.half:
        start, stop = box[before]
        box[before] = (start + shape[before], stop + shape[before])
    layer = [] if part.layer is None else [(part.layer, part.layer + 1)]
    expert = [] if part.expert is None else [(part.expert, part.expert + 1)]
    strides = chunk.strides
    if strides is not None:  # the stride of a dimension of length 1 has no effect
        strides = (*[1] * len(layer), *strides[:before], *[1] * len(expert), *strides[before:])
    return replace(chunk, box=(*layer, *box[:before], *expert, *box[before:]), strides=strides)


def _untransposed(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Transpose flattened states of experts that are stored as the old GroupedMLP kept its weights: input first.

    The weights themselves were always written output first. The order of the states follows from the shapes of the
    two layers together, unless both are square: then the order is unknown and the states get a key that marks them.
    """
    result = dict(tensors)
    weights = [key for name in ("fc1", "fc2") if (key := f"{_EXPERTS}linear_{name}.weight") in tensors]
    for state in {match[1] for key in tensors if (match := _STATE.match(key))}:
        pairs = [(f"optimizer.state.{state}.{key}", tensors[key].shape) for key in weights]
        if not all(key in tensors and _was_flattened(tensors[key]) for key, _ in pairs):
            continue
        not_square = [(tensors[key].shape, shape) for key, shape in pairs if shape[-1] != shape[-2]]
        if not_square and all(found == (*shape[:-2], shape[-1], shape[-2]) for found, shape in not_square):
            result |= {key: _transposed(tensors[key]) for key, _ in pairs}
        for key, _ in () if not_square else pairs:
            result[f"{key} (square: transposed or not)"] = result.pop(key)
    return result


def _was_flattened(info: TensorInfo) -> bool:
    return all(chunk.strides is not None for chunk in info.chunks)


def _transposed(info: TensorInfo) -> TensorInfo:
    """Return a flattened tensor with its last two dimensions exchanged."""
    chunks = []
    for chunk in info.chunks:
        box, strides = chunk.box, chunk.strides or ()
        box, strides = (*box[:-2], box[-1], box[-2]), (*strides[:-2], strides[-1], strides[-2])
        chunks.append(replace(chunk, box=box, strides=strides))
    return replace(info, shape=(*info.shape[:-2], info.shape[-1], info.shape[-2]), chunks=tuple(chunks))


def _with_fp32_masters(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Add fp32 weights as their own masters: without the distributed optimizer no second copy of them is stored."""
    result = dict(tensors)
    for key in tensors:
        match = _STATE.match(key)
        if match is None or match[1] != "exp_avg" or (weight := tensors.get(match[2])) is None:
            continue
        if weight.dtype == DType.FLOAT32:
            result.setdefault(f"optimizer.state.param.{match[2]}", weight)
    return result


def _with_expert_norms(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Give the norm before experts its own key: without Transformer Engine it is named like that of a dense MLP."""
    if not any(key.startswith(_EXPERTS) for key in tensors):
        return tensors
    return {_NORM.sub(r"\1pre_mlp_layernorm.\2", key): info for key, info in tensors.items()}
