"""Adam's state in a legacy checkpoint: which values are whose.

Megatron's optimizers keep no names. The plain one numbers parameters group by group, in the order of the model's
modules; the distributed one packs them end to end into flat buffers. Both orders follow from the model that lies in
the same checkpoint, and both are checked: groups by the weight decay that made them and by the shape of every state,
buffers by their exact length. Where that leaves more than one answer, or none, the optimizer is refused, not guessed.

Source: Megatron-Core 0.16.1, `optimizer/__init__.py` (`_get_param_groups`), `optimizer/optimizer.py`
(`Float16OptimizerWithFloat16Params.state_dict`) and `optimizer/distrib_optimizer.py` (`get_parameter_state_dp_zero`).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from megagrow.checkpoint.formats.legacy.rank_files import OPTIMIZER_FILE, Archive, ModelRank, read_state
from megagrow.checkpoint.formats.legacy.rank_models import EMBEDDING, Grid, LegacyParameter, Model
from megagrow.checkpoint.formats.megatron_common import WITHOUT, bucket_layout, bucket_sizes
from megagrow.checkpoint.index import DType, row_major
from megagrow.checkpoint.pickles import Payload, View, plain
from megagrow.checkpoint.reading import Files
from megagrow.checkpoint.tensors import OPTIMIZER_STATES
from megagrow.errors import CheckpointError


class OptimizerValue(NamedTuple):
    """A state of a parameter, and where its values lie."""

    state: str
    parameter: LegacyParameter
    archive: Archive
    payload: Payload


@dataclass(frozen=True, eq=False)
class LegacyAdam:
    """A rank's optimizer: its values, its parameter groups as plain data, and the steps that it says it has taken."""

    values: tuple[OptimizerValue, ...]
    groups: tuple[dict[str, Any], ...]
    steps: frozenset[int]


