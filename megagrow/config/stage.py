"""The parallel layout, batch and schedule of one stage, and the rules between them and the model's shape."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from megagrow.config.base import Section
from megagrow.config.pipeline import UNEVEN, check_uneven, layers_of_chunks
from megagrow.config.shape import ModelShape


class ParallelLayout(Section):
    """The parallel layout of a stage, under Megatron's names."""

    tensor_model_parallel_size: int = Field(1, gt=0)
    pipeline_model_parallel_size: int = Field(1, gt=0)
    virtual_pipeline_model_parallel_size: int | None = Field(
        None, gt=0, description="model chunks per pipeline rank (interleaved schedule); needs a pipeline above 1"
    )
    context_parallel_size: int = Field(1, gt=0, description="a size above 1 needs transformer-engine")
    expert_model_parallel_size: int = Field(1, gt=0, description="shards experts across data-parallel ranks")
    expert_tensor_parallel_size: int | None = Field(
        None, gt=0, description="tensor-parallel size inside an expert; default: tensor_model_parallel_size"
    )
    data_parallel_size: int = Field(1, gt=0)
    sequence_parallel: bool = False
    decoder_first_pipeline_num_layers: int | None = Field(
        None, gt=0, description="layers of the first pipeline rank; the other ranks share the rest evenly"
    )
    decoder_last_pipeline_num_layers: int | None = Field(None, gt=0, description="layers of the last pipeline rank")
    account_for_embedding_in_pipeline_split: bool = Field(
        False, description="count the embedding as a layer of the first pipeline rank"
    )
    account_for_loss_in_pipeline_split: bool = Field(
        False, description="count the output layer and the loss as a layer of the last pipeline rank"
    )
    pipeline_model_parallel_layout: str | None = Field(
        None, description="what each chunk of the pipeline holds, as in Ett|t*3|ttL: embedding, layers, loss"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.virtual_pipeline_model_parallel_size and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"virtual_pipeline_model_parallel_size {self.virtual_pipeline_model_parallel_size} "
                "needs pipeline_model_parallel_size above 1"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("sequence_parallel needs tensor_model_parallel_size above 1")
        check_uneven(self.pipeline_model_parallel_size, self.virtual_pipeline_model_parallel_size, self.uneven)
        return self

    @property
    def uneven(self) -> dict[str, int | str]:
        """The settings that make the pipeline uneven, under Megatron's names; empty if it is even."""
        return {name: value for name in UNEVEN if (value := getattr(self, name))}

    def layers_of_chunks(self, num_layers: int) -> tuple[range, ...]:
        """Layers of each model chunk, in the order of the layers: chunk `v` of pipeline rank `p` is v * ranks + p.

        ValueError if the pipeline cannot be divided so.
        """
        virtual = self.virtual_pipeline_model_parallel_size or 1
        return layers_of_chunks(num_layers, self.pipeline_model_parallel_size, virtual, self.uneven)

    @property
    def groups(self) -> dict[str, Any]:
        """The sizes of the process groups, as `runtime.start` takes them."""
        return {name: size for name, size in self if name.endswith("_parallel_size")}

    @property
    def world_size(self) -> int:
        """Number of processes that run the stage."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
        )

    @property
    def expert_tensor(self) -> int:
        """Number of ranks that each expert is cut over."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def model_chunks(self) -> int:
        """Number of chunks that the layers are split into: pipeline ranks times virtual stages."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)

    def describe(self) -> str:
        """Short form for tables, such as `TP2 PP2 VPP2 SP`. Sizes of 1 are left out; `TP1` if all are 1."""
        sizes = {
            "TP": self.tensor_model_parallel_size,
            "PP": self.pipeline_model_parallel_size,
            "VPP": self.virtual_pipeline_model_parallel_size or 1,
            "CP": self.context_parallel_size,
            "EP": self.expert_model_parallel_size,
            "DP": self.data_parallel_size,
        }
        parts = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        if self.expert_tensor != self.tensor_model_parallel_size:
            parts.append(f"ETP{self.expert_tensor}")
        parts += ["SP"] * self.sequence_parallel + ["uneven"] * bool(self.uneven)
        return " ".join(parts) or "TP1"


class Batch(Section):
    """Samples per step. The global batch is split across data-parallel ranks, then into micro-batches."""

    micro_batch_size: int = Field(gt=0)
    global_batch_size: int = Field(gt=0)


class Schedule(Section):
    """The learning rate over a whole stage, which ends as a finished model, and the optimizer settings."""

    max_lr: float | None = Field(
        None, gt=0, description="peak learning rate; default: by the family's learning_rate rule"
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final learning rate, as a share of the peak")
    lr_decay_style: Literal["cosine", "linear", "WSD", "constant"] = "cosine"
    lr_warmup_fraction: float = Field(0.02, ge=0, lt=1, description="share of the stage's steps")
    lr_wsd_decay_fraction: float = Field(0.2, gt=0, le=1, description="WSD: share of the stage's steps that decay")
    weight_decay: float = Field(0.1, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0, description="maximum gradient norm; 0: no clipping")
    override_opt_param_scheduler: bool = Field(
        False, description="let a stage that has started continue with a different schedule"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.lr_decay_style == "WSD" and self.lr_warmup_fraction + self.lr_wsd_decay_fraction > 1:
            raise ValueError(
                f"lr_warmup_fraction {self.lr_warmup_fraction} and lr_wsd_decay_fraction "
                f"{self.lr_wsd_decay_fraction} add up to more than 1"
            )
        return self


def check_sharding(shape: ModelShape, layout: ParallelLayout) -> None:
    """Raise ValueError, with the numbers, if a shape cannot be sharded in this layout."""
    tensor = layout.tensor_model_parallel_size
    _check_expert_parallel(shape, layout)
    for name, value in (
        ("num_attention_heads", shape.num_attention_heads),
        ("num_query_groups", shape.groups),
        ("ffn_hidden_size", 0 if shape.num_moe_experts else shape.mlp_width),
        ("moe_shared_expert_intermediate_size", shape.moe_shared_expert_intermediate_size or 0),
        ("padded vocabulary", shape.padded_vocab_size),
    ):
        if value % tensor:
            raise ValueError(f"tensor_model_parallel_size {tensor} does not divide {name} {value}")
    if layout.sequence_parallel and shape.seq_length % tensor:
        raise ValueError(
            f"sequence_parallel: tensor_model_parallel_size {tensor} does not divide seq_length {shape.seq_length}"
        )
    layout.layers_of_chunks(shape.num_layers)
    if shape.seq_length % (2 * layout.context_parallel_size) and layout.context_parallel_size > 1:
        raise ValueError(
            f"2 x context_parallel_size {layout.context_parallel_size} does not divide seq_length {shape.seq_length}"
        )


def check_layout(shape: ModelShape, layout: ParallelLayout, batch: Batch) -> None:
    """Raise ValueError, with the numbers, if a shape or a batch cannot be sharded in this layout."""
    check_sharding(shape, layout)
    step = batch.micro_batch_size * layout.data_parallel_size
    if batch.global_batch_size % step:
        raise ValueError(
            f"micro_batch_size {batch.micro_batch_size} x data_parallel_size {layout.data_parallel_size} = {step} "
            f"does not divide global_batch_size {batch.global_batch_size}"
        )
    if layout.virtual_pipeline_model_parallel_size:
        micro_batches = batch.global_batch_size // step
        if micro_batches % layout.pipeline_model_parallel_size:
            raise ValueError(
                f"pipeline_model_parallel_size {layout.pipeline_model_parallel_size} does not divide the "
                f"{micro_batches} micro-batches per step, which the interleaved schedule needs"
            )


def _check_expert_parallel(shape: ModelShape, layout: ParallelLayout) -> None:
    """Raise ValueError if a layout cannot shard the experts of a shape, or the shape has none to shard."""
    experts, parallel, tensor = shape.num_moe_experts, layout.expert_model_parallel_size, layout.expert_tensor
    if experts is None:
        if parallel > 1:
            raise ValueError(
                f"expert_model_parallel_size {parallel} needs num_moe_experts: this model has no experts; use 1"
            )
        if tensor != layout.tensor_model_parallel_size:
            raise ValueError(f"expert_tensor_parallel_size {tensor} needs num_moe_experts: this model has no experts")
        return
    _check_expert_ranks(layout)
    if shape.mlp_width % tensor:
        size = "tensor_model" if layout.expert_tensor_parallel_size is None else "expert_tensor"
        raise ValueError(f"{size}_parallel_size {tensor} does not divide moe_ffn_hidden_size {shape.mlp_width}")
    if experts % parallel:
        raise ValueError(f"expert_model_parallel_size {parallel} does not divide num_moe_experts {experts}")
    if layout.tensor_model_parallel_size > 1 and not layout.sequence_parallel:
        raise ValueError(
            f"num_moe_experts {experts} with tensor_model_parallel_size {layout.tensor_model_parallel_size} "
            "needs sequence_parallel: true"
        )


def _check_expert_ranks(layout: ParallelLayout) -> None:
    """Raise ValueError unless the ranks of a pipeline stage can be divided among the parts of the experts."""
    parallel, tensor, dense = layout.expert_model_parallel_size, layout.expert_tensor, layout.tensor_model_parallel_size
    ranks = layout.data_parallel_size * layout.context_parallel_size
    if tensor == dense and ranks % parallel:
        raise ValueError(
            f"expert_model_parallel_size {parallel} does not divide data_parallel_size x context_parallel_size "
            f"{ranks}: experts are sharded across the ranks that see different data"
        )
    if ranks * dense % (parallel * tensor):
        raise ValueError(
            f"expert_tensor_parallel_size {tensor} x expert_model_parallel_size {parallel} does not divide the "
            f"{ranks * dense} ranks of a pipeline stage"
        )
    if parallel == 1 and tensor != dense:
        raise ValueError(
            f"expert_tensor_parallel_size {tensor} differs from tensor_model_parallel_size {dense}, which needs "
            "expert_model_parallel_size above 1: without it Megatron-Core 0.16.1 sums the gradients of experts "
            "over the wrong ranks"
        )


class Training(Section):
    """Which failures training survives, and which end the process."""

    hang_timeout_seconds: float = Field(
        1800.0, ge=1, description="a step, save, load or validation that takes longer counts as hung and ends the job"
    )
    non_finite: Literal["stop", "skip", "roll_back"] = Field(
        "stop",
        description="a step with a non-finite loss or gradient norm never changes the weights; then: stop; skip it and "
        "continue with the next samples; or roll back to the last checkpoint and continue with the next samples there",
    )
    non_finite_limit: int = Field(3, gt=0, description="skip: most steps in a row; roll_back: most rollbacks per stage")
    time_limit_minutes: float | None = Field(
        None, gt=0, description="counted from the start of the process; default: until SLURM_JOB_END_TIME, if set"
    )
