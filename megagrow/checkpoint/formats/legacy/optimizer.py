"""Map the values of Adam's state in a legacy checkpoint to parameters.

Megatron's optimizers record no names. The plain one numbers parameters group by group, in the order of the model's
modules; the distributed one packs them end to end into flat buffers. Both orders follow from the model in the same
checkpoint, and both are checked: groups by their weight decay and by the shape of every state, buffers by their exact
length. If the answer is not unique, or there is none, the optimizer is refused and nothing is guessed.

Source: Megatron-Core 0.16.1, `optimizer/__init__.py` (`_get_param_groups`), `optimizer/optimizer.py`
(`Float16OptimizerWithFloat16Params.state_dict`) and `optimizer/distrib_optimizer.py` (`get_parameter_state_dp_zero`).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from megagrow.checkpoint.formats.legacy.rank_files import OPTIMIZER_FILE, ModelRank, RankFile, read_state
from megagrow.checkpoint.formats.legacy.rank_models import EMBEDDING, LegacyParameter, RankGrid, RankModel
from megagrow.checkpoint.formats.megatron_common import bucket_layout, optimizer_refusal, possible_bucket_sizes
from megagrow.checkpoint.index import DType, row_major
from megagrow.checkpoint.pickles import ArchivedValues, PickledTensor, to_plain
from megagrow.checkpoint.reading import Files
from megagrow.checkpoint.tensors import OPTIMIZER_STATES
from megagrow.errors import CheckpointError


class OptimizerValue(NamedTuple):
    """One of Adam's states of a parameter, and the location of its values."""

    state: str
    parameter: LegacyParameter
    file: RankFile
    payload: ArchivedValues


@dataclass(frozen=True, eq=False)
class LegacyAdam:
    """A rank's optimizer: its values, its parameter groups as plain data, and every step count that it records."""

    values: tuple[OptimizerValue, ...]
    groups: tuple[dict[str, Any], ...]
    steps: frozenset[int]


