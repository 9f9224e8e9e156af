"""A family: ordered stages that share one tokenizer and one data stream, and how each grows from the one before."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from megagrow.config.base import Section
from megagrow.config.cluster import Cluster, JobResources
from megagrow.config.shape import ModelShape
from megagrow.config.stage import Batch, ParallelLayout, Schedule, check_layout
from megagrow.config.training import Training


class GrowthConfig(Section):
    """How a stage's first checkpoint is made from the last checkpoint of the stage before.

    Each axis names an operator that `megagrow.growth` registers; docs/operators.md lists them.
    """

    hidden: str = "zero_pad"
    ffn: str = "zero_pad"
    head: str = Field("zero_pad", description="query heads and, with them, KV groups")
    layer: str = "identity"
    vocab: str = "fresh"
    expert: str | None = Field(
        None, description="default: upcycle if a dense stage gains experts, otherwise duplicate_experts"
    )
    new_layers: Literal["fresh", "copy"] = Field(
        "fresh",
        description="weights inside an identity layer: random, or its source's; either way it outputs zero at first",
    )
    moments: Literal["exact", "copy", "asymmetric", "reset"] = "asymmetric"
    share_of_new: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="combined share of all new copies of an entry; default: equal shares for all copies",
    )
    noise: float = Field(0.0, ge=0, description="relative noise on new copies; above 0 the growth is not exact")
    shrink: float = Field(0.4, gt=0, le=1, description="szp: factor on the old weights")
    granularity: int = Field(1, gt=0, description="upcycle: slices of the dense MLP, one per expert")
    router_noise: float = Field(
        0.01,
        ge=0,
        description="duplicate_experts: noise on new router rows, relative to the router's standard deviation",
    )

    def operators(self) -> dict[str, str]:
        """Operator by axis; `expert` only if one is named."""
        named = {"hidden": self.hidden, "ffn": self.ffn, "head": self.head, "layer": self.layer, "vocab": self.vocab}
        return named if self.expert is None else {**named, "expert": self.expert}


class Stage(Section):
    """One member of the family."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: ModelShape
    parallel: ParallelLayout = ParallelLayout()
    batch: Batch
    schedule: Schedule = Schedule()
    growth: GrowthConfig = GrowthConfig()
    precision: Literal["bf16", "fp32"] = "bf16"
    train_tokens: int | Literal["auto"] = Field("auto", description="training tokens; auto: what the budget leaves")
    recompute_granularity: Literal["full", "selective"] | None = None
    export: Literal["huggingface"] | None = Field(
        None, description="also export the trained stage in this format, to <save>/<stage>/huggingface"
    )
    cluster: JobResources = Field(JobResources(), description="overrides for this stage's training job")

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_layout(self.model, self.parallel, self.batch)
        if isinstance(self.train_tokens, int) and self.train_tokens < self.tokens_per_step:
            raise ValueError(f"train_tokens {self.train_tokens} is less than one step of {self.tokens_per_step} tokens")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step."""
        return self.batch.global_batch_size * self.model.seq_length


class Budget(Section):
    """How long each stage trains if its `train_tokens` is auto."""

    tokens_per_parameter: float = Field(20.0, gt=0, description="for a model trained independently")
    rule: Literal["6NT", "exact"] = Field("6NT", description="how the budget counts FLOPs: 6 N T, or layer by layer")


class LearningRateRule(Section):
    """Peak learning rate of a stage without a max_lr: constant, or reference * (N / N_ref) ** -exponent."""

    rule: Literal["constant", "power"] = "constant"
    reference: float = Field(1e-3, gt=0, description="constant: peak of every stage; power: peak at N_ref")
    reference_parameters: float | None = Field(None, gt=0, description="N_ref; default: the first stage's N")
    exponent: float = Field(0.5, ge=0, description="0.5: four times the parameters halve the rate")


class TokenizerConfig(Section):
    """A tokenizer read from a file, or a SentencePiece model trained on the family's own text."""

    tokenizer_type: Literal["SentencePiece", "HuggingFace"] = "SentencePiece"
    tokenizer_model: Path | None = Field(
        None, description="a .model file, or a directory or file with tokenizer.json; default: train on data.sources"
    )
    model_type: Literal["bpe", "unigram"] = Field("bpe", description="type of the SentencePiece model to train")
    character_coverage: float = Field(0.9995, gt=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tokenizer_type == "HuggingFace" and self.tokenizer_model is None:
            raise ValueError("tokenizer_type HuggingFace needs tokenizer_model: a path with tokenizer.json")
        return self


class DataSource(Section):
    """One source of the data blend: raw text, or the prefix of a tokenized .bin/.idx pair."""

    name: str = Field("corpus", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    paths: tuple[str, ...] = Field(
        (),
        description="files, directories or globs of .txt .md .py .jsonl, optionally .gz or .zst, and .parquet; or "
        "'python-stdlib'",
    )
    prefix: str | None = Field(None, description="path of an existing .bin/.idx pair, without the suffix")
    json_key: str = Field("text", description="JSONL field that holds the text of a document")
    weight: float = Field(1.0, gt=0, description="share of the blend, relative to the other sources")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.paths) == bool(self.prefix):
            raise ValueError(f"source {self.name!r} needs either paths (raw text) or prefix (.bin/.idx), not both")
        return self


class Data(Section):
    """The text, its split into training, validation and test documents, and how it is tokenized."""

    sources: tuple[DataSource, ...] = Field(min_length=1)
    split: str = Field(
        "949,50,1",
        pattern=r"^\d+(\.\d+)?(,\d+(\.\d+)?){2}$",
        description="weights of train, validation and test, by documents",
    )
    append_eod: bool = Field(True, description="append an end-of-document token to every document")
    workers: int = Field(0, ge=0, description="tokenizer processes; 0: one per core")

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"two sources have the same name: {names}")
        if float(self.split.split(",")[0]) <= 0 or float(self.split.split(",")[1]) <= 0:
            raise ValueError(
                f"split {self.split} leaves no training or no validation documents; set the first two weights above 0"
            )
        return self