@dataclass(frozen=True, eq=False)
class OptimizerReader:
    """Reads the optimizers of all ranks.

    Attributes:
        files: of the checkpoint.
        args: the checkpoint's arguments, as far as it has any.
        grid: of its ranks.
        tied: whether the embedding is also the output layer.
    """

    files: Files
    args: Mapping[str, Any]
    grid: Grid
    tied: bool

    def read(self, rank: ModelRank, archive: Archive, model: Model) -> LegacyAdam:
        """Return a rank's optimizer; CheckpointError where it cannot be told which values are whose."""
        parts = archive.state.get("optimizer")
        if parts is None:
            raise _refusal(archive, "has no optimizer, where another rank has one")
        parts = parts if isinstance(parts, list) else [parts]
        families: list[Model] = [model]
        if self.grid.expert > 1:
            families = [_of_family(model, experts=False), _of_family(model, experts=True)]
        if len(parts) != len(families):
            raise _refusal(archive, f"has {len(parts)} optimizers, where its arguments make {len(families)}")
        packed = self._packed(rank, archive, len(parts))
        values: list[OptimizerValue] = []
        groups: list[dict[str, Any]] = []
        steps: set[int] = set()
        for number, (part, family) in enumerate(zip(parts, families, strict=True)):
            inner = part.get("optimizer", part) if isinstance(part, dict) else {}
            groups += [{**group, "params": []} for group in plain(inner.get("param_groups", []))]
            found = {self._step(archive, group["step"]) for group in inner.get("param_groups", []) if "step" in group}
            if packed is None:
                values += self._plain(archive, part, inner, family, found)
            elif not all(parameter.replica for chunk in family for parameter in chunk):
                values += self._distributed(packed, packed.state[number], family, rank)
            steps |= found
        return LegacyAdam(tuple(values), tuple(groups), frozenset(steps))

    def _packed(self, rank: ModelRank, archive: Archive, optimizers: int) -> Archive | None:
        """The file of a distributed optimizer, its state as a list of one part for each optimizer."""
        name = f"{rank.directory}/{OPTIMIZER_FILE}"
        if not (self.files.root / name).is_file():
            if self.args.get("use_distributed_optimizer"):
                raise _refusal(archive, f"keeps its optimizer in {OPTIMIZER_FILE}, which is missing")
            return None
        packed = read_state(self.files, name)
        state = packed.state if isinstance(packed.state, list) else [packed.state]
        if len(state) != optimizers:
            raise _refusal(packed, f"holds {len(state)} optimizers, {archive.name} has {optimizers}")
        return Archive(packed.name, packed.where, state, packed.members)

    def _plain(
        self, archive: Archive, part: Any, inner: Any, family: Model, steps: set[int]
    ) -> Iterator[OptimizerValue]:
        """Values of an optimizer that is not distributed; adds the steps that it counts by parameter."""
        states = inner.get("state")
        if not isinstance(states, dict):
            raise _refusal(archive, "has an optimizer of a kind that is not known")
        if not states:
            raise _refusal(archive, "has an optimizer that has taken no step")
        masters = part.get("fp32_from_fp16_params", part.get("fp32_from_fp16"))
        for number, (group, parameters) in self._groups(archive, inner["param_groups"], family).items():
            kept = iter(masters[number] if masters is not None else ())
            for index, parameter in zip(group["params"], parameters, strict=True):
                half = parameter.view.storage.dtype in (DType.FLOAT16, DType.BFLOAT16)
                if half and masters is None:
                    raise _refusal(archive, f"has no fp32 masters of {parameter.raw}")
                own = {"param": next(kept, None) if half else parameter.view, **states.get(index, {})}
                if "step" in own:
                    steps.add(self._step(archive, own["step"]))
                for state in OPTIMIZER_STATES:
                    view = own.get(state)
                    if not isinstance(view, View) or view.shape != parameter.view.shape:
                        has = list(view.shape) if isinstance(view, View) else "missing"
                        raise _refusal(
                            archive,
                            f"has an optimizer whose {state} number {index} is {has}, where {parameter.raw} "
                            f"{list(parameter.view.shape)} is expected: its order of parameters is not known",
                        )
                    yield OptimizerValue(state, parameter, archive, archive.payload(view))

    def _groups(
        self, archive: Archive, groups: Any, family: Model
    ) -> dict[int, tuple[dict[str, Any], list[LegacyParameter]]]:
        """Which parameters each group has: those that decay, and those that do not."""
        result: dict[int, tuple[dict[str, Any], list[LegacyParameter]]] = {}
        used = {number: group for number, group in enumerate(groups) if group["params"]}
        decay = {number: group.get("wd_mult", group.get("weight_decay", 1.0)) != 0 for number, group in used.items()}
        if len(set(decay.values())) != len(used):
            raise _refusal(archive, "has parameter groups that are not told apart by their weight decay")
        for number, group in used.items():
            decays = decay[number]
            members = [each for chunk in family for each in chunk if self._decays(each) == decays]
            if len(members) != len(group["params"]):
                raise _refusal(
                    archive,
                    f"has {len(group['params'])} parameters {'with' if decays else 'without'} weight decay in its "
                    f"optimizer, {len(members)} in its model",
                )
            result[number] = group, members
        if sum(len(members) for _, members in result.values()) != sum(map(len, family)):
            raise _refusal(archive, "has an optimizer without some of the model's parameters")
        return result

    def _decays(self, parameter: LegacyParameter) -> bool:
        raw = parameter.raw
        if self.args.get("apply_wd_to_qk_layernorm") and ("q_layernorm." in raw or "k_layernorm." in raw):
            return True
        return len(parameter.view.shape) > 1 and not raw.endswith(".bias")

    def _distributed(self, packed: Archive, state: Any, family: Model, rank: ModelRank) -> Iterator[OptimizerValue]:
        """Values of a distributed optimizer: ranges of flat buffers, one for each part of the pipeline and type."""
        if not isinstance(state, dict):
            raise _refusal(packed, "lacks an optimizer that its rank should have")
        if not state.get("buckets_coalesced"):
            raise _refusal(packed, "is of Megatron before February 2024, whose order of parameters is not read")
        buffers: list[tuple[int, DType, list[LegacyParameter]]] = []
        for stage, chunk in enumerate(family):
            by_type: dict[DType, list[LegacyParameter]] = {}
            for parameter in chunk:
                by_type.setdefault(parameter.view.storage.dtype, []).append(parameter)
            buffers += [(stage, dtype, members) for dtype, members in by_type.items()]
        if [key for key in state if isinstance(key, int)] != list(range(len(buffers))):
            raise _refusal(packed, f"does not have the {len(buffers)} buffers that its model makes")
        for number, (stage, dtype, members) in enumerate(buffers):
            ((types, content),) = state[number].items()
            if types[0] != dtype:
                raise _refusal(packed, f"has a buffer of {types[0]} where the model's parameters are {dtype}")
            views = {key: content[key] for key in OPTIMIZER_STATES}
            for view in views.values():
                if not isinstance(view, View) or len(view.shape) != 1 or view.strides != (1,):
                    raise _refusal(packed, "has a buffer that is not flat")
            starts = self._starts(packed, members, views["param"].shape[0], rank, stage)
            for parameter, start in zip(members, starts, strict=True):
                shape = parameter.view.shape
                for key, view in views.items():
                    inside = View(view.storage, view.start + start, shape, row_major(shape))
                    yield OptimizerValue(key, parameter, packed, packed.payload(inside))

    def _starts(
        self, packed: Archive, members: list[LegacyParameter], length: int, rank: ModelRank, stage: int
    ) -> tuple[int, ...]:
        """Where each parameter begins in a buffer of this length."""
        values = [math.prod(member.view.shape) for member in members]
        shared = self.tied and self.grid.pipeline > 1
        alone = [i for i, member in enumerate(members) if shared and member.kind.key == EMBEDDING]
        fits: set[tuple[int, ...]] = set()
        for bucket_size in (None,) if rank.pipeline or stage else bucket_sizes(self.args):
            joined = bucket_layout(values, alone=alone, bucket_size=bucket_size).joined()
            if joined.sizes == (length,):
                fits.add(tuple(place.start for place in joined.places))
        if len(fits) != 1:
            reason = "in more than one way" if fits else "in no known way"
            raise _refusal(packed, f"has a buffer of {length} values, which the model's parameters fill {reason}")
        return fits.pop()

    def _step(self, archive: Archive, value: Any) -> int:
        """A count of steps, which may be a tensor of one number."""
        if isinstance(value, View):
            payload = archive.payload(value)
            if math.prod(payload.shape) != 1:
                raise _refusal(archive, f"counts its steps in a tensor of shape {list(payload.shape)}")
            import torch

            content = bytearray(payload.dtype.itemsize)
            self.files.read(archive.name, payload.offset, memoryview(content))
            value = torch.frombuffer(content, dtype=payload.dtype.torch).item()
        if not isinstance(value, int | float) or value != int(value):
            raise _refusal(archive, f"says that it has taken {value!r} steps")
        return int(value)


def _of_family(model: Model, *, experts: bool) -> Model:
    return tuple(tuple(each for each in part if each.expert_parallel == experts) for part in model)


def _refusal(archive: Archive, what: str) -> CheckpointError:
    return CheckpointError(f"{archive.where}: {what}; {WITHOUT}")