@dataclass(frozen=True, eq=False)
class OptimizerReader:
    """Reads the optimizer of each rank.

    Attributes:
        files: of the checkpoint.
        args: arguments of the checkpoint; may be empty.
        grid: of its ranks.
        tied: whether the embedding is also the output layer.
    """

    files: Files
    args: Mapping[str, Any]
    grid: RankGrid
    tied: bool

    def read(self, rank: ModelRank, file: RankFile, model: RankModel) -> LegacyAdam:
        """Return a rank's optimizer; CheckpointError if its values cannot be mapped to parameters."""
        stored = file.state.get("optimizer")
        if stored is None:
            raise _refusal(file, "has no optimizer, but another rank has one")
        optimizers = stored if isinstance(stored, list) else [stored]
        models: list[RankModel] = [model]
        if self.grid.expert > 1:
            models = [_filtered(model, experts=False), _filtered(model, experts=True)]
        if len(optimizers) != len(models):
            raise _refusal(file, f"has {len(optimizers)} optimizers, but its arguments imply {len(models)}")
        packed = self._packed_file(rank, file, len(optimizers))
        values: list[OptimizerValue] = []
        groups: list[dict[str, Any]] = []
        steps: set[int] = set()
        for number, (optimizer, parameters) in enumerate(zip(optimizers, models, strict=True)):
            inner = optimizer.get("optimizer", optimizer) if isinstance(optimizer, dict) else {}
            groups += [{**group, "params": []} for group in to_plain(inner.get("param_groups", []))]
            found = {self._step(file, group["step"]) for group in inner.get("param_groups", []) if "step" in group}
            if packed is None:
                values += self._plain(file, optimizer, inner, parameters, found)
            elif not all(parameter.is_replica for chunk in parameters for parameter in chunk):
                values += self._distributed(packed, packed.state[number], parameters, rank)
            steps |= found
        return LegacyAdam(tuple(values), tuple(groups), frozenset(steps))

    def _packed_file(self, rank: ModelRank, file: RankFile, optimizers: int) -> RankFile | None:
        """Return the file of a distributed optimizer, with one list item per optimizer; None if it is not one."""
        name = f"{rank.directory}/{OPTIMIZER_FILE}"
        if not (self.files.root / name).is_file():
            if self.args.get("use_distributed_optimizer"):
                raise _refusal(file, f"its optimizer is in {OPTIMIZER_FILE}, which is missing")
            return None
        packed = read_state(self.files, name)
        state = packed.state if isinstance(packed.state, list) else [packed.state]
        if len(state) != optimizers:
            raise _refusal(packed, f"contains {len(state)} optimizers, but {file.name} has {optimizers}")
        return RankFile(packed.name, packed.where, state, packed.members)

    def _plain(
        self, file: RankFile, optimizer: Any, inner: Any, model: RankModel, steps: set[int]
    ) -> Iterator[OptimizerValue]:
        """Yield the values of an optimizer that is not distributed; add to `steps` the counts kept per parameter."""
        states = inner.get("state")
        if not isinstance(states, dict):
            raise _refusal(file, "has an optimizer of an unknown kind")
        if not states:
            raise _refusal(file, "has an optimizer that has taken no step")
        masters = optimizer.get("fp32_from_fp16_params", optimizer.get("fp32_from_fp16"))
        for number, (group, parameters) in self._groups(file, inner["param_groups"], model).items():
            group_masters = iter(masters[number] if masters is not None else ())
            for index, parameter in zip(group["params"], parameters, strict=True):
                half = parameter.view.storage.dtype in (DType.FLOAT16, DType.BFLOAT16)
                if half and masters is None:
                    raise _refusal(file, f"has no fp32 masters of {parameter.raw}")
                own = {"param": next(group_masters, None) if half else parameter.view, **states.get(index, {})}
                if "step" in own:
                    steps.add(self._step(file, own["step"]))
                for state in OPTIMIZER_STATES:
                    view = own.get(state)
                    if not isinstance(view, PickledTensor) or view.shape != parameter.view.shape:
                        found = list(view.shape) if isinstance(view, PickledTensor) else "missing"
                        raise _refusal(
                            file,
                            f"its optimizer has an unknown order of parameters: {state} number {index} is {found}, "
                            f"expected is {parameter.raw} {list(parameter.view.shape)}",
                        )
                    yield OptimizerValue(state, parameter, file, file.payload(view))

    def _groups(
        self, file: RankFile, groups: Any, model: RankModel
    ) -> dict[int, tuple[dict[str, Any], list[LegacyParameter]]]:
        """Return each used group with its parameters: those with weight decay, or those without."""
        result: dict[int, tuple[dict[str, Any], list[LegacyParameter]]] = {}
        used = {number: group for number, group in enumerate(groups) if group["params"]}
        decay = {number: group.get("wd_mult", group.get("weight_decay", 1.0)) != 0 for number, group in used.items()}
        if len(set(decay.values())) != len(used):
            raise _refusal(file, "has several parameter groups with the same weight decay")
        for number, group in used.items():
            decays = decay[number]
            members = [each for chunk in model for each in chunk if self._decays(each) == decays]
            if len(members) != len(group["params"]):
                raise _refusal(
                    file,
                    f"has {len(group['params'])} parameters {'with' if decays else 'without'} weight decay in its "
                    f"optimizer, but {len(members)} in its model",
                )
            result[number] = group, members
        if sum(len(members) for _, members in result.values()) != sum(map(len, model)):
            raise _refusal(file, "has an optimizer that lacks some of the model's parameters")
        return result

    def _decays(self, parameter: LegacyParameter) -> bool:
        raw = parameter.raw
        if self.args.get("apply_wd_to_qk_layernorm") and ("q_layernorm." in raw or "k_layernorm." in raw):
            return True
        return len(parameter.view.shape) > 1 and not raw.endswith(".bias")

    def _distributed(self, packed: RankFile, state: Any, model: RankModel, rank: ModelRank) -> Iterator[OptimizerValue]:
        """Yield the values of a distributed optimizer: ranges of flat buffers, one per model chunk and type."""
        if not isinstance(state, dict):
            raise _refusal(packed, "lacks an optimizer that its rank should have")
        if not state.get("buckets_coalesced"):
            raise _refusal(packed, "written by Megatron before February 2024, whose order of parameters is unsupported")
        buffers: list[tuple[int, DType, list[LegacyParameter]]] = []
        for chunk, parameters in enumerate(model):
            by_type: dict[DType, list[LegacyParameter]] = {}
            for parameter in parameters:
                by_type.setdefault(parameter.view.storage.dtype, []).append(parameter)
            buffers += [(chunk, dtype, members) for dtype, members in by_type.items()]
        if [key for key in state if isinstance(key, int)] != list(range(len(buffers))):
            raise _refusal(packed, f"does not have the {len(buffers)} buffers that its model implies")
        for number, (chunk, dtype, members) in enumerate(buffers):
            ((types, content),) = state[number].items()
            if to_plain(types[0]) != dtype:
                raise _refusal(packed, f"has a buffer of {types[0]}, but the model's parameters are {dtype}")
            views = {key: content[key] for key in OPTIMIZER_STATES}
            for view in views.values():
                if not isinstance(view, PickledTensor) or len(view.shape) != 1 or view.strides != (1,):
                    raise _refusal(packed, "has a buffer that is not flat")
            starts = self._starts(packed, members, views["param"].shape[0], rank, chunk)
            for parameter, start in zip(members, starts, strict=True):
                shape = parameter.view.shape
                for key, view in views.items():
                    inside = PickledTensor(view.storage, view.start + start, shape, row_major(shape))
                    yield OptimizerValue(key, parameter, packed, packed.payload(inside))

    def _starts(
        self, packed: RankFile, members: list[LegacyParameter], length: int, rank: ModelRank, chunk: int
    ) -> tuple[int, ...]:
        """Return the start of each parameter in a buffer of this length; CheckpointError if it is not unique."""
        parameter_sizes = [math.prod(member.view.shape) for member in members]
        shared = self.tied and self.grid.pipeline > 1
        own_bucket = [i for i, member in enumerate(members) if shared and member.kind.key == EMBEDDING]
        fits: set[tuple[int, ...]] = set()
        for size in (None,) if rank.pipeline or chunk else possible_bucket_sizes(self.args):
            joined = bucket_layout(parameter_sizes, own_bucket=own_bucket, bucket_size=size).joined()
            if joined.sizes == (length,):
                fits.add(tuple(each.start for each in joined.ranges))
        if len(fits) != 1:
            reason = "in more than one way" if fits else "in no known way"
            raise _refusal(packed, f"has a buffer of {length} values, which the model's parameters fill {reason}")
        return fits.pop()

    def _step(self, file: RankFile, value: Any) -> int:
        """Return a step count, which may be stored as a tensor of one value."""
        if isinstance(value, PickledTensor):
            payload = file.payload(value)
            if math.prod(payload.shape) != 1:
                raise _refusal(file, f"has a step count of shape {list(payload.shape)}")
            import torch

            content = bytearray(payload.dtype.itemsize)
            self.files.read(file.name, payload.offset, memoryview(content))
            value = torch.frombuffer(content, dtype=payload.dtype.torch).item()
        if not isinstance(value, int | float) or value != int(value):
            raise _refusal(file, f"has a step count of {value!r}")
        return int(value)


def _filtered(model: RankModel, *, experts: bool) -> RankModel:
    """Return the parameters of expert-parallel experts only, or all others."""
    return tuple(tuple(each for each in chunk if each.expert_parallel == experts) for chunk in model)


def _refusal(file: RankFile, reason: str) -> CheckpointError:
    return optimizer_refusal(file.where, reason)