class Evaluation(Section):
    """Validation, always on the same samples, so that losses of different stages are comparable."""

    eval_interval: int = Field(100, gt=0, description="steps between validations")
    eval_samples: int = Field(64, gt=0, description="validation samples, counted from the first")


class Checkpointing(Section):
    """When checkpoints are written, and how many are kept."""

    save_interval: int = Field(100, gt=0, description="steps between checkpoints")
    keep: int = Field(2, gt=0, description="newest checkpoints to keep; the last one of a stage is always kept")
    async_save: bool = Field(False, description="write while training continues")
    verify_on_load: bool = Field(True, description="compare checksums before a checkpoint is loaded")


class Wandb(Section):
    """Weights & Biases. WANDB_* variables are honored; without an API key, runs are offline."""

    enabled: bool = False
    project: str = "megagrow"
    entity: str | None = None


class Trackers(Section):
    """Trackers that also receive the training records."""

    wandb: Wandb = Wandb()
    tensorboard: bool = False


class Family(Section):
    """A family.yaml."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(1234, ge=0)
    save: Path = Field(description="directory for everything that the family writes")
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: Data
    budget: Budget = Budget()
    learning_rate: LearningRateRule = LearningRateRule()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpointing = Checkpointing()
    trackers: Trackers = Trackers()
    training: Training = Training()
    cluster: Cluster | None = Field(None, description="for `megagrow launch`; `megagrow run` does not need it")
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"two stages have the same name: {names}")
        for small, large in zip(self.stages, self.stages[1:], strict=False):
            step = f"growth from stage {small.name!r} to {large.name!r}"
            check_shapes(step, small.model, large.model, large.growth.granularity)
        return self

    def stage_index(self, wanted: str) -> int:
        """Index of a stage, given its name or number; ValueError lists the stages."""
        names = [stage.name for stage in self.stages]
        if wanted in names:
            return names.index(wanted)
        if wanted.isdecimal() and int(wanted) < len(names):
            return int(wanted)
        raise ValueError(f"no stage {wanted!r}; the stages are {', '.join(names)} (0 to {len(names) - 1})")


_FIXED_FIELDS = (
    "seq_length",
    "positions",
    "head_dim",
    "normalization",
    "layernorm_epsilon",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rope_scaling_factor",
    "swiglu",
    "openai_gelu",
    "add_bias_linear",
    "add_qkv_bias",
    "tied",
    "qk_layernorm",
)
_GROWING_FIELDS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "groups",
    "vocab_size",
    "padded_vocab_size",
)


def check_shapes(step: str, small: ModelShape, large: ModelShape, granularity: int) -> None:
    """Raise ValueError if no operator can grow one shape into another.

    Args:
        step: name of the growth step in errors.
        small, large: the source and target shapes.
        granularity: number of slices that `upcycle` cuts a dense MLP into.
    """
    for name in _FIXED_FIELDS:
        before, after = getattr(small, name), getattr(large, name)
        if before != after:
            why = " (rotary frequencies and softmax scale would differ)" if name == "head_dim" else ""
            hint = "; set kv_channels to keep it" if name == "head_dim" else ""
            raise ValueError(f"{step}: {name} changes from {before} to {after}, which no operator can do{why}{hint}")
    for name in _GROWING_FIELDS:
        before, after = getattr(small, name), getattr(large, name)
        if after < before:
            label = "num_query_groups" if name == "groups" else name
            raise ValueError(f"{step}: {label} shrinks from {before} to {after}; a target must not be smaller")
    _check_mlp_growth(step, small, large, granularity)


def _check_mlp_growth(step: str, small: ModelShape, large: ModelShape, granularity: int) -> None:
    """Raise ValueError if an MLP, dense or of experts, shrinks in any dimension."""
    if small.num_moe_experts is not None and large.num_moe_experts is None:
        raise ValueError(
            f"{step}: num_moe_experts {small.num_moe_experts} cannot become a dense MLP; keep num_moe_experts"
        )
    sizes = [("moe_shared_expert_intermediate_size", small.moe_shared_expert_intermediate_size or 0,
              large.moe_shared_expert_intermediate_size or 0)]  # fmt: skip
    if small.num_moe_experts is not None:
        sizes += [("num_moe_experts", small.num_moe_experts, large.num_moe_experts or 0),
                  ("moe_router_topk", small.moe_router_topk, large.moe_router_topk)]  # fmt: skip
    upcycled = small.num_moe_experts is None and large.num_moe_experts is not None
    slices = granularity if upcycled else 1
    if small.ffn_hidden_size % slices:
        raise ValueError(f"{step}: growth.granularity {slices} does not divide ffn_hidden_size {small.ffn_hidden_size}")
    width = "moe_ffn_hidden_size" if large.num_moe_experts is not None else "ffn_hidden_size"
    sizes.append((width, small.mlp_width // slices, large.mlp_width))
    for name, before, after in sizes:
        if after < before:
            hint = f" (or set growth.granularity, {slices} now)" if upcycled and name == width else ""
            raise ValueError(f"{step}: {name} shrinks from {before} to {after}; a target must not be smaller{hint}")
