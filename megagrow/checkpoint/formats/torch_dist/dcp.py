"""Read plain torch.distributed.checkpoint (DCP) directories by slice: Megatron-Core models saved by other trainers.

    .metadata        index, as in Megatron's torch_dist
    __0_0.distcp     chunks and objects, each a small torch.save archive; each rank writes files of its own

There is no common.pt and no metadata.json. Keys are the paths in the dict that was saved, such as
`model.decoder.layers.0...` and `optim.state.<name>.exp_avg`. They are recognized by the embedding, which every model
has: its prefix is the prefix of all weights. The model's shape is unknown unless arguments were saved.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from megagrow.checkpoint.formats.megatron_common import (
    EXPERTS,
    RUN_CONFIG,
    ModuleName,
    argument_notes,
    canonical_name,
    layout_of_arguments,
    optimizer_refusal,
    run_config_arguments,
    shape_of_arguments,
)
from megagrow.checkpoint.formats.torch_dist.index import read_index
from megagrow.checkpoint.formats.torch_dist.spellings import canonical_index
from megagrow.checkpoint.index import DType, OpenCheckpoint, TensorInfo, check_cover
from megagrow.checkpoint.reading import ChunkReader
from megagrow.checkpoint.tensors import LAYERS, optimizer_key
from megagrow.config import ModelShape
from megagrow.errors import CheckpointError

_EMBEDDING = re.compile(r"^(.*?)(?:language_model\.)?embedding\.word_embeddings\.weight$")
_STATE = re.compile(r"^(?:.*\.)?optim(?:izer)?\.state\.(.+)\.(exp_avg|exp_avg_sq|step)$")
_OPTIMIZER = re.compile(r"^(?:.*\.)?optim(?:izer)?\.")
_WRAPPERS = re.compile(r"^(?:(?:state_dict|model|module|_orig_mod|_fsdp_wrapped_module)\.)+")
_STEP = re.compile(r"^(?:.*\.)?optim(?:izer)?\.param_groups\.(?:.*\.)?step$")
_FSDP_GROUPS = re.compile(r"^optimizer\.(?:\d+\.)?param_to_group_meta\.")
_SETTING = re.compile(r"^(?:.*\.)?param_groups\.(?:.*\.)?(lr|betas|eps|weight_decay)$")
_HUGGINGFACE = re.compile(r"(?:^|\.)(?:embed_tokens|wte)\.weight$|\.(?:self_attn\.q_proj|attn\.c_attn)\.")


def open_dcp(
    path: Path, *, shape: ModelShape | None = None, optimizer: bool = True, ignored_arguments: Collection[str] = ()
) -> OpenCheckpoint:
    """Open a directory to which torch.distributed.checkpoint saved a Megatron-Core GPT, in any nesting of dicts.

    Args:
        path: a directory with `.metadata` and `*.distcp`, and without `metadata.json`.
        shape: of the model, used if no `args` were saved with it; without either, the result's shape is None.
        optimizer: whether to read Adam's state if there is one.
        ignored_arguments: saved arguments that Megatron-LM does not have and the user knows to be harmless.

    Raises:
        CheckpointError: it is damaged or unsafe; its keys are not those of a Megatron-Core GPT; or the optimizer's
            states have no names (`optimizer=False` opens it without them).
    """
    try:
        return _open(path, shape, optimizer, ignored_arguments)
    except CheckpointError:
        raise
    except Exception as error:  # keys and objects of an unknown program can cause any exception
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{path}: damaged: {what[:300]}") from None


def _open(path: Path, shape: ModelShape | None, optimizer: bool, ignored: Collection[str]) -> OpenCheckpoint:
    tensors, objects = read_index(path / ".metadata")
    raw = ChunkReader(path, tensors, objects)
    raw.check_extents()
    for key, info in tensors.items():
        check_cover(f"{path / '.metadata'}: {key}", info)
    _refuse_fsdp(path, any(_FSDP_GROUPS.match(key) for key in (*tensors, *objects)))
    common: dict[str, Any] = {key: raw.read_object(key) for key in ("iteration", "args") if key in objects}
    if isinstance(args := common.get("args"), Mapping):
        _refuse_fsdp(path, args.get("ckpt_format") == "fsdp_dtensor" or bool(args.get("use_megatron_fsdp")))
    prefix = _prefix(path, tensors)
    weights, unused = _weights(tensors, prefix)
    has_optimizer = optimizer and any(_STATE.match(key) for key in tensors)
    index = canonical_index(weights | (_states(path, tensors, prefix) if has_optimizer else {}))
    if has_optimizer:
        _check_masters(path, index)
        common["optimizer"] = {"optimizer": {"param_groups": [{**_settings(raw), "step": _step(path, raw)}]}}
    elif not optimizer:
        index = {key: info for key, info in index.items() if not key.startswith("optimizer.")}
    args, where = common.get("args"), f"{path}: args"
    if not args:
        args, where = run_config_arguments(path), RUN_CONFIG
    raw.close()
    layout = None
    notes: tuple[str, ...] = ()
    if unused:
        notes = (f"{len(unused)} tensors that are not the model's are left out, first {unused[0]}",)
    if isinstance(args, Mapping):
        shape, layout = shape_of_arguments(args, where, ignored), layout_of_arguments(args, where)
        notes += argument_notes(args)
    return OpenCheckpoint("torch.distributed.checkpoint", ChunkReader(path, index, {}), shape, layout, common, notes)


def _refuse_fsdp(path: Path, is_fsdp: bool) -> None:
    """Raise CheckpointError for what Megatron-LM writes with --use-megatron-fsdp."""
    if is_fsdp:
        raise CheckpointError(
            f"{path}: a checkpoint of Megatron-FSDP (--ckpt-format fsdp_dtensor), which is not supported; export it to "
            "Hugging Face with Megatron-Bridge and convert that, or save it from a run without --use-megatron-fsdp"
        )


def _prefix(path: Path, keys: Iterable[str]) -> str:
    """Return the prefix of the names of all weights."""
    found = {match[1] for key in keys if not _OPTIMIZER.match(key) and (match := _EMBEDDING.match(key))}
    if len(found) == 1:
        return found.pop()
    if found:
        raise CheckpointError(f"{path}: holds {len(found)} models, under {', '.join(sorted(map(repr, found)))}")
    if foreign := [key for key in keys if _HUGGINGFACE.search(key)]:
        raise CheckpointError(
            f"{path}: its tensors have Hugging Face names ({foreign[0]}), which are only supported in safetensors: "
            "write the model with save_pretrained, and convert that"
        )
    raise CheckpointError(f"{path}: no key ends with embedding.word_embeddings.weight: not a Megatron-Core GPT")


def _weights(tensors: Mapping[str, TensorInfo], prefix: str) -> tuple[dict[str, TensorInfo], list[str]]:
    """Return the weights under Megatron-Core's keys, and the keys that belong to neither weights nor optimizer."""
    dense = not any(".mlp.experts." in key or ".mlp.router." in key for key in tensors)
    weights: dict[str, TensorInfo] = {}
    unused = []
    for key, info in tensors.items():
        if _OPTIMIZER.match(key):
            continue
        name = canonical_name(key.removeprefix(prefix), dense=dense) if key.startswith(prefix) else None
        if name is None:
            unused.append(key)
        else:
            weights[_unstacked_key(name)] = info
    return weights, [key for key in unused if not key.endswith(("_extra_state", "inv_freq"))]


