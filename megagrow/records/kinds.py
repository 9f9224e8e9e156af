"""The types of records. Each is frozen, and its field `kind` names its type.

A file of records survives `kill -9`: a half-written last line is skipped when the file is read, and a resumed run
first removes the steps that it is about to repeat (`rewind`).
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
    stage_tokens: int | None = Field(None, description="training tokens spent in this stage so far")
    tokens_per_second: float
    skipped: bool = False


class EvalRecord(Record):
    """Validation loss in nats per token after `iteration` steps of the stage; 0 is before the first step."""

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


Compared = Literal["blocks", "files", "skipped", "none", "unknown"]
"""How a conversion compared its source's checksums: those of the blocks that it read, those of whole files before it
read any, not at all because `--skip-checksums` was given, or not at all because there were none. `unknown`: written by
an older version."""


class ConversionRecord(Record):
    """A finished conversion from one checkpoint to the next."""

    kind: Literal["conversion"] = "conversion"
    source: str
    target: str
    operators: dict[str, str]
    moments: str
    exact: bool = Field(description="whether the operators preserve the function, in real numbers")
    storage: str | None = Field(None, description="what storing does to the values; None in older records")
    rounded: int | None = Field(None, description="tensors whose values storing rounds; None in older records")
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    notes: tuple[str, ...] = Field((), description="what was reported about the source and its types")
    checksums: Compared = Field("unknown", description="how the source's checksums were compared")
    non_finite: dict[str, int] = Field(
        default_factory=dict, description="number of NaN and infinite values in each tensor of the target that has any"
    )


class JobRecord(Record):
    """An event of one job of a family: it was submitted to a cluster, it started or it ended."""

    kind: Literal["job"] = "job"
    job: str
    event: Literal["submitted", "started", "finished", "failed", "interrupted"]
    detail: str = ""
    job_id: str | None = Field(None, description="the job's number on the cluster")
    iteration: int | None = Field(None, description="the iteration in the tracker of the job's stage")
    exit_code: int | None = None
    seconds: float | None = None
    environment: dict[str, str] | None = Field(None, description="of a start: versions, GPUs, git states, the script")


class ResidualRow(BaseModel):
    """Root mean square of the residual stream after a layer; layer 0 is the embedding."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    layer: int
    parent_layer: int | None = Field(description="the parent's layer that it was copied from; None: a new layer")
    child: float
    parent: float | None


class CopiesRow(BaseModel):
    """Similarity of copies to their sources after some steps: mean cosines over all copies along an axis."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    axis: str
    copies: int
    weights: float
    updates: float | None = Field(description="cosine of the changes made by the steps; None: nothing changed")


class GradientRow(BaseModel):
    """Predicted and actual gradients of one kind of tensor, compared."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    tensor: str
    entries: int
    error: float = Field(description="largest difference, relative to the largest gradient of the kind")


class DeepRecord(Record):
    """Parent and child compared on the same tokens (`megagrow verify --deep`)."""

    kind: Literal["deep"] = "deep"
    parent: str
    child: str
    operators: dict[str, str]
    promised: bool = Field(description="whether the child's lineage promises the parent's function")
    verdict: Literal["exact", "within", "not preserving", "broken"]
    words: str = Field(description="the verdict as a sentence")
    precision: Literal["fp64", "fp32"] = Field(description="precision of the computation")
    weights: Literal["fp64", "fp32", "bf16"] = Field(description="precision of the weights in the checkpoint")
    tolerance: float = Field(description="relative, for logits")
    tokens: int
    logit_difference: float = Field(description="largest absolute difference")
    logit_difference_relative: float = Field(description="largest difference divided by the parent's largest logit")
    parent_loss: float
    child_loss: float
    residual: tuple[ResidualRow, ...]
    new_entries: int = Field(description="new values that the tokens can reach: rows of unseen tokens are not counted")
    live_after_one: float | None = Field(description="share of new_entries with a gradient in the first backward pass")
    live_after_two: float | None = Field(description="the same in the first or second pass, one optimizer step later")
    steps: int = Field(description="Adam steps, from the checkpoint's moments, before copies were compared")
    copies: tuple[CopiesRow, ...]
    gradients: tuple[GradientRow, ...] = Field(description="empty if the dual rule makes no prediction")
    gradient_limits: tuple[str, ...]
    seconds: float
    tokens_from: str = Field("random tokens", description="where the tokens come from")


class RollBackRecord(Record):
    """A step was not finite, and the stage went back to a checkpoint; the samples since then are skipped."""

    kind: Literal["roll_back"] = "roll_back"
    stage: str
    iteration: int = Field(description="the first step that is repeated, with other samples")
    bad_iteration: int = Field(description="the step whose loss or gradient norm was not finite")
    loss: float
    grad_norm: float
    passed_over: int = Field(description="samples since the checkpoint, which no later step uses")
    number: int = Field(description="roll-backs in this stage so far, this one included")


AnyRecord = Annotated[
    StepRecord | EvalRecord | StageRecord | ConversionRecord | JobRecord | DeepRecord | RollBackRecord,
    Field(discriminator="kind"),
]
