"""Typed records: what happened, one JSON object a line, written as it happens.

Reports, `status` and tests read these files and never a log. A record is frozen and knows its `kind`. A file
survives `kill -9`: a half-written last line is dropped when it is read, and a resumed run first takes out
the steps that it is about to do again (`rewind`).
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """Base of all records; `time` is seconds since the epoch (UTC)."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants", defer_build=True)

    time: float


class StepRecord(Record):
    """One optimizer step. `iteration` counts from 1 within the stage, `consumed_*` over the whole family."""

    kind: Literal["step"] = "step"
    stage: str
    iteration: int
    loss: float
    grad_norm: float
    learning_rate: float
    consumed_samples: int
    consumed_tokens: int
    flops: float = Field(description="training FLOPs spent in this stage so far")
    tokens_per_second: float
    skipped: bool = False


class EvalRecord(Record):
    """Validation loss in nats per token after `iteration` steps of the stage (0: before the first)."""

    kind: Literal["eval"] = "eval"
    stage: str
    iteration: int
    loss: float
    samples: int
    consumed_tokens: int
    flops: float = Field(description="training FLOPs spent in this stage so far")


class StageRecord(Record):
    """A finished stage."""

    kind: Literal["stage"] = "stage"
    stage: str
    iterations: int
    parameters: int
    stage_tokens: int
    consumed_tokens: int
    flops: float
    first_loss: float | None
    final_loss: float
    checkpoint: str
    seconds: float = Field(description="wall seconds of the last process that trained the stage")


class ConversionRecord(Record):
    """A finished conversion from one checkpoint to the next."""

    kind: Literal["conversion"] = "conversion"
    source: str
    target: str
    operators: dict[str, str]
    moments: str
    exact: bool
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float


class JobRecord(Record):
    """A job of the family graph that was submitted to a cluster, that started or ended."""

    kind: Literal["job"] = "job"
    job: str
    event: Literal["submitted", "started", "finished", "failed", "interrupted"]
    detail: str = ""
    job_id: str | None = Field(None, description="of the cluster")
    iteration: int | None = Field(None, description="that the job's stage has reached by its tracker")
    exit_code: int | None = None
    seconds: float | None = None


class ResidualRow(BaseModel):
    """Root mean square of the residual stream after a layer; layer 0 is the embedding."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    layer: int
    parent_layer: int | None = Field(description="the layer of the parent that it comes from; None: a new one")
    child: float
    parent: float | None


class CopiesRow(BaseModel):
    """How alike copies are to their sources after some steps: mean cosines, over all copies along an axis."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    axis: str
    copies: int
    weights: float
    updates: float | None = Field(description="of what the steps changed; None: they changed nothing")


class GradientRow(BaseModel):
    """Predicted against actual gradients of one kind of tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    tensor: str
    entries: int
    error: float = Field(description="largest difference, relative to the largest gradient of the kind")


class DeepRecord(Record):
    """What parent and child computed on the same tokens (`megagrow verify --deep`)."""

    kind: Literal["deep"] = "deep"
    parent: str
    child: str
    operators: dict[str, str]
    promised: bool = Field(description="whether the child's lineage says that it computes the parent's function")
    verdict: Literal["exact", "within", "not preserving", "broken"]
    words: str = Field(description="the verdict, for people")
    precision: Literal["fp64", "fp32"] = Field(description="in which the models ran")
    weights: Literal["fp64", "fp32", "bf16"] = Field(description="in which the checkpoint holds them")
    tolerance: float = Field(description="relative, on logits")
    tokens: int
    logit_difference: float = Field(description="largest, absolute")
    logit_difference_relative: float = Field(description="the same over the parent's largest logit")
    parent_loss: float
    child_loss: float
    residual: tuple[ResidualRow, ...]
    new_entries: int = Field(description="that the tokens can reach: rows of unseen tokens do not count")
    live_after_one: float | None = Field(description="share of them with a gradient in the first backward pass")
    live_after_two: float | None = Field(description="in the first or the second, one optimizer step later")
    steps: int = Field(description="of Adam, with the checkpoint's moments, before copies were compared")
    copies: tuple[CopiesRow, ...]
    gradients: tuple[GradientRow, ...] = Field(description="empty where the dual rule predicts none")
    gradient_limits: tuple[str, ...]
    seconds: float


class RollBackRecord(Record):
    """A step was not finite, and the stage went back to a checkpoint; the samples since then are passed over."""

    kind: Literal["roll_back"] = "roll_back"
    stage: str
    iteration: int = Field(description="the first step that is done again, with other samples")
    bad_iteration: int = Field(description="the step whose loss or gradient norm was not finite")
    loss: float
    grad_norm: float
    passed_over: int = Field(description="samples since the checkpoint, that no later step sees")
    number: int = Field(description="how many in this stage, with this one")


AnyRecord = Annotated[
    StepRecord | EvalRecord | StageRecord | ConversionRecord | JobRecord | DeepRecord | RollBackRecord,
    Field(discriminator="kind"),
]