def _states(path: Path, tensors: Mapping[str, TensorInfo], prefix: str) -> dict[str, TensorInfo]:
    """Return the optimizer's states under Megatron-Core's keys."""
    dense = not any(".mlp.experts." in key or ".mlp.router." in key for key in tensors)
    states: dict[str, TensorInfo] = {}
    for key, info in tensors.items():
        match = _STATE.match(key)
        if match is None or match[2] == "step":
            continue
        if match[1].isdigit():
            raise optimizer_refusal(
                f"{path}: {key}",
                "its optimizer's states are numbered and not named, so their parameters are unknown "
                "(torch.distributed.checkpoint.state_dict.get_optimizer_state_dict saves names)",
            )
        named = match[1].removeprefix(prefix)
        name = canonical_name(_WRAPPERS.sub("", named), dense=dense)
        if name is not None:
            states[optimizer_key(match[2], _unstacked_key(name))] = info
    return states


def _unstacked_key(name: ModuleName) -> str:
    """Return Megatron-Core's key of a tensor, with the numbers of its layer and its expert if it has them."""
    key = name.key
    if name.expert is not None:
        key = f"{EXPERTS}{name.expert}.{key.removeprefix(EXPERTS)}"
    return key if name.layer is None else f"{LAYERS}{name.layer}.{key.removeprefix(LAYERS)}"


def _check_masters(path: Path, index: Mapping[str, TensorInfo]) -> None:
    """Raise CheckpointError unless the weights are fp32, and so their own masters, as in training by plain torch."""
    for key, info in index.items():
        if not key.startswith("optimizer.") and info.dtype != DType.FLOAT32:
            raise optimizer_refusal(path, f"{key} is {info.dtype}, and its optimizer has no fp32 masters")


def _step(path: Path, raw: ChunkReader) -> int:
    """Return the number of steps that the optimizer has taken, which must be the same for all parameters."""
    step_keys = [key for key in raw.tensors if (match := _STATE.match(key)) and match[2] == "step"]
    steps = {float(raw.read_whole(key)) for key in step_keys}
    steps |= {raw.read_object(key) for key in raw.objects if _STEP.match(key)}
    if len(steps) != 1 or not isinstance(step := steps.pop(), int | float) or step != int(step):
        raise optimizer_refusal(path, "its optimizer does not have one step count for all parameters")
    return int(step)


def _settings(raw: ChunkReader) -> dict[str, Any]:
    """Return Adam's settings that are the same in all parameter groups; Megatron-Core takes them from a checkpoint."""
    found: dict[str, Any] = {}
    differing = set()
    for key in raw.objects:
        if match := _SETTING.match(key):
            value = raw.read_object(key)
            if found.setdefault(match[1], value) != value:
                differing.add(match[1])
    return {name: value for name, value in found.items() if name not in differing}
