"""The spellings in which Megatron-Core has written one and the same tensor, read as the canonical one.

A canonical tensor is stacked: `decoder.layers.X` of shape [layers, ...], experts as [layers, experts, ...], a gated
linear_fc1 whole, and the optimizer's states under `optimizer.state.{param,exp_avg,exp_avg_sq}.<key>` in the shape of
the weight. Versions and settings of Megatron-Core differ from that in a key a layer, a key an expert, a key a half,
other names, and states flattened over data-parallel ranks. All of these are the same values in other boxes, so each
spelling becomes chunks of the canonical tensor, and nothing else needs to know. What is not understood stays in the
index under its own key, for whoever checks the index against a shape to name.

Sources: Megatron-Core 0.14.0 to 0.19.2, `transformer/{mlp,transformer_block,moe/experts}.py`,
`optimizer/{optimizer,distrib_optimizer}.py`, `dist_checkpointing/strategies/resharding.py`.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megagrow.checkpoint.index import Chunk, DType, TensorInfo

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
class Spelling:
    """A key taken apart.

    Attributes:
        key: of the canonical tensor.
        layer, expert, half: the part of it that the key names (half 0: gate, 1: up); None: all of them.
    """

    key: str
    layer: int | None = None
    expert: int | None = None
    half: int | None = None


def spelling(key: str) -> Spelling:
    """Take a key apart; one that is canonical, or not known, names itself."""
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
    return Spelling(key, layer, expert, half)


def canonical_index(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the index of canonical tensors that an index of any spelling stands for.

    Parts of unequal shape or type, or with gaps in their numbers, are left as they are: no whole tensor is theirs.
    """
    parts: dict[str, dict[Spelling, str]] = defaultdict(dict)
    result: dict[str, TensorInfo] = {}
    for key in tensors:
        parts[spelling(key).key][spelling(key)] = key
    for canonical, keys in parts.items():
        infos = {part: tensors[key] for part, key in keys.items()}
        whole = _assembled(infos)
        if whole is not None:
            result[canonical] = whole
        else:
            result |= {key: infos[part] for part, key in keys.items()}
    return _norms_of_mixtures(_masters_of_fp32(_untransposed(result)))


def _assembled(parts: Mapping[Spelling, TensorInfo]) -> TensorInfo | None:
    """The whole tensor of parts; None if they are not each part of a whole once, and all alike."""
    numbers = [(part.layer, part.expert, part.half) for part in parts]
    info = next(iter(parts.values()))
    if any(other.shape != info.shape or other.dtype != info.dtype for other in parts.values()):
        return None
    counts = [0 if None in column else len(set(column)) for column in zip(*numbers, strict=True)]
    wanted = itertools.product(*([None] if not count else range(count) for count in counts))
    if set(numbers) != set(wanted) or counts[2] == 1:
        return None
    layers, experts, halves = counts
    before = 0 if layers else 1  # dimensions of a part in front of the one that experts and halves lie in
    if (experts or halves) and len(info.shape) <= before:
        return None
    chunks = [_placed(chunk, part, info.shape, before) for part, other in parts.items() for chunk in other.chunks]
    inner = list(info.shape)
    if halves:
        inner[before] *= 2
    shape = (*((layers,) if layers else ()), *inner[:before], *((experts,) if experts else ()), *inner[before:])
    return replace(info, shape=shape, chunks=tuple(chunks))


def _placed(chunk: Chunk, part: Spelling, shape: tuple[int, ...], before: int) -> Chunk:
    """A part's chunk as one of the whole tensor."""
    box = list(chunk.box)
    if part.half:
        start, stop = box[before]
        box[before] = (start + shape[before], stop + shape[before])
    layer = [] if part.layer is None else [(part.layer, part.layer + 1)]
    expert = [] if part.expert is None else [(part.expert, part.expert + 1)]
    strides = chunk.strides
    if strides is not None:  # those of dimensions of length 1 do not matter
        strides = (*[1] * len(layer), *strides[:before], *[1] * len(expert), *strides[before:])
    return replace(chunk, box=(*layer, *box[:before], *expert, *box[before:]), strides=strides)


def _untransposed(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Turn flattened states of experts round that lie as the old GroupedMLP held its weights: input before output.

    The weights themselves were always written the right way. Which way the states lie follows from the shapes of the
    two layers together, unless both are square: then they are left under a key that says so.
    """
    result = dict(tensors)
    weights = [key for name in ("fc1", "fc2") if (key := f"{_EXPERTS}linear_{name}.weight") in tensors]
    for state in {match[1] for key in tensors if (match := _STATE.match(key))}:
        pairs = [(f"optimizer.state.{state}.{key}", tensors[key].shape) for key in weights]
        if not all(key in tensors and _was_flattened(tensors[key]) for key, _ in pairs):
            continue
        telling = [(tensors[key].shape, shape) for key, shape in pairs if shape[-1] != shape[-2]]
        if telling and all(found == (*shape[:-2], shape[-1], shape[-2]) for found, shape in telling):
            result |= {key: _transposed(tensors[key]) for key, _ in pairs}
        for key, _ in pairs if not telling else ():
            result[f"{key} (square: transposed or not)"] = result.pop(key)
    return result


def _was_flattened(info: TensorInfo) -> bool:
    return all(chunk.strides is not None for chunk in info.chunks)


def _transposed(info: TensorInfo) -> TensorInfo:
    """A flattened tensor with its last two dimensions exchanged."""
    chunks = []
    for chunk in info.chunks:
        box, strides = chunk.box, chunk.strides or ()
        box, strides = (*box[:-2], box[-1], box[-2]), (*strides[:-2], strides[-1], strides[-2])
        chunks.append(replace(chunk, box=box, strides=strides))
    return replace(info, shape=(*info.shape[:-2], info.shape[-1], info.shape[-2]), chunks=tuple(chunks))


def _masters_of_fp32(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Without the distributed optimizer a weight in fp32 is its own master, and has no second copy."""
    result = dict(tensors)
    for key in tensors:
        match = _STATE.match(key)
        if match is None or match[1] != "exp_avg" or (weight := tensors.get(match[2])) is None:
            continue
        if weight.dtype == DType.FLOAT32:
            result.setdefault(f"optimizer.state.param.{match[2]}", weight)
    return result


def _norms_of_mixtures(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The norm before experts under the name of its own: without Transformer Engine it has a dense MLP's."""
    if not any(key.startswith(_EXPERTS) for key in tensors):
        return tensors
    return {_NORM.sub(r"\1pre_mlp_layernorm.\2", key): info for key, info in tensors.items()}
